"""Copy a finished run into results/published: `python tests/publish.py results/q2b [--no-images]`.

metrics.json, report.md and the figures; pictures over 400 kB in 256 colours. --no-images, for data that are not ours to
publish: no report, and only those figures that show no image of the data.
"""

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 400_000  # bytes
SHOW_DATA = ("report.md", "interpolations.png", "reconstructions.png", "lossy.png", "neighbours.png")


def main(folder, no_images=False):
    source = Path(folder)
    target = ROOT / "results" / "published" / json.loads((source / "metrics.json").read_text("utf-8"))["script"]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted([*source.glob("*.png"), *source.glob("*.md"), *source.glob("*.json")]):
        if no_images and path.name in SHOW_DATA:
            continue
        if path.suffix == ".png" and path.stat().st_size > LIMIT:
            Image.open(path).convert("RGB").quantize(256).save(target / path.name, optimize=True)
        else:
            shutil.copy(path, target)
        print(target / path.name, (target / path.name).stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1], "--no-images" in sys.argv[2:])
