"""Question 2a: a convolutional VAE on SVHN with a standard normal prior.

    p(z) = N(0, I) over 8 x 8 positions,   q(z|x) = N(mu(x), diag sigma(x)^2),   p(x|z) = N(mu(z), diag sigma(z)^2)

    -log P(image) <= E_u[KL(q(z|x) || p(z)) + E_q[-log p(x|z)]] + 3072 ln 128,  x = (levels + u) / 128 - 1, u ~ U[0, 1)

The right side bounds the code length of the 8-bit image in nats; divided by 3072 ln 2 it is in bits/dim. In the reports
3072 ln 128 is part of the decoder term. Each image has one u and one z, from which the KL is estimated too, as in 2b.

    python q2a.py --epochs 20                  ->  results/q2a/report.md, on SVHN (downloaded)
    python q2a.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
    python q2a.py --evaluate results/q2a/checkpoint.pt --data FILE.npz  ->  results/q2a/evaluate/report.md
"""

from pathlib import Path
from typing import Any

from core import (  # before torch, whose import reads what core has set
    CODECS, ImageParser, ImageVAE, StandardNormal, attempt, between_ends, bin_centres, bounds_text, check_above,
    check_prior, codec_bits_per_dim, describe_run, error_of_one_draw, evaluate_splits, evenly_spaced, fit,
    fixed_noise, gives_folders_back, in_bits, launch, load_images, load_trained, parse_args, pasted_into_cell,
    plot_curves, plot_images, prepare, quantise, settings, straight_lines, synthetic_floor, to_device, training_text,
    write_images, write_metrics, write_report,
)  # fmt: skip

import torch
from torch import Tensor

DEFAULTS = dict(epochs=20, batch_size=16, lr=2e-3, muon_lr=0.012, schedule="trapezoid", latents=16, data="svhn")
SMOKE = dict(epochs=1, batch_size=16, limit=48, latents=4, data="synthetic")


def report(metrics: dict[str, Any]) -> str:
    """The handout's deliverables in its order, every number from metrics."""
    return f"""# 2a: a convolutional VAE with a standard normal prior

{training_text(metrics)}

## 1. The bound on train, validation and test

{bounds_text(metrics, colours_apart=True)}
## 2. Samples

![samples](samples.png)

## 3. Interpolations

![interpolations](interpolations.png)

## Reconstructions

![reconstructions](reconstructions.png)
"""


def draw_figures(model: ImageVAE, test: Tensor, title: str, out: Path, samples: int, failed: dict[str, str]) -> None:
    """100 samples, interpolations of five pairs of test images, reconstructions; and --samples single images."""
    with attempt("samples.png", failed):
        x, mu = model.sample(100, fixed_noise("samples"))
        panels = {"µ(z), the decoder's mean": quantise(mu), "x ~ p(x|z) at the same z": quantise(x)}
        plot_images(panels, 10, f"{title}\n100 samples, z ~ p(z)", out / "samples.png")
    shown = evenly_spaced(test, 10)
    codes, _ = model.encoder(bin_centres(shown))  # the posterior's means
    with attempt("interpolations.png", failed):
        means, _ = model.decoder(straight_lines(codes, steps=10))  # both ends included
        panels = {"straight in z": between_ends(shown, quantise(means))}
        plot_images(panels, 12, f"{title}\ninterpolations, true test images at the ends", out / "interpolations.png")
    with attempt("reconstructions.png", failed):
        x, mu = model.decode(codes, fixed_noise("reconstructions"))
        panels = {"test images": shown, "µ(z), the decoder's mean": quantise(mu), "x ~ p(x|z)": quantise(x)}
        name = f"{title}\ndecoded from the posterior's mean"
        plot_images(panels, 10, name, out / "reconstructions.png", stacked=True)
    with attempt("single samples", failed):
        for first in range(0, samples, 100):
            x, _ = model.sample(min(100, samples - first), fixed_noise("single samples", first))
            write_images(quantise(x), out / "samples", first)


@gives_folders_back()
def main(argv: list[str] | None = None) -> None:
    args, out = parse_args(ImageParser("q2a"), argv, DEFAULTS, SMOKE)
    trained = load_trained(args, "q2a") if args.evaluate else None

    # 1. Data and model.
    data = load_images(args)
    splits = {name: x.to(args.device) for name, x in data.splits.items()}
    torch.manual_seed(args.seed)
    model = to_device(ImageVAE(args.latents, StandardNormal), args, trained)
    prepare(out, args, len(splits["train"]))  # moves an earlier run's results aside, unless --resume

    # 2. Training, with up to 21 looks at the first images of each split; the weights that were best on validation stay.
    # The checkpoint is on disk before anything else is done; --evaluate takes an earlier one's.
    if trained:
        curves = trained["curves"]
    else:
        curves = fit(
            model, splits, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
            muon_lr=args.muon_lr, schedule=args.schedule, kl_warmup=args.kl_warmup, seed=args.seed,
            precision=args.precision, path=out / "checkpoint.pt", resume=args.resume,
            run={"script": "q2a", "args": settings(args)},
        )  # fmt: skip

    # 3. Bounds on all of validation and test, and as many images of train. Written before the figures are drawn.
    metrics = describe_run("q2a", args, data.describe(), model) | {"curves": curves}
    metrics["finished"] = trained is None or trained["finished"]
    terms = evaluate_splits(model, splits)
    metrics["final"] = {name: in_bits(of_split, 3072) for name, of_split in terms.items()}
    write_metrics(out, args, metrics)
    print(f"test: -ELBO {metrics['final']['test']['neg_elbo_bpd']:.4f} bits/dim, on all images")

    # 4. Figures and checks. One that fails is named in the report, and costs no other; the exit status is then 1.
    failed: dict[str, str] = {}
    if args.data == "synthetic":
        with attempt("a bound above its floor", failed):  # the floor is below the entropy: -log P(image | its scene)
            floor = synthetic_floor(splits, terms["test"].neg_elbo)
            metrics["floor"] = floor
            check_above(floor["excess_bpd"], floor["excess_se_bpd"])
    title = f"2a: standard normal prior, {data.name}"
    with attempt("curves.png", failed):
        if trained:
            plot_curves(curves, "the training of the checkpoint", out / "curves.png")
        else:
            name = f"{title}\ntest −ELBO {metrics['final']['test']['neg_elbo_bpd']:.3f} bits/dim"
            plot_curves(curves, name, out / "curves.png", metrics.get("floor"))
    with torch.no_grad():
        draw_figures(model, splits["test"], title, out, args.samples, failed)
    with attempt("the error of one draw", failed):  # from a second draw for 1,000 images
        metrics["test_draw_se_bpd"] = error_of_one_draw(model, splits["test"], terms["test"].neg_elbo)
    with attempt("the check of the prior", failed):  # against autograd's Jacobian: 0 up to rounding
        metrics["check_prior_nats"] = check_prior(model.prior)
    with attempt("codecs", failed):
        metrics["test_codecs_bpd"] = {codec: codec_bits_per_dim(splits["test"][:1000], codec) for codec in CODECS}

    # 5. Report.
    write_metrics(out, args, metrics | {"failed": failed})
    write_report(out, report(metrics), failed)


if __name__ == "__main__" and not pasted_into_cell():
    launch(main)
