"""The README's picture, from checkpoints on synthetic images: `front.py results` -> results/published/front.png.

Above: 1A, 1B, test images over three draws of the bonus from each one's code. Below: samples of 2a and 2b, same noise.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import core  # noqa: E402
import q1a  # noqa: E402
import q1b  # noqa: E402
from tools import codec  # noqa: E402

COLUMNS = 6


def plane_model(path, hidden, activation):
    model = core.VAE(*(core.GaussianMLP(hidden, activation) for _ in range(2)), core.StandardNormal((2,)))
    core.load_trained(model, path)
    return model


def draw_1a(ax, folder):
    model = plane_model(folder / "q1a" / "data2_diagonal.pt", q1a.HIDDEN, nn.SiLU)
    test = core.split_points("data2", q1a.make_points("data2"), 1).splits["test"][:1500]
    x, mean = model.sample(1500, core.fixed_noise("samples"))
    for points, colour, size, label in ((test, "0.75", 8, "data"), (x, "C0", 4, "samples"), (mean, "C1", 4, "µ(z)")):
        ax.scatter(*points.numpy().T, linewidths=0, color=colour, s=size, label=label)
    ax.set(title="1A: a line of points", aspect="equal", xticks=[], yticks=[], xlabel="x₁", ylabel="x₂")
    ax.legend(fontsize=8, markerscale=3)


def draw_1b(ax, folder):
    model = plane_model(folder / "q1b" / "diagonal.pt", q1b.HIDDEN, nn.ReLU)
    points, labels = q1b.make_points()
    z = model.posterior(torch.from_numpy(points[:5000]).float(), core.fixed_noise("codes"))[0]
    for label, colour in enumerate(q1b.COLOURS):
        ax.scatter(*z.numpy()[labels[:5000] == label].T, s=4, linewidths=0, color=colour)
    ax.set(title="1B: codes of three clusters", aspect="equal", xticks=[], yticks=[], xlabel="z₁", ylabel="z₂")


def draw_images(ax, title, images):
    rows = F.pad(images, (1, 1, 1, 1), value=255).unflatten(0, (-1, COLUMNS)).permute(0, 3, 1, 4, 2)
    ax.imshow(rows.flatten(2, 3).flatten(0, 1).numpy(), interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[], frame_on=False)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="holds q1a, q1b, q2a, q2b and bonus")
    folder = parser.parse_args().results
    plt.rc("axes", titlesize=10)
    fig, axes = plt.subplots(2, 3, figsize=(9.2, 6.4), layout="constrained")
    draw_1a(axes[0, 0], folder)
    draw_1b(axes[0, 1], folder)
    model, args = codec.load_model(folder / "bonus")  # of synthetic images: others are not ours to show
    test = core.load_images("synthetic", "", args.limit, args.seed).splits["test"][: COLUMNS**2]
    codes, _ = model.encoder(core.bin_centres(test[:COLUMNS]))
    draws = [model.draw_levels(codes, "pixels", k) for k in (1, 2, 3)]
    draw_images(axes[0, 2], "bonus: images, draws from their codes", torch.cat([test[:COLUMNS], *draws]))
    draw_images(axes[1, 0], "test images", test)
    titles = {"q2a": "2a: samples, prior N(0, I)", "q2b": "2b: samples, flow prior"}
    for ax, (script, title) in zip(axes[1, 1:], titles.items(), strict=True):
        x, _ = codec.load_model(folder / script)[0].sample(COLUMNS**2, core.fixed_noise("samples"))
        draw_images(ax, title, core.quantise(x))
    core.save_figure(fig, ROOT / "results" / "published" / "front.png")


if __name__ == "__main__":
    main()
