"""Question 1B: a VAE on a three-cluster set in the plane, its latent space, and the importance-weighted bound.

Two VAEs with 2-D z ~ N(0, I): decoder N(mu(z), diag sigma(z)^2) (diagonal) and N(mu(z), sigma(z)^2 I) (isotropic).

    ELBO = E[log w]  <=  IWAE-K = E[log (1/K) sum_k w_k]  <=  log p(x),    w_k = p(x, z_k) / q(z_k|x),  z_k ~ q(z|x)

    python q1b.py  ->  results/q1b/report.md
"""

import copy
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import core
from core import VAE, GaussianMLP, StandardNormal, bits_per_dim

CENTRES = ((-1.5, 2.5), (1.5, 2.5))  # two round clusters; the third is the arc (2 cos t, -sin t), t in [0, pi]
STD = 0.2
DECODERS = {"diagonal": 2, "isotropic": 1}  # how many log stds the decoder has
HIDDEN = (96, 96, 96)  # with ReLU: the map from one Gaussian to three clusters has sharp edges
SHORT_MUON_LR, MUON_LR = 0.02, 0.012  # peaks, between hidden layers; --lr is Adam's, for the rest
SHORT_KL_WARMUP = 0.5  # of the short run: while the KL's weight rises to 1
DEFAULTS = dict(epochs=50, batch_size=1000, lr=1.5e-3)
SMOKE = dict(epochs=2)
DRAWS_PER_POINT = 10_000  # of z, for each of the first 100 test points
COLOURS = ("#56b4e9", "#e69f00", "#000000")  # told apart in grey and by the colour-blind


def make_points() -> tuple[np.ndarray, np.ndarray]:
    """The handout's set: points [99999, 2] and labels [99999], which no training sees."""
    rand, n = np.random.RandomState(0), 100_000 // 3
    a, b = (np.array(centre) + STD * rand.randn(n, 2) for centre in CENTRES)
    t = np.linspace(0, np.pi, n)
    c = np.stack([2 * np.cos(t), -np.sin(t)], 1) + STD * rand.randn(n, 2)
    order = rand.permutation(3 * n)
    return np.concatenate([a, b, c])[order], np.repeat([0, 1, 2], n)[order]


def true_log_prob(x: Tensor, nodes: int = 1000) -> Tensor:
    """log p(x) of the density that made the set. [N, 2] -> [N], nats.
    A third each of two round normals and of one whose mean is (2 cos t, -sin t), t uniform on [0, pi]; over t by the
    midpoint rule, whose steps on the arc, at most 2 pi / 1000, are far below the noise's 0.2."""
    t = (torch.arange(nodes, dtype=torch.float64) + 0.5) * math.pi / nodes
    arc = torch.stack([2 * torch.cos(t), -torch.sin(t)], 1)
    means = torch.cat([torch.tensor(CENTRES, dtype=torch.float64), arc])  # (2 + nodes, 2)
    log_shares = torch.log(torch.tensor([1 / 3, 1 / 3] + [1 / (3 * nodes)] * nodes, dtype=torch.float64))
    chunks = []
    for some in x.cpu().double().split(2000):
        log_normal = -((some[:, None] - means) ** 2).sum(2) / (2 * STD**2) - math.log(2 * math.pi * STD**2)
        chunks.append(torch.logsumexp(log_normal + log_shares, 1))  # (some, 2 + nodes) -> (some,)
    return torch.cat(chunks)


def start_model() -> VAE:
    """The isotropic model of the short run, from whose end both models start.
    What the first epochs do with the clusters stays: one that they tear apart is never mended, and a diagonal decoder
    often lumps two together. So the short run charges for the code only gradually; and the decoder's weights from z2
    start at 0: z1 is used first, and the clusters come to lie side by side along z1. At a border of constant z1 the
    true posterior is nearly a product, as q(z|x) is."""
    model = VAE(GaussianMLP(HIDDEN, nn.ReLU), GaussianMLP(HIDDEN, nn.ReLU, 1), StandardNormal((2,)))
    with torch.no_grad():
        model.decoder.get_parameter("net.0.weight")[:, 1] = 0
    return model


def with_decoder(model: VAE, num_log_stds: int) -> VAE:
    """A copy of an isotropic model whose decoder has `num_log_stds` log stds, equal ones."""
    rows = [0, 1] + [2] * num_log_stds  # of mu and of the log std
    state = model.decoder.state_dict()
    last = [name for name, x in state.items() if len(x) == 3]  # the last layer's weight and bias
    decoder = GaussianMLP(HIDDEN, nn.ReLU, num_log_stds)
    decoder.load_state_dict(state | {name: state[name][rows] for name in last})
    return VAE(copy.deepcopy(model.encoder), decoder.to(next(iter(state.values())).device), model.prior)


def iwae(log_w: Tensor) -> Tensor:
    """The importance-weighted bound log (1/K) sum_k w_k on log p(x). log_w [K, ...] -> [...], nats.
    log_w = log p(x, z_k) - log q(z_k|x), z_k ~ q(z|x). K = 1 is the ELBO (Burda et al. 2016, arXiv:1509.00519)."""
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


@torch.no_grad()
def log_weights(model: VAE, x: Tensor, draws: int) -> Tensor:
    """log w = log p(x, z) - log q(z|x), for thousands of draws z ~ q(z|x). x [N, 2] -> [draws, N], nats."""
    mu, log_std = model.encoder(x)
    rows = []
    for k in range(draws // 1000):
        eps = core.noise(torch.randn, (1000, len(x), 2), x.device, core.fixed_noise("log w", k))
        z = (mu + torch.exp(log_std) * eps).flatten(0, 1)
        log_p = (model.log_p_x(x.repeat(1000, 1), z) + model.prior.log_prob(z)).view(1000, -1)
        log_q = (-0.5 * eps**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(2)  # as (z - mu) / std = eps
        rows.append((log_p - log_q).cpu().double())
    return torch.cat(rows)


def with_errors(name: str, groups: Tensor) -> dict[str, float]:
    """The mean over N points of their estimates, each the mean over G groups of draws. groups [G, N], nats -> bits/dim.
    se is the error over points, that of the draws included; mc_se that of the draws: sqrt(sum_n s_n^2 / G) / N,
    s_n^2 the variance of a point's groups."""
    bits = bits_per_dim(groups, 2)
    of_draws = (bits.var(0).sum() / len(bits)).sqrt().item() / bits.shape[1]
    mean = bits.mean().item()
    return {f"{name}_bpd": mean, f"{name}_se_bpd": core.standard_error(bits.mean(0)), f"{name}_mc_se_bpd": of_draws}


def negative_bounds(model: VAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """-ELBO and -IWAE-100 of points x [N, 2], estimated from each 100 draws of z: both [draws / 100, N], nats."""
    log_w = log_weights(model, x, DRAWS_PER_POINT).unflatten(0, (-1, 100)).transpose(0, 1)  # (100, draws / 100, N)
    return -log_w.mean(0), -iwae(log_w)


def compare_bounds(model: VAE, diagonal: VAE, x: Tensor) -> dict:
    """Both bounds of points x [N, 2], their distances from the diagonal model's and the true density; bits/dim."""
    (neg_elbo, neg_iwae), of_diagonal = (negative_bounds(one, x) for one in (model, diagonal))
    floor = -true_log_prob(x)
    return {
        **with_errors("neg_elbo", neg_elbo),
        **with_errors("neg_iwae100", neg_iwae),
        **with_errors("elbo_gap", neg_elbo - neg_iwae),
        **with_errors("neg_iwae100_minus_floor", neg_iwae - floor),
        **with_errors("neg_elbo_minus_diagonal", neg_elbo - of_diagonal[0]),
        **with_errors("neg_iwae100_minus_diagonal", neg_iwae - of_diagonal[1]),
        "floor_bpd": bits_per_dim(floor.mean().item(), 2),
    }


@torch.no_grad()
def describe_codes(model: VAE, x: Tensor, labels: np.ndarray) -> tuple[np.ndarray, dict]:
    """One z ~ q(z|x) of each point [N, 2]; the KL of each latent; each label's range of z1 and decoder stds."""
    z, mu, log_std = model.posterior(x, core.fixed_noise("codes"))
    kl_i = 0.5 * (mu**2 + torch.exp(2 * log_std) - 1) - log_std  # (N, 2), nats
    codes, stds = z.cpu().numpy(), model.decoder(z)[1].exp().cpu().numpy()
    of_labels = []
    for mine in (labels[: len(x)] == label for label in range(3)):
        z1, median = np.quantile(codes[mine, 0], (0.025, 0.975)), np.median(stds[mine], 0)
        of_labels.append({"z1": z1.tolist(), "decoder_stds": median.tolist()})
    return codes, {"kl_per_latent_bits": bits_per_dim(kl_i.mean(0), 1).tolist(), "of_labels": of_labels}


def report(metrics: dict) -> str:
    """The deliverables in the handout's order, every number from metrics."""
    final, data, curves = metrics["final"], metrics["data"], metrics["curves"].values()
    bounds = "\n".join(
        f"| {name} | {split} | {core.with_error(f, 'neg_elbo')} | {f['kl_bpd']:.4f} | {f['recon_bpd']:.4f} "
        f"| {f['floor_bpd']:.4f} | {core.with_error(f, 'excess')} |"
        for name in final
        for split in core.SPLITS
        for f in [final[name][split]]
    )
    first = {name: f["first100"] for name, f in final.items()}
    iwae_rows = "\n".join(
        f"| {name} | {core.with_error(f, 'neg_elbo')} | {core.with_error(f, 'neg_iwae100')} "
        f"| {core.with_error(f, 'elbo_gap')} | {f['floor_bpd']:.4f} | {core.with_error(f, 'neg_iwae100_minus_floor')} |"
        for name, f in first.items()
    )
    latent_rows = "\n".join(
        f"| {name} | {label} | {one['z1'][0]:+.2f} to {one['z1'][1]:+.2f} "
        f"| {' | '.join(f'{v:.3f}' for v in (one['decoder_stds'] * 2)[:2])} |"
        for name, f in final.items()
        for label, one in enumerate(f["of_labels"])
    )
    kl = {name: " and ".join(f"{v:.2f}" for v in f["kl_per_latent_bits"]) for name, f in final.items()}
    diagonal, isotropic = first["diagonal"], first["isotropic"]
    return f"""# 1B: three clusters in the plane

Two VAEs, {metrics["args"]["epochs"]} epochs each on {data["train"]:,} points, trained in
{sum(curve["seconds"] for curve in curves):.0f} s on {metrics["env"]["device"]}, the short run before them included.
In bits/dim, ± one standard error over points.

## 1. Loss curves and final losses

**On test, the diagonal model is {final["diagonal"]["test"]["excess_bpd"]:.3f} and the isotropic one
{final["isotropic"]["test"]["excess_bpd"]:.3f} bits/dim above the true density** (last column, paired by point).

| model | split | −ELBO | KL term | decoder term | floor: true density | −ELBO − floor |
|---|---|---|---|---|---|---|
{bounds}

![curves](curves.png)

Floor: −log p(x) of the density that made the data, on the same points. The KL is in closed form, the decoder term the
mean over 64 draws of z per point; the ± includes their error. Train: as many points as test has. The weights kept are
the best on validation. Curves: one draw of z for each of the first points. Both models start from one short run of an
isotropic model, in which the KL's weight rises from 0 to 1 and the clusters come to lie side by side.

## 2. Samples

![samples](samples.png)

Right, without noise: where µ(z) is a thin line, noise makes the cluster's width; where it fills the cluster, z does.

## 3. Latents of training data

**z₁ and z₂ cost {kl["diagonal"]} bits in the diagonal model, {kl["isotropic"]} in the isotropic one.** Labels 0 and 1
are the round clusters, 2 is the arc; z₁ tells apart those whose ranges do not overlap. The clusters' own std is {STD};
where a decoder has less noise, z makes the rest of their spread.

| model | label | 95 % of its z₁ | decoder's median std of x₁ | of x₂ |
|---|---|---|---|---|
{latent_rows}

![latents](latents.png)

Dots: z ~ q(z|x) of training points, coloured by their labels; circles: 1, 2 and 3 prior stds. The panels look alike,
as all codes together follow the prior, whether z₂ is used or not. The prior's mass between
the strips is no point's code: it decodes to the gaps between the clusters, which a continuous decoder has to cross.

## 4. The first 100 test points: IWAE with 100 samples against the ELBO

**IWAE-100 is the tighter bound, by {diagonal["elbo_gap_bpd"]:.4f} (diagonal) and {isotropic["elbo_gap_bpd"]:.4f}
(isotropic) bits/dim.** Isotropic minus diagonal, paired by point, is
{core.with_error(isotropic, "neg_elbo_minus_diagonal")} by −ELBO and
{core.with_error(isotropic, "neg_iwae100_minus_diagonal")} by −IWAE-100; the rest is the ELBO's looseness.

| model | −ELBO (IWAE-1) | −IWAE-100 | their difference | floor: true density | −IWAE-100 − floor |
|---|---|---|---|---|---|
{iwae_rows}

Both bounds use the same {DRAWS_PER_POINT:,} samples of z for each point: the ELBO is the mean of log w, IWAE-100 the
log of the mean of 100 weights. The more a point's weights differ, the looser is the ELBO. The ± includes the error of
the draws.
"""


def plot_samples(samples: dict[str, tuple[Tensor, Tensor]], x_test: Tensor, path: Path) -> None:
    """For each model: test data, x ~ p(x|z) and mu(z) for the same z ~ p(z)."""
    fig, axes = plt.subplots(2, 3, figsize=(11, 7), sharex=True, sharey=True, layout="constrained")
    for row, (name, (x, mean)) in zip(axes, samples.items(), strict=True):
        panels = {"test data": x_test[: len(x)], "x ~ p(x|z)": x, "µ(z), no decoder noise": mean}
        for ax, (label, xy) in zip(row, panels.items(), strict=True):
            ax.scatter(*xy.cpu().numpy().T, s=2, linewidths=0, color="C0")
            ax.set(xlabel="x₁", ylabel="x₂", aspect="equal", xlim=(-3.2, 3.2), ylim=(-2.2, 3.7))
            ax.set_title(f"{name}: {label}")
    core.save_figure(fig, path)


def plot_latents(latents: dict[str, np.ndarray], labels: np.ndarray, path: Path) -> None:
    """z ~ q(z|x) of training points, coloured by label, over circles of the prior."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.6), sharex=True, sharey=True, layout="constrained")
    for ax, (name, z) in zip(axes, latents.items(), strict=True):
        for label, colour in enumerate(COLOURS):
            codes = z[labels[: len(z)] == label]
            ax.scatter(*codes.T, s=2, linewidths=0, color=colour, label=f"label {label}")
        for radius in (1, 2, 3):
            ax.add_patch(plt.Circle((0, 0), radius, fill=False, color="0.5", lw=0.8))
        ax.set(title=f"{name} decoder", xlabel="z₁", ylabel="z₂", aspect="equal")
    axes[0].legend(markerscale=5, fontsize=8)
    core.save_figure(fig, path)


def main(argv: list[str] | None = None) -> None:
    args, out = core.parse_args(core.Parser("q1b"), argv, DEFAULTS, SMOKE, file="short_run.pt")
    device, _ = core.choose_machine(args.device, threads=1)  # the networks are too small to share out

    # 1. Data, and the true density of the points that are measured.
    points, labels = make_points()
    data = core.split_points("three clusters", points[:5000] if args.smoke else points, args.batch_size)
    splits = {k: x.to(device) for k, x in data.splits.items()}
    measured = {k: x[: len(splits["test"])] for k, x in splits.items()}
    floors = {k: -true_log_prob(x) for k, x in measured.items()}
    lock = core.claim(out, args.resume)

    # 2. The short run, two trainings from where it ends, and what is measured of both models.
    about = {"script": "q1b", "args": vars(args)}
    short = core.Recipe(
        max(1, args.epochs // 5), args.batch_size, args.lr, SHORT_MUON_LR, kl_warmup=SHORT_KL_WARMUP, seed=args.seed
    )
    recipe = core.Recipe(args.epochs, args.batch_size, args.lr, MUON_LR, seed=args.seed)
    torch.manual_seed(args.seed)
    start = start_model().to(device)
    curves = {"short run": core.fit(start, splits, short, out / "short_run.pt", about, args.resume, "short run")}
    latents, models, final = {}, {}, {}
    for name, num_log_stds in DECODERS.items():
        model = models[name] = with_decoder(start, num_log_stds)
        curves[name] = core.fit(model, splits, recipe, out / f"{name}.pt", about, args.resume, name)
        bounds = {k: core.bounds_of_points(model, x, floors[k]) for k, x in measured.items()}
        latents[name], of_codes = describe_codes(model, splits["train"][:10_000], labels)
        first = compare_bounds(model, models["diagonal"], splits["test"][:100])
        final[name] = {**bounds, "first100": first, **of_codes}
    metrics = core.describe_run("q1b", args, data.describe(), device, "fp32", *models.values())
    metrics |= {"curves": curves, "final": final}
    core.write_results(out, metrics)

    # 3. Figures and report.
    of_curves = {name: floors["test"][: curve["examples"]].mean().item() for name, curve in curves.items()}
    truth = {name: {"test: true density": bits_per_dim(nats, 2)} for name, nats in of_curves.items()}
    core.plot_curves(curves, truth, "1B", out / "curves.png")
    samples = {name: model.sample(5000, core.fixed_noise("samples")) for name, model in models.items()}
    plot_samples(samples, data.splits["test"], out / "samples.png")
    plot_latents(latents, labels, out / "latents.png")
    core.write_results(out, metrics, report(metrics))
    if any(f["test"]["excess_bpd"] < -4 * f["test"]["excess_se_bpd"] for f in final.values()):
        raise ValueError("a bound is 4 standard errors below its floor")
    lock.release(force=True)


if __name__ == "__main__" and not core.pasted_into_cell():
    core.launch(main)
