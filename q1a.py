"""Question 1A: when does a VAE put information into its code?

Four VAEs: data with independent coordinates (data1) and the same data turned by 45 degrees (data2), each with a decoder
N(mu(z), diag sigma(z)^2) (diagonal) and a decoder N(mu(z), sigma(z)^2 I) (isotropic). z is 2-D, p(z) = N(0, I).

    -ELBO = KL(q(z|x) || p(z)) + E_q[-log p(x|z)]  >=  -log p(x)

    python q1a.py        ->  results/q1a/report.md
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
    in_notebook, parse_args, save_figure, split_points, write_results,
)  # fmt: skip

MEAN = np.array([1.0, 2.0])
STD = np.array([5.0, 1.0])
TURN = {"data1": np.eye(2), "data2": np.array([[1, 1], [-1, 1]]) * math.sqrt(2) / 2}  # x = mean + (randn * std) @ turn
DECODERS = {"diagonal": 2, "isotropic": 1}  # how many log stds the decoder has
HIDDEN = (64, 64)
DEFAULTS = dict(epochs=10, batch_size=500, lr=1e-2)
SMOKE = dict(epochs=2)


def make_points(data: str) -> np.ndarray:
    """The handout's 100,000 points of data1 or data2, [100000, 2]."""
    return MEAN + (np.random.RandomState(0).randn(100_000, 2) * STD) @ TURN[data]


def true_covariance(data: str) -> np.ndarray:
    """turn^T diag(std^2) turn, [2, 2]."""
    return TURN[data].T @ np.diag(STD**2) @ TURN[data]


def cross_entropy(data: str, x: Tensor) -> Tensor:
    """-log p(x) of the true density at each point: the floor under any negative ELBO. [N, 2] -> [N], nats."""
    mean, covariance = torch.from_numpy(MEAN), torch.from_numpy(true_covariance(data))
    return -torch.distributions.MultivariateNormal(mean, covariance).log_prob(x.double())


def least_kl(covariance: np.ndarray, decoder: str) -> float:
    """The least KL, nats, at which the bound can touch the floor: 1/2 ln(det covariance / det noise).

    The decoder's noise can be any diagonal (or any isotropic) matrix D with covariance - D >= 0, as the code must make
    up the rest; the KL is then the information I(x; z), least for the D of largest determinant. Isotropic: D is the
    smallest eigenvalue times I. Diagonal, in 2-D: d2 follows from d1 by det(covariance - D) = 0, and d1 by search.
    """
    (a, b), (_, c) = covariance
    if decoder == "isotropic":
        det_noise = np.linalg.eigvalsh(covariance)[0] ** 2
    elif abs(b) < 1e-9:
        det_noise = a * c
    else:
        d1 = np.linspace(0, a - b**2 / c, 100_001)
        det_noise = (d1 * (c - b**2 / (a - d1))).max()
    return max(0.0, 0.5 * math.log(np.linalg.det(covariance) / det_noise))


@torch.no_grad()
def explained_variance(model: VAE, x: Tensor, covariance: np.ndarray) -> dict[str, float]:
    """R^2 of the linear regression of the data's coordinates along its long and short axis on one z ~ q(z|x) each.

    On z, not on its mean: a collapsed posterior's mean can be exactly linear in x and still drown in the noise.
    """
    axes = torch.from_numpy(np.linalg.eigh(covariance)[1]).flip(1)  # columns: long axis, short axis
    along = x.cpu().double() @ axes  # (N, 2)
    mu, log_std = model.encoder(x)
    z = mu + torch.exp(log_std) * Noise.fixed(torch.arange(len(x), device=x.device), seed=2).normal(2)
    inputs = torch.cat([z.cpu().double(), torch.ones(len(z), 1)], 1)  # (N, 3)
    residual = along - inputs @ torch.linalg.lstsq(inputs, along).solution
    r2 = 1 - residual.var(0) / along.var(0)
    return {"long_axis_r2": r2[0].item(), "short_axis_r2": r2[1].item()}


def answer(name: str, final: dict[str, float]) -> str:
    """Whether this model uses its code, and for what, from its KL and what z explains of the data."""
    kl, least, gap = final["kl_bpd"], final["least_kl_bpd"], final["neg_elbo_bpd"] - final["floor_bpd"]
    used = "uses its code" if kl >= 0.05 else "does not use its code"
    if least < 0.05:
        why = "the decoder's noise alone can have the shape of the data, and the bound touch the floor with no code"
    else:
        why = (
            "the decoder's noise cannot have the shape of the data; at the floor, a code has to make up the difference"
        )
    shares = f"{final['long_axis_r2']:.1%} of the variance along the data's long axis (std {STD.max():g}) and "
    shares += f"{final['short_axis_r2']:.1%} along the short one (std {STD.min():g})"
    return (
        f"- `{name}` **{used}**: the KL, which bounds from above what z tells about x, is {kl:.3f} bits/dim. "
        f"A linear fit on z explains {shares}. Least KL at the floor: {least:.3f}, as {why}. "
        f"This run is {gap:+.4f} ± {final['neg_elbo_minus_floor_se_bpd']:.4f} from the floor."
    )


def write_report(metrics: dict[str, Any]) -> str:
    """The deliverables in the handout's order, every number from metrics."""
    final, data = metrics["final"], metrics["data"]["data1"]
    rows = "\n".join(
        f"| {name} | {f['neg_elbo_bpd']:.4f} ± {f['neg_elbo_se_bpd']:.4f} | {f['kl_bpd']:.4f} | {f['recon_bpd']:.4f} "
        f"| {f['floor_bpd']:.4f} | {f['least_kl_bpd']:.4f} |"
        for name, f in final.items()
    )
    return f"""# 1A: when does a VAE put information into its code?

Four VAEs, {metrics["args"]["epochs"]} epochs each on {data["train"]:,} points, {metrics["seconds"]:.0f} s in all on
{metrics["env"]["device"]}. All numbers are bits per dimension, on the {data["test"]:,} test points, ± one standard
error over them.

## 1. Loss curves and final losses

![curves](curves.png)

| model | −ELBO | KL term | decoder term | floor: true density | least KL at the floor |
|---|---|---|---|---|---|
{rows}

The floor is the true density's mean −log p(x) on the same test points; no bound lies under it but by chance.

## 2. Samples

![samples](samples.png)

## 3. Is the code used, how do we know, and what does it capture?

{chr(10).join(answer(name, f) for name, f in final.items())}
"""


def plot_samples(samples: dict[str, tuple[Tensor, Tensor]], points: dict[str, Tensor], final: dict, path: Any) -> None:
    """For each model: the data, x ~ p(x|z) and mu(z) for the same z ~ p(z), with equal axes."""
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.5), sharex=True, sharey=True)
    for ax, (name, (x, mean)) in zip(axes, samples.items(), strict=True):
        for xy, label, style in (
            (points[name.split("_")[0]][: len(x)], "test data", dict(color="0.75", s=5)),
            (x, "x ~ p(x|z)", dict(color="C0", s=2)),
            (mean, "µ(z), no decoder noise", dict(color="C1", s=2)),
        ):
            ax.scatter(*xy.cpu().T, label=label, linewidths=0, **style)
        ax.set(xlabel="x₁", ylabel="x₂", aspect="equal")
        ax.set_title(f"{name}\n−ELBO {final[name]['neg_elbo_bpd']:.4f} bits/dim", fontsize=10)
    axes[0].legend(fontsize=8, markerscale=3)
    save_figure(fig, path)


def main(argv: list[str] | None = None) -> None:
    args, out = parse_args("q1a", argv, DEFAULTS, SMOKE)
    start, curves, final, described, samples, tests, state, params = time.perf_counter(), {}, {}, {}, {}, {}, {}, 0
    for data_name in TURN:
        points = make_points(data_name)
        data = split_points(data_name, points[:5000] if args.smoke else points)
        splits = {k: x.to(args.device) for k, x in data.splits.items()}
        described[data_name], tests[data_name] = data.describe(), data.splits["test"]
        for decoder_name, num_log_stds in DECODERS.items():
            name = f"{data_name}_{decoder_name}"
            print(f"{name}:")
            torch.manual_seed(args.seed)
            encoder, decoder = GaussianMLP(HIDDEN, nn.SiLU), GaussianMLP(HIDDEN, nn.SiLU, num_log_stds)
            model = VAE(encoder, decoder, StandardNormal((2,))).to(args.device)
            curves[name] = fit(model, splits, args)
            covariance, terms = true_covariance(data_name), evaluate(model, splits["test"])
            floor = cross_entropy(data_name, tests[data_name])
            final[name] = {
                **in_bits(terms, 2),
                "floor_bpd": bits_per_dim(floor.mean().item(), 2),
                "neg_elbo_minus_floor_se_bpd": bits_per_dim(
                    (terms.neg_elbo - floor).std().item() / len(floor) ** 0.5, 2
                ),
                "least_kl_bpd": bits_per_dim(least_kl(covariance, decoder_name), 2),
                **explained_variance(model, splits["test"], covariance),
            }
            with torch.no_grad():
                samples[name] = model.sample(Noise.fixed(torch.arange(3000, device=args.device), seed=1))
            state[name], params = model.cpu().state_dict(), params + sum(p.numel() for p in model.parameters())
    fig, axes = plt.subplots(4, 3, figsize=(11, 12), sharex=True)
    for row, (name, curve) in zip(axes, curves.items(), strict=True):
        draw_curves(row, curve, final[name]["floor_bpd"])
        row[0].set_title(f"{name}: −ELBO, test {final[name]['neg_elbo_bpd']:.4f} bits/dim", fontsize=10)
    save_figure(fig, out / "curves.png")
    plot_samples(samples, tests, final, out / "samples.png")
    metrics = {**describe_run("q1a", args, described, params, start), "curves": curves, "final": final}
    write_results(out, metrics, write_report(metrics), state)


if __name__ == "__main__" and not in_notebook():
    main()
