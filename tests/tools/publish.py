"""Copy a finished run into results/published, and write the tables of README.md and results/README.md from there.

python tests/tools/publish.py results/q2b               metrics.json, report.md, all figures and codec.json
python tests/tools/publish.py results/q2b --no-images   of data that are not ours to publish: no report, and only those
                                                        figures that show no image of the data
python tests/tools/publish.py                           nothing new: published reports by today's code, and tables

A published run of the same name gives way to it. Of a seed other than 0, metrics.json alone is published. After
`pip install pillow-jxl-plugin`, lossless JPEG XL (effort 9) of the first 1,000 test images is measured too, once per
data set: into jpeg_xl.json, by the data's SHA-256.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import core  # noqa: E402
from tools import bench  # noqa: E402

PUBLISHED = ROOT / "results" / "published"
SCRIPTS = ("q1a", "q1b", "q2a", "q2b", "bonus")
SHOW_NO_DATA = ("curves.png", "samples.png", "experiments.png", "samples_2a_2b.png")
UNSAID = ("out", "device", "smoke", "evaluate", "samples", "data_root", "resume")  # flags that change no number
FURTHER = {"compare": False, "table_epochs": None}  # flags that add trainings, and their defaults
COLUMNS = {  # of results/README.md, which has every published run
    "question, model": "what", "data": "data", "−ELBO": "bound", "± s.e.": "error", "lowest seed": "lowest",
    "highest seed": "highest", "seeds": "seeds", "KL": "kl", "decoder term": "recon", "floor": "limit",
    "JPEG XL": "jpeg_xl", "file": "file", "images in it": "images", "their −ELBO": "file_bound",
    "epochs": "epochs", "training, s": "seconds", "threads": "threads", "command": "command",
}  # fmt: skip
SHORT = ("what", "data", "bound", "kl", "limit", "jpeg_xl", "file", "file_bound", "seeds", "seconds")
SHORT_COLUMNS = {name: cell for name, cell in COLUMNS.items() if cell in SHORT}  # of README.md
OTHER_RECIPES = {"lr", "muon_lr", "kl_warmup", "batch_size", "handout", "precision"}


def read(path):
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write(path, found):
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def flags(metrics):
    """The flags of a run that are not at their defaults."""
    script, images, args = metrics["script"], "data" in metrics["args"], metrics["args"] | {"evaluate": "this run"}
    defaults = vars(core.Parser(script, images).parse_args([])) | FURTHER | importlib.import_module(script).DEFAULTS
    if images:  # as with --evaluate, so that nothing is printed
        untyped = {k: None for k in ("batch_size", "lr", "muon_lr", "kl_warmup") if defaults[k] is None}
        by_length, _ = core.image_recipe(argparse.Namespace(**args | untyped), metrics["data"]["train"], "")
        defaults |= {k: getattr(by_length, k) for k in untyped}
    return {k: v for k, v in args.items() if k not in UNSAID and v != defaults.get(k)}


def folder_name(metrics):
    """q1a, or q2b_synthetic_4000_fp32_seed_1: the script, for images data, limit and fp32, and a seed other than 0."""
    data, limit, seed = (metrics["args"].get(name) for name in ("data", "limit", "seed"))
    fp32 = data and metrics["env"]["precision"] == "fp32" and "fp32"
    parts = (metrics["script"], data and Path(data).stem, limit, fp32, seed and f"seed_{seed}")
    return "_".join(str(part) for part in parts if part)


def publish(folder, images=True):
    """Copy a run's folder to where it belongs."""
    metrics = read(folder / "metrics.json")
    measure_jpeg_xl(metrics)
    args = metrics["args"]
    for name in args.keys() & {"out", "data_root", "data"}:
        args[name] = Path(args[name]).name  # folders are nobody's business
    target = PUBLISHED / folder_name(metrics)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    write(target / "metrics.json", metrics)
    for path in [*folder.glob("*.png"), *folder.glob("codec.json"), *folder.glob("report.md")]:
        if args["seed"] == 0 and (images or path.name in (*SHOW_NO_DATA, "codec.json")):
            shutil.copy(path, target)
    print(f"published as {target}:", *sorted(path.name for path in target.iterdir()))


def measure_jpeg_xl(metrics):
    """Of a run's test images, unless they are known."""
    path, key, args = PUBLISHED / "jpeg_xl.json", metrics["data"].get("sha256"), metrics["args"]
    if "data" not in args or key in read(path) or not importlib.util.find_spec("pillow_jxl"):
        return
    importlib.import_module("pillow_jxl")  # teaches Pillow the format
    data = core.load_images(args["data"], args["data_root"], args["limit"], args["seed"])
    bits = core.codec_bits_per_dim(data.splits["test"][:1000], "JXL", effort=9)
    write(path, read(path) | {key: {"data": data.name, "bpd": bits}})


def report_of(folder):
    """What today's code reports of a published run, or of the published times."""
    if folder.name == "bench":
        return bench.report(read(folder / "bench.json"))
    metrics = read(folder / "metrics.json")
    return importlib.import_module(metrics["script"]).report(metrics)


def published():
    """The published runs in the order of the questions: lists of metrics of runs that differ in their seeds alone."""
    groups = {}
    for path in PUBLISHED.glob("*/metrics.json"):
        metrics = read(path) | {"codec": read(path.with_name("codec.json"))}
        key = {k: v for k, v in flags(metrics).items() if k not in ("seed", *FURTHER)}
        data, key = metrics["data"], json.dumps(key) + metrics["env"]["precision"]
        place = SCRIPTS.index(metrics["script"]), data.get("name", ""), data.get("train", 0), key
        groups.setdefault(place, []).append(metrics)
    return [sorted(runs, key=lambda metrics: metrics["args"]["seed"]) for _, runs in sorted(groups.items())]


def command_cell(runs):
    """The command of the first run, and the seeds of all."""
    words = [f"{runs[0]['script']}.py"]
    for name, value in flags(runs[0]).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [f"{value}"])]
    seeds = f", `--seed` {runs[0]['args']['seed']} to {runs[-1]['args']['seed']}" if len(runs) > 1 else ""
    return f"`{' '.join(words)}`{seeds}"


def references(metrics):
    """For the test images of a run: the file that JPEG XL makes of them; a lower bound on the entropy of their law."""
    jpeg_xl = read(PUBLISHED / "jpeg_xl.json").get(metrics["data"].get("sha256"))
    found = {"jpeg_xl": f"{jpeg_xl['bpd']:.3f}"} if jpeg_xl else {}
    for floor in read(PUBLISHED / "floor.json").values():
        first_test_image = metrics["data"].get("train", 0) + metrics["data"].get("valid", 0)
        if metrics["args"].get("data") == "synthetic" and floor["first_image"] == first_test_image:
            found["limit"] = f"{floor['scene_known']['bpd']:.3f}"
    return found


def file_of(runs):
    """What tests/tools/codec.py made of the first test images, its start-up included, and the bound on the same."""
    for codec in (metrics["codec"] for metrics in runs if metrics["codec"]):
        bits = codec["bits_per_dim"]
        bound = bits["bound as in the reports (core.evaluate)"]
        return {"file": f"{bits['file on disk']:.3f}", "images": codec["images"], "file_bound": f"{bound:.3f}"}
    return {}


def largest():
    """Of each image script, the published runs of the default recipe with the most training examples."""
    found = {}
    for runs in sorted(published(), key=lambda runs: runs[0]["data"].get("train", 0)):
        if not OTHER_RECIPES & set(flags(runs[0])):
            found[runs[0]["script"]] = runs
    return [found[script] for script in SCRIPTS[2:] if script in found]


def rows(short=False):
    """The cells of every row: for each group of runs, one; of 1A and 1B one for each model."""
    for runs in largest() if short else published():
        first, plane = runs[0], runs[0]["script"] in ("q1a", "q1b")
        curves = first["curves"].values() if plane else [first["curves"]]
        row = dict.fromkeys(COLUMNS.values(), "") | {
            "data": first["data"].get("name", "Gaussian"), "epochs": first["args"]["epochs"], "seeds": len(runs),
            "seconds": f"{sum(curve['seconds'] for curve in curves):,.0f}", "threads": first["env"]["threads"],
            "command": command_cell(runs),
        } | references(first) | file_of(runs)  # fmt: skip
        for model in first["final"] if plane else [""]:
            name = first["script"].removeprefix("q").upper() if plane else first["script"].removeprefix("q")
            row["what"] = f"{name}, {model.replace('_', ', ')}" if plane else name
            finals = [metrics["final"][model] if plane else metrics["final"] for metrics in runs]
            bounds = [final.get("test", final) for final in finals]
            keys = {"bound": "neg_elbo", "error": "neg_elbo_se", "kl": "kl", "recon": "recon"}
            row |= {cell: f"{statistics.mean(f[f'{key}_bpd'] for f in bounds):.4f}" for cell, key in keys.items()}
            if len(runs) > 1:
                by_seed = [f["neg_elbo_bpd"] for f in bounds]
                row |= {"lowest": f"{min(by_seed):.4f}", "highest": f"{max(by_seed):.4f}"}
            if plane:
                row["limit"] = f"{bounds[0]['floor_bpd']:.4f}"
            yield row


def table(short=False):
    """README.md's table, if short, or that of results/README.md."""
    columns = SHORT_COLUMNS if short else COLUMNS
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(row[key]) for key in columns.values())} |" for row in rows(short)]
    return "\n".join(lines) + "\n"


TABLES = {"README.md": True, "results/README.md": False}  # short?


def cut_out(text, short):
    """A text around its table: before it, the table, after it."""
    begin = text.index(f"| {' | '.join(SHORT_COLUMNS if short else COLUMNS)} |\n")
    end = text.index("|\n\n", begin) + 2
    return text[:begin], text[begin:end], text[end:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="results/<script> of a finished run")
    parser.add_argument("--no-images", action="store_true")
    args = parser.parse_args()
    if args.folder:
        publish(args.folder, not args.no_images)
    for report in PUBLISHED.glob("*/report.md"):
        report.write_text(report_of(report.parent), "utf-8")
    for name, short in TABLES.items():
        before, _, after = cut_out((ROOT / name).read_text("utf-8"), short)
        (ROOT / name).write_text(before + table(short) + after, "utf-8")


if __name__ == "__main__":
    main()
