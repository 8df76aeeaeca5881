"""Question 2a: a convolutional VAE on SVHN with a standard normal prior.

    p(z) = N(0, I) over 8 x 8 positions,   q(z|x) = N(mu(x), diag sigma(x)^2),   p(x|z) = N(mu(z), diag sigma(z)^2)

on dequantised pixels, so that KL + decoder term bounds the code length of the 8-bit image (bits/dim, 3072 dimensions).

    python q2a.py --epochs 20                  ->  results/q2a/report.md, on SVHN (downloaded)
    python q2a.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
"""

import time

import torch

from core import (
    IMAGE_DEFAULTS, IMAGE_SMOKE, ImageVAE, StandardNormal, describe_run, evaluate_splits, fit, image_report,
    in_notebook, load_images, parse_args, plot_curves, plot_image_model, write_results,
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args, out = parse_args("q2a", argv, IMAGE_DEFAULTS, IMAGE_SMOKE, images=True)
    start, data = time.perf_counter(), load_images(args)
    splits = {k: x.to(args.device) for k, x in data.splits.items()}
    torch.manual_seed(args.seed)
    model = ImageVAE(args.latents, StandardNormal).to(args.device).to(memory_format=torch.channels_last)
    curves = fit(model, splits, args)
    final = evaluate_splits(model, splits)
    title = f"2a, N(0, I) prior, {data.name}: test −ELBO {final['test']['neg_elbo_bpd']:.3f} bits/dim"
    plot_curves(curves, title, out / "curves.png")
    plot_image_model(model, splits["test"], title, out)
    params = sum(p.numel() for p in model.parameters())
    metrics = {**describe_run("q2a", args, data.describe(), params, start), "curves": curves, "final": final}
    report = image_report("2a: a convolutional VAE with a standard normal prior", metrics)
    write_results(out, metrics, report, model.cpu().state_dict())


if __name__ == "__main__" and not in_notebook():
    main()
