"""Question 2a: a convolutional VAE on SVHN with a standard normal prior.

    p(z) = N(0, I) over 8 x 8 positions,   q(z|x) = N(mu(x), diag sigma(x)^2),   p(x|z) = N(mu(z), diag sigma(z)^2)

on dequantised pixels, so that KL + decoder term bounds the code length of the 8-bit image (bits/dim, 3072 dimensions).

    python q2a.py --epochs 20                  ->  results/q2a/report.md, on SVHN (downloaded)
    python q2a.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
    python q2a.py --evaluate results/q2a/checkpoint.pt --data FILE.npz  ->  results/q2a/evaluate/metrics.json
"""

import argparse

from core import IMAGE_DEFAULTS, IMAGE_SMOKE, ImageVAE, StandardNormal, in_notebook, launch, parse_args, run_images


def make_model(args: argparse.Namespace) -> ImageVAE:
    return ImageVAE(args.latents, StandardNormal)


def main(argv: list[str] | None = None) -> None:
    args, out = parse_args("q2a", argv, IMAGE_DEFAULTS, IMAGE_SMOKE, images=True)
    run_images("q2a", args, out, make_model, "2a: a convolutional VAE with a standard normal prior")


if __name__ == "__main__" and not in_notebook():
    launch(main)
