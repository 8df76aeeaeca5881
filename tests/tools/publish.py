"""Copy a finished run into results/published, from where `python tests/tools/readme_table.py` puts it into the README.

python tests/tools/publish.py results/q2b                  metrics.json, report.md, all figures and codec.json
python tests/tools/publish.py results/q2b --no-images      of data that are not ours to publish: no report, and only
                                                           those figures that show no image of the data
python tests/tools/publish.py results/q2b --metrics-only   of further seeds: metrics.json alone
Pictures over 200 kB are copied in 256 colours. A published run of the same name gives way to it.
"""

import argparse
import json
import shutil
from pathlib import Path

from PIL import Image

PUBLISHED = Path(__file__).resolve().parent.parent.parent / "results" / "published"
LIMIT = 200_000  # bytes
SHOW_DATA = ("report.md", "interpolations.png", "reconstructions.png", "lossy.png", "neighbours.png")


def folder_name(metrics):
    """q1a, or q2b_synthetic_4000_fp32_seed_1: the script, for images data, limit and fp32, and a seed other than 0."""
    data, limit, precision, seed = (metrics["args"].get(name) for name in ("data", "limit", "precision", "seed"))
    fp32 = data and precision == "fp32" and precision
    parts = (metrics["script"], data and Path(data).stem, limit, fp32, seed and f"seed_{seed}")
    return "_".join(str(part) for part in parts if part)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results/<script> of a finished run")
    parser.add_argument("--no-images", action="store_true")
    parser.add_argument("--metrics-only", action="store_true")
    args = parser.parse_args()
    if not (args.folder / "metrics.json").exists():
        parser.error(f"{args.folder}: no finished run, as there is no metrics.json")
    metrics = json.loads((args.folder / "metrics.json").read_text("utf-8"))
    if metrics.get("failed") or not metrics.get("finished", True):
        parser.error(f"{args.folder}: not a finished run; missing: {', '.join(metrics['failed']) or 'training'}")
    target = PUBLISHED / folder_name(metrics)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    out, metrics["args"]["out"] = metrics["args"]["out"], "results"  # folders are nobody's business
    if "data" in metrics["args"]:
        metrics["args"]["data"] = Path(metrics["args"]["data"]).name
    (target / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
    for path in sorted([*args.folder.glob("*.png"), *args.folder.glob("*.md"), *args.folder.glob("codec.json")]):
        if args.metrics_only or (args.no_images and path.name in SHOW_DATA):
            continue
        if path.suffix == ".png" and path.stat().st_size > LIMIT:
            picture = Image.open(path).convert("RGB")  # median cut, the default, would lose the rarer colours
            picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3).save(target / path.name, optimize=True)
        elif path.suffix == ".md":
            text = path.read_text("utf-8").replace(f"{out}/", "results/")
            (target / path.name).write_text(text, "utf-8")
        else:
            shutil.copy(path, target)
        print(target / path.name, (target / path.name).stat().st_size)


if __name__ == "__main__":
    main()
