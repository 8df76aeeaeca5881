"""The table of published results, from results/published: `python tests/tools/readme_table.py` writes it anew.

Into results/README.md, or into README.md if the table is there.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import bonus  # noqa: E402
import q1a  # noqa: E402
import q1b  # noqa: E402
import q2a  # noqa: E402
import q2b  # noqa: E402

COLUMNS = (
    "question, model", "data", "−ELBO, bits/dim", "KL, bits/dim", "decoder term, bits/dim", "reference, bits/dim",
    "epochs", "s", "threads", "command",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
DEFAULTS = {module.__name__: module.DEFAULTS for module in (q1a, q1b, q2a, q2b, bonus)}
UNSAID = ("out", "device", "smoke", "evaluate", "samples", "data_root", "resume", "compile")  # compile: of older runs


def command(metrics):
    """The command line that made a run: its script and the flags that are not at their defaults."""
    defaults = {"seed": 0, "seeds": 1, "limit": None, "compare": False, "precision": "bf16"}  # auto on our machine
    defaults |= {"precision": "fp32"} if metrics["script"] in ("q1a", "q1b") else {}
    defaults |= {"handout": False, "table_epochs": None} | DEFAULTS[metrics["script"]]
    flags = [f"{metrics['script']}.py"]
    for name, value in metrics["args"].items():
        if name not in (*UNSAID, "compare" if metrics["script"] == "q2a" else "") and value != defaults.get(name):
            flags.append(f"--{name.replace('_', '-')}")
            flags += [] if value is True else [Path(value).name if name == "data" else f"{value}"]
    return "python " + " ".join(flags)


def row(metrics, what, bound, reference, others=()):
    """One line of the table: test figures; over seeds their mean and standard deviation, else ± the standard error."""
    data, cell = (
        metrics["data"].get("name", "Gaussian"),
        f"{bound['neg_elbo_bpd']:.4f} ± {bound['neg_elbo_se_bpd']:.4f}",
    )
    kl, recon = bound["kl_bpd"], bound["recon_bpd"]
    if others:
        values = [f["neg_elbo_bpd"] for f in others]
        cell = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} (sd, n = {len(values)})"
        kl, recon = (statistics.mean(f[key] for f in others) for key in ("kl_bpd", "recon_bpd"))
    return (
        f"| {what} | {data} | {cell} | {kl:.4f} | {recon:.4f} | {reference} | {metrics['args']['epochs']} "
        f"| {metrics['seconds']:,.0f} | {metrics['env']['threads']} | `{command(metrics)}` |"
    )


def published():
    """The metrics of every published run, in the order of the questions."""
    runs = [json.loads(path.read_text("utf-8")) for path in (ROOT / "results/published").glob("*/metrics.json")]
    order = ("q1a", "q1b", "q2a", "q2b", "bonus")

    def place(m):
        return order.index(m["script"]), m["data"].get("name", ""), m["data"].get("train"), command(m)

    return sorted(runs, key=place)


def rows():
    """All lines. The reference of an image bound: lossless codecs, measured by any published run on the same images."""
    runs = published()
    codecs = {m["data"].get("sha256"): m["test_codecs_bpd"] for m in runs if "test_codecs_bpd" in m}
    jpeg_xl = json.loads((ROOT / "results/published/jpeg_xl.json").read_text("utf-8"))
    for metrics in runs:
        script = metrics["script"]
        if script in ("q1a", "q1b"):
            for model, f in metrics["final"].items():
                bound, what = f.get("test", f), f"{script[1:].upper()}, {model.replace('_', ', ')}"
                seeds = [final[model].get("test", final[model]) for final in metrics.get("seeds", {}).values()]
                yield row(metrics, what, bound, f"true density {bound['floor_bpd']:.4f}", seeds)
        else:
            key = metrics["data"]["sha256"]
            measured = codecs.get(key, {}) | ({"JPEG XL": jpeg_xl[key]["bpd"]} if key in jpeg_xl else {})
            reference = ", ".join(f"{codec} {value:.3f}" for codec, value in measured.items())
            yield row(metrics, script.removeprefix("q"), metrics["final"]["test"], reference)


def table_file():
    """The file that holds the table: results/README.md, or README.md while there is no other."""
    files = [ROOT / "results" / "README.md", ROOT / "README.md"]
    return next((path for path in files if path.exists() and HEAD in path.read_text("utf-8")), files[0])


def parts(text):
    """The text before the table, the table's rows, and the text after it."""
    before, rest = text.split(HEAD)
    table = rest.split("\n\n")[0].rstrip("\n")
    return before, table.splitlines(), rest[len(table) :]


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    path = table_file()
    text = path.read_text("utf-8") if path.exists() else f"# Published results\n\n{HEAD}\n"
    before, _, after = parts(text)
    path.write_text(before + HEAD + "\n".join(rows()) + after, "utf-8")


if __name__ == "__main__":
    main()
