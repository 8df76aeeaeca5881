"""Question 2a: a convolutional VAE on SVHN with a standard normal prior.

    p(z) = N(0, I) over 8 x 8 positions,   q(z|x) = N(mu(x), diag sigma(x)^2),   p(x|z) = N(mu(z), diag sigma(z)^2)

    -log P(image) <= E_u[KL(q(z|x) || p(z)) + E_q[-log p(x|z)]] + 3072 ln 128,  x = (levels + u) / 128 - 1, u ~ U[0, 1)

The right side bounds the code length of the 8-bit image in nats; divided by 3072 ln 2 it is in bits/dim. In the reports
3072 ln 128 is part of the decoder term. Each image has one u and one z, from which the KL is estimated too, as in 2b.

    python q2a.py --epochs 20                  ->  results/q2a/report.md, on SVHN (downloaded)
    python q2a.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
"""

import torch

import core
from core import ImageVAE, StandardNormal

DEFAULTS = dict(epochs=20, latents=16, data="svhn")
SMOKE = dict(epochs=1, limit=48, latents=4, data="synthetic")


def report(metrics: dict) -> str:
    """The handout's deliverables in its order, every number from metrics."""
    return f"""# 2a: a convolutional VAE with a standard normal prior

{core.bounds_text(metrics)}

## 2. Samples

![samples](samples.png)

z ~ p(z). Left: µ(z), the decoder's mean; right: x ~ p(x|z) of the same z. In an image's code the 64 positions of z
depend on each other; N(0, I) draws them independently: patches that do not fit together.

## 3. Interpolations

![interpolations](interpolations.png)

True test images at both ends; between them µ(z) on a straight line between their codes' means: a fade.

## Reconstructions

![reconstructions](reconstructions.png)

From above: test images; µ(z) at the posterior's mean z; x ~ p(x|z) of the same z. z keeps shapes and colours, not each
pixel's noise. The decoder draws that for each colour by itself, so it is coloured; in the images it is nearly grey.
Codecs predict a pixel from its neighbours and colours from each other; here, given z, each is coded by itself.
"""


def main(argv: list[str] | None = None) -> None:
    args, out = core.parse_args(core.Parser("q2a", images=True), argv, DEFAULTS, SMOKE)
    device, precision = core.choose_machine(args.device, args.precision)

    # 1. Data and model.
    data = core.load_images(args.data, args.data_root, args.limit, args.seed, only_test=bool(args.evaluate))
    splits = {name: x.to(device) for name, x in data.splits.items()}
    test = splits["test"]
    torch.manual_seed(args.seed)
    model = ImageVAE(args.latents, StandardNormal).to(device).to(memory_format=torch.channels_last)

    # 2. Training; or, with --evaluate, an earlier training's weights.
    args, recipe = core.image_recipe(args, len(splits["train"]), precision)
    about = {"script": "q2a", "args": vars(args)}
    lock = core.claim(out, args.resume)
    if args.evaluate:
        curves = core.load_trained(model, args.evaluate)
    else:
        curves = core.fit(model, splits, recipe, out / "checkpoint.pt", about, args.resume)

    # 3. Bounds, the check of the prior, lossless codecs.
    _, measured = core.measure_images(model, splits)
    metrics = core.describe_run("q2a", args, data.describe(), device, precision, model)
    metrics |= {"curves": curves} | measured
    core.write_results(out, metrics)

    # 4. Figures and report.
    core.plot_image_curves(metrics, "2a: standard normal prior", out)
    core.draw_image_figures(model, test, out, args.samples)
    core.write_results(out, metrics, report(metrics))
    lock.release(force=True)


if __name__ == "__main__" and not core.pasted_into_cell():
    core.launch(main)
