"""The README's picture, from the checkpoints of a folder of results on synthetic images.

    python tests/tools/front.py results  ->  results/published/front.png

Above: 1A's data and samples, 1B's latents, test images under three draws of the bonus from each one's code. Below: test
images, samples of 2a and of 2b from the same noise.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import bonus  # noqa: E402
import core  # noqa: E402
import q1a  # noqa: E402
import q1b  # noqa: E402

SHOWN_1A, COLUMNS = "data2_diagonal", 6


def load(folder, script):
    return core.read_checkpoint(folder / script / "checkpoint.pt", ("args", "state"), script)


def draw_1a(ax, saved):
    data, decoder = SHOWN_1A.split("_")
    encoder = core.GaussianMLP(q1a.HIDDEN, nn.SiLU)
    model = core.VAE(encoder, core.GaussianMLP(q1a.HIDDEN, nn.SiLU, q1a.DECODERS[decoder]), core.StandardNormal((2,)))
    model.load_state_dict(saved["state"][SHOWN_1A])
    test = core.split_points(data, q1a.make_points(data)).splits["test"]
    x, mean = model.sample(1500, core.fixed_noise("samples"))
    for points, style in (
        (test[:1500], dict(color="0.75", s=8)),
        (x, dict(color="C0", s=4)),
        (mean, dict(color="C1", s=4)),
    ):
        ax.scatter(*points.numpy().T, linewidths=0, **style)
    ax.set(title="1A: data, samples, µ(z)", aspect="equal", xticks=[], yticks=[])


def draw_1b(ax, saved):
    decoder = core.GaussianMLP(q1b.HIDDEN, nn.ReLU, q1b.DECODERS["diagonal"])
    model = core.VAE(core.GaussianMLP(q1b.HIDDEN, nn.ReLU), decoder, core.StandardNormal((2,)))
    model.load_state_dict(saved["state"]["diagonal"])
    points, labels = q1b.make_points()
    z = model.posterior(torch.from_numpy(points[:5000]).float(), core.fixed_noise("codes"))[0]
    for label, colour in enumerate(q1b.COLOURS):
        ax.scatter(*z.numpy()[labels[:5000] == label].T, s=4, linewidths=0, color=colour)
    for radius in (1, 2, 3):
        ax.add_patch(plt.Circle((0, 0), radius, fill=False, color="0.5", lw=0.8))
    ax.set(title="1B: latents of three clusters", aspect="equal", xticks=[], yticks=[])


def image_model(folder, script):
    """The script's trained model; its images were synthetic, so that they may be shown."""
    saved = load(folder, script)
    args = argparse.Namespace(**saved["args"])
    if args.data != "synthetic":
        core.fail(f"{folder / script}: of {args.data}, whose images are not ours to show; use a run on synthetic")
    priors = {"q2a": core.StandardNormal, "q2b": core.FlowPrior}
    model = bonus.make_model(args) if script == "bonus" else core.ImageVAE(args.latents, priors[script])
    model.load_state_dict(saved["state"])
    return model.eval(), args


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="holds q1a, q1b, q2a, q2b and bonus")
    folder = parser.parse_args().results
    fig, axes = plt.subplots(2, 3, figsize=(9.2, 6.6), layout="constrained")
    with torch.no_grad():
        draw_1a(axes[0, 0], load(folder, "q1a"))
        draw_1b(axes[0, 1], load(folder, "q1b"))
        model, args = image_model(folder, "bonus")
        args.evaluate = None
        test = core.load_images(args).splits["test"]
        shown = test[:COLUMNS]
        codes = model.encoder(core.bin_centres(shown))[0]
        draws = [model.draw_levels(codes, "pixels", k) for k in (1, 2, 3)]
        images = {
            axes[0, 2]: ("bonus: images, 3 drawn from z each", torch.cat([shown, *draws])),
            axes[1, 0]: ("test images", test[: COLUMNS * COLUMNS]),
        }
        for ax, script, name in ((axes[1, 1], "q2a", "2a: samples, N(0, I)"), (axes[1, 2], "q2b", "2b: samples, flow")):
            x, _ = image_model(folder, script)[0].sample(COLUMNS * COLUMNS, core.fixed_noise("samples"))
            images[ax] = (name, core.quantise(x))
    for ax, (title, panel) in images.items():
        ax.imshow(core.tiled(panel, COLUMNS), interpolation="nearest")
        ax.set_axis_off()
        ax.set_title(title)
    core.save_figure(fig, ROOT / "results/published/front.png")


if __name__ == "__main__":
    main()
