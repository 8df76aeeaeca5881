"""What lossless JPEG XL makes of a data set's test images, into results/published/jpeg_xl.json for the README's table.

    pip install pillow-jxl-plugin && python tests/tools/jpeg_xl.py --data synthetic --limit 4000

Of the first 1,000 test images, as PNG and WebP in every run's metrics: bits/dim of the mean file, headers and all, at
effort 9. The file's keys are the data sets' SHA-256, as in metrics.json.
"""

import argparse
import json
import sys
from pathlib import Path

import pillow_jxl  # noqa: F401  teaches Pillow the format

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import core  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="svhn", help="as in the scripts")
    parser.add_argument("--data-root", default="data", help="as in the scripts")
    parser.add_argument("--limit", type=int, help="as in the scripts")
    parser.set_defaults(seed=0, evaluate=None)
    data = core.load_images(parser.parse_args())
    bound = core.codec_bits_per_dim(data.splits["test"][:1000], "JXL", effort=9)
    path = ROOT / "results" / "published" / "jpeg_xl.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    known[data.describe()["sha256"]] = {"data": data.name, "bpd": bound}
    core.write_whole(path, lambda file: file.write((json.dumps(known, indent=1) + "\n").encode()))
    print(f"{data.name}: JPEG XL {bound:.4f} bits/dim, into {path}")


if __name__ == "__main__":
    main()
