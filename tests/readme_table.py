"""The README's results table, from results/published: `python tests/readme_table.py` writes it into README.md."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """| question, model | data | −ELBO | KL | decoder term | reference | epochs | seconds, whole script |
|---|---|---|---|---|---|---|---|
"""


def row(metrics, what, bound, reference):
    """One line of the table: test figures in bits/dim."""
    data = metrics["data"].get("name", "Gaussian")
    return (
        f"| {what} | {data} | {bound['neg_elbo_bpd']:.4f} ± {bound['neg_elbo_se_bpd']:.4f} | {bound['kl_bpd']:.4f} "
        f"| {bound['recon_bpd']:.4f} | {reference} | {metrics['args']['epochs']} | {metrics['seconds']:,.0f} |"
    )


def rows():
    """All lines, in the order of the questions."""
    for script in ("q1a", "q1b", "q2a", "q2b", "bonus"):
        path = ROOT / "results" / "published" / script / "metrics.json"
        if not path.exists():
            continue
        metrics = json.loads(path.read_text("utf-8"))
        name = {"bonus": "bonus"}.get(script, script[1:].upper())
        for model, f in metrics["final"].items():
            if script in ("q1a", "q1b"):
                bound = f["test"] if script == "q1b" else f
                yield row(
                    metrics, f"{name}, {model.replace('_', ', ')}", bound, f"true density {bound['floor_bpd']:.4f}"
                )
            elif model == "test":
                codecs = ", ".join(f"{codec} {value:.3f}" for codec, value in metrics["test_codecs_bpd"].items())
                yield row(metrics, name, f, codecs)


def main():
    path = ROOT / "README.md"
    before, rest = path.read_text("utf-8").split(HEAD)
    after = rest[rest.index("\n\n") :]
    path.write_text(before + HEAD + "\n".join(rows()) + after, "utf-8")


if __name__ == "__main__":
    main()
