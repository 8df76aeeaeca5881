"""The tables of results, from results/published: `python tests/tools/readme_table.py` writes them.

results/README.md holds every published run, README.md one row for each question.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import bonus  # noqa: E402
import core  # noqa: E402
import q1a  # noqa: E402
import q1b  # noqa: E402
import q2a  # noqa: E402
import q2b  # noqa: E402

COLUMNS = (
    "question, model", "data", "−ELBO, bits/dim", "KL, bits/dim", "decoder term, bits/dim", "reference, bits/dim",
    "file on disk, bits/dim", "epochs", "training, s", "threads", "command",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
SHORT_COLUMNS = ("question, model", "data", "−ELBO, bits/dim", "file on disk, bits/dim", "reference, bits/dim",
                 "training, s", "command")  # fmt: skip
SHORT_HEAD = f"| {' | '.join(SHORT_COLUMNS)} |\n{'|---' * len(SHORT_COLUMNS)}|\n"
SHORT_MODELS = ("data1_diagonal", "data2_diagonal", "diagonal", "isotropic")  # of 1A and 1B
SHORT_DATA = ", at most 4000 training images"  # of the image models
DEFAULTS = {module.__name__: module.DEFAULTS for module in (q1a, q1b, q2a, q2b, bonus)}
UNSAID = ("out", "device", "smoke", "evaluate", "samples", "data_root", "resume")


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


def seconds(metrics):
    """Of training: of all models of 1A and 1B."""
    curves = metrics["curves"]
    parts = [curves] if "seconds" in curves else curves.values()
    return f"{sum(part['seconds'] for part in parts):,.0f}"


def bound_cell(bounds):
    """Over seeds, mean and range; of one, ± the standard error over test examples."""
    if len(bounds) < 2:
        return f"{bounds[0]['neg_elbo_bpd']:.4f} ± {bounds[0]['neg_elbo_se_bpd']:.4f}"
    values = [f["neg_elbo_bpd"] for f in bounds]
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f}, n = {len(values)})"


def row(metrics, what, bounds, reference):
    """One line of the full table: test figures of one run, over its seeds."""
    kl, recon = (statistics.mean(f[key] for f in bounds) for key in ("kl_bpd", "recon_bpd"))
    return (
        f"| {what} | {metrics['data'].get('name', 'Gaussian')} | {bound_cell(bounds)} | {kl:.4f} | {recon:.4f} "
        f"| {reference} | {file_cell(metrics)} | {metrics['args']['epochs']} | {seconds(metrics)} "
        f"| {metrics['env']['threads']} | `{command(metrics)}` |"
    )


def short_row(metrics, what, bounds, reference):
    """One line of the README's table."""
    data = metrics["data"].get("name", "Gaussian")
    data = "4,000 synthetic images" if data.endswith(SHORT_DATA) else data
    seeds = "".join(f", `--seed {k}`" for k in range(1, len(bounds))) if "limit" in metrics["args"] else ""
    return (
        f"| {what} | {data} | {bound_cell(bounds)} | {file_cell(metrics)} | {reference} | {seconds(metrics)} "
        f"| `{command(metrics).removeprefix('python ')}`{seeds} |"
    )


def file_cell(metrics):
    """What `tests/tools/codec.py` made of the first test images, its start-up apart, and the bound on the same."""
    if "codec" not in metrics:
        return ""
    found = metrics["codec"]["bits_per_dim"]
    file, bound = found["file without the start-up"], found["bound as in the reports (core.evaluate)"]
    return f"{file:.4f} ({metrics['codec']['images']} images; −ELBO there {bound:.4f})"


def published():
    """The metrics of every published run, in the order of the questions."""
    runs = []
    for path in (ROOT / "results/published").glob("*/metrics.json"):
        codec = path.with_name("codec.json")
        more = {"codec": json.loads(codec.read_text("utf-8"))} if codec.exists() else {}
        runs.append(json.loads(path.read_text("utf-8")) | more)
    order = ("q1a", "q1b", "q2a", "q2b", "bonus")

    def place(m):
        return order.index(m["script"]), m["data"].get("name", ""), m["data"].get("train"), command(m)

    return sorted(runs, key=place)


def floor(metrics):
    """The lower side of the entropy of a run's synthetic test images, bits/dim: its own, or floor.json's; else None."""
    if "floor" in metrics:
        return metrics["floor"]["scene_known_bpd"]
    start = metrics["data"].get("train", 0) + metrics["data"].get("valid", 0)
    measured = json.loads((ROOT / "results/published/floor.json").read_text("utf-8")).values()
    known = [f["scene_known"]["bpd"] for f in measured if f["first_image"] == start]
    return known[0] if known and metrics["data"]["name"].startswith("synthetic") else None


def references():
    """{SHA-256 of an image set: {codec or "entropy": its bits/dim}}, from any published run on it."""
    known = {}
    jpeg_xl = json.loads((ROOT / "results/published/jpeg_xl.json").read_text("utf-8"))
    for metrics in published():
        key = metrics["data"].get("sha256")
        codecs = metrics.get("test_codecs_bpd", {}) | ({"JPEG XL": jpeg_xl[key]["bpd"]} if key in jpeg_xl else {})
        found = known.setdefault(key, {})
        found |= {codec: f"{codec} {value:.3f}" for codec, value in codecs.items()}
        if low := floor(metrics):
            found["entropy"] = f"entropy {low:.3f} to {low + core.SCENE_COST_BPD:.3f}"
    return known


def plane_rows(metrics, make):
    """A line for each model of 1A or 1B, over its seeds."""
    for model in metrics["final"]:
        finals = metrics.get("seeds", {"0": metrics["final"]}).values()
        bounds = [final[model].get("test", final[model]) for final in finals]
        what = f"{metrics['script'][1:].upper()}, {model.replace('_', ', ')}"
        if make is row or model in SHORT_MODELS:
            yield make(metrics, what, bounds, f"true density {bounds[0]['floor_bpd']:.4f}")


def rows():
    """All lines of the full table."""
    image_references = references()
    for metrics in published():
        if metrics["script"] in ("q1a", "q1b"):
            yield from plane_rows(metrics, row)
        else:
            reference = ", ".join(image_references[metrics["data"]["sha256"]].values())
            yield row(metrics, metrics["script"].removeprefix("q"), [metrics["final"]["test"]], reference)


def short_rows():
    """A line for each model of question 1, and for each image script over the published seeds of its main job."""
    image_references = references()
    groups = {}
    for metrics in published():
        args = metrics["args"]
        if metrics["script"] in ("q1a", "q1b"):
            yield from plane_rows(metrics, short_row)
        elif metrics["data"]["name"].endswith(SHORT_DATA) and args.get("muon_lr") and args["precision"] == "bf16":
            groups.setdefault(metrics["script"], []).append(metrics)
    for script, runs in groups.items():
        bounds = [metrics["final"]["test"] for metrics in runs]
        known = image_references[runs[0]["data"]["sha256"]]
        reference = ", ".join(known[name] for name in ("JPEG XL", "entropy") if name in known)
        yield short_row(runs[0], script.removeprefix("q"), bounds, reference)


def parts(text, head):
    """The text before a table, the table's rows, and the text after it."""
    before, rest = text.split(head)
    table = rest.split("\n\n")[0].rstrip("\n")
    return before, table.splitlines(), rest[len(table) :]


TABLES = {"results/README.md": (HEAD, rows), "README.md": (SHORT_HEAD, short_rows)}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, (head, lines) in TABLES.items():
        before, _, after = parts((ROOT / name).read_text("utf-8"), head)
        (ROOT / name).write_text(before + head + "\n".join(lines()) + after, "utf-8")


if __name__ == "__main__":
    main()
