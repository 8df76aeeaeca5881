"""Question 1B: a VAE on a three-cluster set in the plane, its latent space, and the importance-weighted bound.

Two VAEs with 2-D z ~ N(0, I): decoder N(mu(z), diag sigma(z)^2) (diagonal) and N(mu(z), sigma(z)^2 I) (isotropic).

    ELBO = E[log w]  <=  IWAE-K = E[log (1/K) sum_k w_k]  <=  log p(x),    w_k = p(x, z_k) / q(z_k|x),  z_k ~ q(z|x)

    python q1b.py        ->  results/q1b/report.md
"""

import math
import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from core import (
    VAE, GaussianMLP, Noise, StandardNormal, bits_per_dim, describe_run, draw_curves, evaluate, fit, in_bits,
    in_notebook, iwae, parse_args, save_figure, split_points, write_results,
)  # fmt: skip

CENTRES = {
    "a": (-1.5, 2.5),
    "b": (1.5, 2.5),
}  # two round clusters; the third is the arc (2 cos t, -sin t), t in [0, pi]
STD = 0.2
DECODERS = {"diagonal": 2, "isotropic": 1}  # how many log stds the decoder has
HIDDEN = (128, 128, 128)
DEFAULTS = dict(epochs=80, batch_size=250, lr=5e-3)
SMOKE = dict(epochs=2)
WARMUP = 0.2  # fraction of training over which the KL's weight rises to 1; every reported bound has weight 1
COLOURS = ("#0072b2", "#e69f00", "#000000")  # of the labels 0, 1, 2: told apart in grey and by the colour-blind


def make_points() -> tuple[np.ndarray, np.ndarray]:
    """The handout's set: points [99999, 2] and labels [99999], which serve pictures only."""
    rand, n = np.random.RandomState(0), 100_000 // 3
    a, b = (np.array(centre) + STD * rand.randn(n, 2) for centre in CENTRES.values())
    t = np.linspace(0, np.pi, n)
    c = np.stack([2 * np.cos(t), -np.sin(t)], 1) + STD * rand.randn(n, 2)
    order = rand.permutation(3 * n)
    return np.concatenate([a, b, c])[order], np.repeat([0, 1, 2], n)[order]


def true_log_prob(x: Tensor, nodes: int = 1000) -> Tensor:
    """log p(x) of the density that made the set. [N, 2] -> [N], nats.

    One third each of two round normals and of a normal whose mean runs evenly over the arc; the integral over the arc
    by the midpoint rule, whose step pi / 1000 is far below the noise's 0.2.
    """
    t = (torch.arange(nodes, dtype=torch.float64) + 0.5) * math.pi / nodes
    arc = torch.stack([2 * torch.cos(t), -torch.sin(t)], 1)
    means = torch.cat([torch.tensor(list(CENTRES.values()), dtype=torch.float64), arc])  # (2 + nodes, 2)
    log_weights = torch.log(torch.tensor([1 / 3, 1 / 3] + [1 / (3 * nodes)] * nodes, dtype=torch.float64))
    chunks = []
    for some in x.double().split(2000):
        log_normal = -((some[:, None] - means) ** 2).sum(2) / (2 * STD**2) - math.log(2 * math.pi * STD**2)
        chunks.append(torch.logsumexp(log_normal + log_weights, 1))  # (some, 2 + nodes) -> (some,)
    return torch.cat(chunks)


def mean_and_se(name: str, nats: Tensor) -> dict[str, float]:
    """The mean over examples and its standard error, in bits/dim. nats [N]."""
    bits = bits_per_dim(nats, 2)
    return {f"{name}_bpd": bits.mean().item(), f"{name}_se_bpd": bits.std().item() / math.sqrt(len(bits))}


def compare_bounds(model: VAE, x: Tensor, num_samples: int = 100) -> dict[str, float]:
    """ELBO and IWAE of the points x [N, 2] from the same samples of z: the ELBO averages log w, IWAE averages w."""
    log_w = torch.stack([-evaluate(model, x, seed=1000 + k).neg_elbo for k in range(num_samples)])  # (K, N)
    neg_elbo, neg_iwae = -log_w.mean(0), -iwae(log_w)
    gain = mean_and_se("gain", neg_elbo - neg_iwae)
    floor = bits_per_dim(-true_log_prob(x.cpu()).mean().item(), 2)
    over = mean_and_se("neg_iwae100_minus_floor", neg_iwae + true_log_prob(x.cpu()))
    return {
        **mean_and_se("neg_elbo", neg_elbo), **mean_and_se(f"neg_iwae{num_samples}", neg_iwae), **gain, **over,
        "floor_bpd": floor,
    }  # fmt: skip


def write_report(metrics: dict[str, Any]) -> str:
    """The deliverables in the handout's order, every number from metrics."""
    final, data = metrics["final"], metrics["data"]

    def row(name: str, split: str) -> str:
        f = final[name][split]
        floor = f"{f['floor_bpd']:.4f}" if "floor_bpd" in f else ""
        bound = f"{f['neg_elbo_bpd']:.4f} ± {f['neg_elbo_se_bpd']:.4f}"
        return f"| {name} | {split} | {bound} | {f['kl_bpd']:.4f} | {f['recon_bpd']:.4f} | {floor} |"

    bounds = "\n".join(row(name, split) for name in final for split in ("train", "test"))
    first = "\n".join(
        f"| {name} | {f['neg_elbo_bpd']:.4f} ± {f['neg_elbo_se_bpd']:.4f} | {f['neg_iwae100_bpd']:.4f} ± "
        f"{f['neg_iwae100_se_bpd']:.4f} | {f['gain_bpd']:.4f} ± {f['gain_se_bpd']:.4f} | {f['floor_bpd']:.4f} |"
        for name, f in ((name, final[name]["first100"]) for name in final)
    )
    gaps = {name: final[name]["test"]["neg_elbo_bpd"] - final[name]["test"]["floor_bpd"] for name in final}
    stds = {name: f["decoder_std"] for name, f in final.items()}
    anisotropy = stds["diagonal"]["median_ratio"]
    return f"""# 1B: three clusters in the plane

Two VAEs, {metrics["args"]["epochs"]} epochs each on {data["train"]:,} points, {metrics["seconds"]:.0f} s in all on
{metrics["env"]["device"]}. All numbers are bits per dimension, ± one standard error over examples.

## 1. Loss curves and final losses

![curves](curves.png)

| model | split | −ELBO | KL term | decoder term | floor: true density |
|---|---|---|---|---|---|
{bounds}

The floor is −log p(x) of the density that made the data, by quadrature along the arc, on the same points. On test the
bounds lie {gaps["diagonal"]:.4f} (diagonal) and {gaps["isotropic"]:.4f} (isotropic) above it. Training weighted the KL
from 0 to 1 over the first {WARMUP:.0%}; every reported bound has weight 1.

## 2. Samples

![samples](samples.png)

## 3. Latents of training data

![latents](latents.png)

Each point is one z ~ q(z|x) of a training point, coloured by its label; the circles hold 39 %, 86 % and 99 % of the
prior. The KL is {final["diagonal"]["test"]["kl_bpd"]:.2f} (diagonal) and {final["isotropic"]["test"]["kl_bpd"]:.2f}
(isotropic) bits/dim. The two models differ in what the decoder's noise can do alone. The
median ratio of the larger to the smaller decoder std at a point is {anisotropy:.2f} for the diagonal decoder, and 1 for
the isotropic one by construction; the medians of the stds themselves are {stds["diagonal"]["median_std"]:.3f} and
{stds["isotropic"]["median_std"]:.3f}, where the data's own noise has {STD}. A bound near the floor needs the three
clusters to fill the prior side by side: the gaps between them are latents that decode to no data.

## 4. The first 100 test points: IWAE with 100 samples against the ELBO

| model | −ELBO (IWAE-1) | −IWAE-100 | difference, paired | floor: true density |
|---|---|---|---|---|
{first}

Both bounds use the same 100 samples of z for each point: the ELBO is the mean of log w, the IWAE objective the log of
the mean of w, so it is the larger for every point by Jensen's inequality, and nearer to log p(x) of the model.
"""


def plot_samples(samples: dict[str, tuple[Tensor, Tensor]], x_test: Tensor, final: dict, path: Any) -> None:
    """For each model: test data, x ~ p(x|z) and mu(z) for the same z ~ p(z), with equal axes."""
    fig, axes = plt.subplots(2, 3, figsize=(11, 8), sharex=True, sharey=True)
    for row, (name, (x, mean)) in zip(axes, samples.items(), strict=True):
        panels = {"test data": x_test[: len(x)], "x ~ p(x|z)": x, "µ(z), no decoder noise": mean}
        for ax, (label, xy) in zip(row, panels.items(), strict=True):
            ax.scatter(*xy.cpu().T, s=2, linewidths=0, color="C0")
            ax.set(
                title=f"{name}: {label}", xlabel="x₁", ylabel="x₂", aspect="equal", xlim=(-3.2, 3.2), ylim=(-2.2, 3.7)
            )
    test = {name: f["test"] for name, f in final.items()}
    fig.suptitle("; ".join(f"{name}: test −ELBO {f['neg_elbo_bpd']:.3f} bits/dim" for name, f in test.items()))
    save_figure(fig, path)


def plot_latents(latents: dict[str, Tensor], labels: np.ndarray, final: dict, path: Any) -> None:
    """z ~ q(z|x) of training points, coloured by label, over circles of the prior."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.6), sharex=True, sharey=True)
    for ax, (name, z) in zip(axes, latents.items(), strict=True):
        for label, colour in enumerate(COLOURS):
            ax.scatter(*z.cpu()[labels[: len(z)] == label].T, s=2, linewidths=0, color=colour, label=f"label {label}")
        for radius in (1, 2, 3):
            ax.add_patch(plt.Circle((0, 0), radius, fill=False, color="0.5", lw=0.8))
        kl = final[name]["train"]["kl_bpd"]
        ax.set(title=f"{name} decoder, KL {kl:.3f} bits/dim", xlabel="z₁", ylabel="z₂", aspect="equal")
    axes[0].legend(markerscale=5, fontsize=8)
    save_figure(fig, path)


@torch.no_grad()
def look_at_decoder(model: VAE, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """One z ~ q(z|x) for each point, [N, 2], and the decoder's stds there: their median, and how unequal they are."""
    mu, log_std = model.encoder(x)
    z = mu + torch.exp(log_std) * Noise.fixed(torch.arange(len(x), device=x.device), seed=2).normal(2)
    log_std_x = model.decoder(z)[1]
    ratio = torch.exp(log_std_x.max(1).values - log_std_x.min(1).values)
    return z, {"median_std": log_std_x.exp().median().item(), "median_ratio": ratio.median().item()}


def main(argv: list[str] | None = None) -> None:
    args, out = parse_args("q1b", argv, DEFAULTS, SMOKE)
    start, params = time.perf_counter(), 0
    points, labels = make_points()
    data = split_points("three clusters", points[:5000] if args.smoke else points)
    splits = {k: x.to(args.device) for k, x in data.splits.items()}
    floor = bits_per_dim(-true_log_prob(data.splits["test"]).mean().item(), 2)
    curves, final, samples, latents, state = {}, {}, {}, {}, {}
    for name, num_log_stds in DECODERS.items():
        print(f"{name}:")
        torch.manual_seed(args.seed)
        encoder, decoder = GaussianMLP(HIDDEN, nn.ReLU), GaussianMLP(HIDDEN, nn.ReLU, num_log_stds)
        model = VAE(encoder, decoder, StandardNormal((2,)), latent_shape=(2,)).to(args.device)
        curves[name] = fit(model, splits, args, WARMUP)
        final[name] = {split: in_bits(evaluate(model, splits[split]), 2) for split in ("train", "test")}
        final[name]["test"]["floor_bpd"] = floor
        final[name]["first100"] = compare_bounds(model, splits["test"][:100])
        latents[name], final[name]["decoder_std"] = look_at_decoder(model, splits["train"][:10_000])
        with torch.no_grad():
            samples[name] = model.sample(Noise.fixed(torch.arange(5000, device=args.device), seed=1))
        state[name], params = model.state_dict(), params + sum(p.numel() for p in model.parameters())
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.4), sharex=True)
    for row, (name, curve) in zip(axes, curves.items(), strict=True):
        draw_curves(row, curve, floor)
        row[0].set_title(f"{name}: −ELBO, test {final[name]['test']['neg_elbo_bpd']:.4f} bits/dim", fontsize=10)
    save_figure(fig, out / "curves.png")
    plot_samples(samples, data.splits["test"], final, out / "samples.png")
    plot_latents(latents, labels, final, out / "latents.png")
    metrics = {**describe_run("q1b", args, data.describe(), params, start), "curves": curves, "final": final}
    write_results(out, metrics, write_report(metrics), state)


if __name__ == "__main__" and not in_notebook():
    main()
