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


def published():
    """{script: its metrics} of every published run, in the order of the questions."""
    paths = {
        name: ROOT / "results" / "published" / name / "metrics.json" for name in ("q1a", "q1b", "q2a", "q2b", "bonus")
    }
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()}


def rows():
    """All lines. The reference of an image bound: lossless codecs, measured by any published run on the same images."""
    runs = published()
    codecs = {m["data"].get("sha256"): m["test_codecs_bpd"] for m in runs.values() if "test_codecs_bpd" in m}
    for script, metrics in runs.items():
        if script in ("q1a", "q1b"):
            for model, f in metrics["final"].items():
                bound, what = f.get("test", f), f"{script[1:].upper()}, {model.replace('_', ', ')}"
                yield row(metrics, what, bound, f"true density {bound['floor_bpd']:.4f}")
        else:
            measured = codecs.get(metrics["data"]["sha256"], {})
            reference = ", ".join(f"{codec} {value:.3f}" for codec, value in measured.items())
            yield row(metrics, script.removeprefix("q"), metrics["final"]["test"], reference)


def main():
    path = ROOT / "README.md"
    before, rest = path.read_text("utf-8").split(HEAD)
    after = rest[rest.index("\n\n") :]
    path.write_text(before + HEAD + "\n".join(rows()) + after, "utf-8")


if __name__ == "__main__":
    main()
