"""Question 1A: when does a VAE put information into its code?

Four VAEs: data with independent coordinates (data1) and the same data turned by 45 degrees (data2), each with a decoder
N(mu(z), diag sigma(z)^2) (diagonal) and a decoder N(mu(z), sigma(z)^2 I) (isotropic). z is 2-D, p(z) = N(0, I).

    -ELBO = KL(q(z|x) || p(z)) + E_q[-log p(x|z)]  >=  -log p(x)

    python q1a.py            ->  results/q1a/report.md
    python q1a.py --seeds 5  ->  the same, with mean and standard deviation over five seeds
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

from core import (  # before torch, whose import reads what core has set
    VAE, GaussianMLP, Parser, StandardNormal, attempt, bits_per_dim, check_above, describe_run, draw_curves,
    evaluate, evaluate_points, fit, fixed_noise, gives_folders_back, in_bits, iwae, launch,
    normal_log_prob, number, parse_args, pasted_into_cell, prepare, save_checkpoint, save_figure, seeds_table,
    settings, split_points, standard_error, sum_dims, write_metrics, write_report,
)  # fmt: skip

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Ellipse
from torch import Tensor, nn

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


def true_neg_log_prob(data: str, x: Tensor) -> Tensor:
    """-log p(x) of the true density at each point: the floor under any negative ELBO. [N, 2] -> [N], nats."""
    mean, covariance = torch.from_numpy(MEAN), torch.from_numpy(true_covariance(data))
    return -torch.distributions.MultivariateNormal(mean, covariance).log_prob(x.double())


def least_code(covariance: np.ndarray, decoder: str) -> tuple[list[float], float]:
    """Of the models whose bound touches the floor, the one with the least KL: its decoder's stds, and its KL in nats.

    The decoder's noise can have any diagonal (or isotropic) covariance D with covariance - D >= 0; the code makes up
    the rest. The KL is then I(x; z) = 1/2 ln(det covariance / det D), least where det D is largest. Isotropic: D is the
    smallest eigenvalue times I. Diagonal, in 2-D: the data's variances times 1 - |correlation|.
    """
    variances = np.diag(covariance)
    d = variances * (1 - abs(covariance[0, 1]) / math.sqrt(variances.prod()))
    if decoder == "isotropic":
        d = np.linalg.eigvalsh(covariance)[:1]
    det_d = np.broadcast_to(d, 2).prod()
    return np.sqrt(d).tolist(), max(0.0, 0.5 * math.log(np.linalg.det(covariance) / det_d))


def information_bounds(z: Tensor, mu: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds on I(x; z), what z tells about x, from M examples and one z ~ q(z|x) each; [M], nats.

    log q(z_m|x_m) - log q(z_m), with q(z_m) estimated by the mean of q(z_m|x_j) over all j (in expectation a lower
    bound, never above log M) or over all j but m (an upper bound): Poole et al. 2019, arXiv:1905.06922, section 2.
    z, mu, log_std: [M, ...]. With q(z) the aggregated posterior, KL = I + KL(q(z) || p(z)) (Hoffman & Johnson 2016).
    """
    z, mu, log_std = (t.flatten(1).cpu().double() for t in (z, mu, log_std))  # mps has no float64
    own, precision, rows = normal_log_prob(z, mu, log_std), torch.exp(-2 * log_std), []
    constant = -sum_dims(0.5 * mu**2 * precision + log_std + 0.5 * math.log(2 * math.pi))
    for i in torch.arange(len(z)).split(1000):
        each = z[i] @ (mu * precision).T - 0.5 * z[i] ** 2 @ precision.T + constant  # (some, M): log q(z_m|x_j)
        each[torch.arange(len(i)), i] = -math.inf
        rows.append(torch.logsumexp(each, 1))
    others = torch.cat(rows)
    everyone = torch.logaddexp(others, own)
    return own - everyone + math.log(len(z)), own - others + math.log(len(z) - 1)


@torch.no_grad()
def look_into_code(model: VAE, x: Tensor, log_p: Tensor) -> dict[str, Any]:
    """Experiments on test points x [N, 2] that say whether z is used; log_p [N] is the true log density, nats.

    The KL of each latent; the decoder term with z from q(z|x), from another point's q, and from p(z); bounds on
    I(x; z); the decoder's stds; IWAE-64 above the truth.
    """
    generator = fixed_noise("codes")
    z, mu, log_std = model.posterior(x, generator)
    kl_i = 0.5 * (mu**2 + torch.exp(2 * log_std) - 1) - log_std  # (N, 2), nats
    sources = {"posterior": z, "shuffled": z.roll(1, 0), "prior": model.prior.sample(len(x), generator)}
    recon = {name: -model.log_p_x(x, from_there) for name, from_there in sources.items()}
    cost = bits_per_dim(recon["shuffled"] - recon["posterior"], 2)
    few = slice(0, 4000)
    information = information_bounds(z[few], mu[few], log_std[few])
    log_w = torch.stack([-evaluate(model, x[few], seed=100 + k).neg_elbo for k in range(64)])
    gap = bits_per_dim(log_p[few] - iwae(log_w), 2)
    return {
        "kl_per_latent_bits": bits_per_dim(kl_i.mean(0), 1).tolist(),
        **{f"recon_z_{name}_bpd": bits_per_dim(r.mean().item(), 2) for name, r in recon.items()},
        "shuffling_costs_bpd": cost.mean().item(), "shuffling_costs_se_bpd": standard_error(cost),
        "information_bpd": [bits_per_dim(bound.mean().item(), 2) for bound in information],
        "information_se_bpd": bits_per_dim(standard_error(information[0]), 2),
        "kl_same_points_bpd": bits_per_dim(kl_i[few].sum(1).mean().item(), 2),
        "decoder_stds": model.decoder(z)[1].exp().mean(0).tolist(),
        "neg_iwae64_minus_floor_bpd": gap.mean().item(), "neg_iwae64_minus_floor_se_bpd": standard_error(gap),
    }  # fmt: skip


@torch.no_grad()
def explained_variance(model: VAE, x: Tensor, covariance: np.ndarray) -> dict[str, float]:
    """R^2 of the linear regression of the data's coordinates along its long and short axis on one z ~ q(z|x) each.

    On z, not on its mean: a collapsed posterior's mean can be exactly linear in x and be far smaller than its noise.
    """
    axes = torch.from_numpy(np.linalg.eigh(covariance)[1]).flip(1)  # columns: long axis, short axis
    along = x.cpu().double() @ axes  # (N, 2)
    z, _, _ = model.posterior(x, fixed_noise("codes"))
    inputs = torch.cat([z.cpu().double(), torch.ones(len(z), 1)], 1)  # (N, 3)
    residual = along - inputs @ torch.linalg.lstsq(inputs, along).solution
    r2 = 1 - residual.var(0) / along.var(0)
    return {"long_axis_r2": r2[0].item(), "short_axis_r2": r2[1].item()}


def measure(model: VAE, data_name: str, decoder_name: str, test: Tensor) -> dict[str, Any]:
    """All that the report says of one model, on the test points [N, 2]."""
    terms, of_draws = evaluate_points(model, test)
    floor, covariance = true_neg_log_prob(data_name, test.cpu()), true_covariance(data_name)
    stds, least_kl = least_code(covariance, decoder_name)
    return {
        **in_bits(terms, 2),
        "neg_elbo_mc_se_bpd": bits_per_dim(of_draws, 2),
        "floor_bpd": bits_per_dim(floor.mean().item(), 2),
        "neg_elbo_minus_floor_se_bpd": bits_per_dim(standard_error(terms.neg_elbo - floor), 2),
        "least_kl_bpd": bits_per_dim(least_kl, 2),
        "floor_stds": stds,
        **look_into_code(model, test, -floor),
        **explained_variance(model, test, covariance),
    }


def answer(name: str, f: dict[str, Any]) -> str:
    """A line of the report: whether this model uses its code, for what, and whether it has to."""
    cost, se = f["shuffling_costs_bpd"], f["shuffling_costs_se_bpd"]
    used = cost > max(0.05, 4 * se)
    axes = {"long": f["long_axis_r2"], "short": f["short_axis_r2"]}
    what = " and ".join(f"the {axis} axis ({r2:.1%} of its variance)" for axis, r2 in axes.items() if r2 > 0.1)
    fit_on_z = f"A linear fit on z explains {what or 'none of the axes'}. " if used else ""
    can = "can" if f["least_kl_bpd"] < 0.05 else "cannot"
    return (
        f"- `{name}` **{'uses its code' if used else 'does not use its code'}**: with another point's z the decoder "
        f"term rises by {cost:.3f} ± {se:.3f} bits/dim. {fit_on_z}The decoder alone {can} fit the data: to reach the "
        f"floor takes a KL of {f['least_kl_bpd']:.3f} or more."
    )


def report(metrics: dict[str, Any]) -> str:
    """The deliverables in the handout's order, every number from metrics."""
    final, data, curves = metrics["final"], metrics["data"]["data1"], metrics["curves"].values()
    rows = "\n".join(
        f"| {name} | {f['neg_elbo_bpd']:.4f} ± {f['neg_elbo_se_bpd']:.4f} | {f['kl_bpd']:.4f} | {f['recon_bpd']:.4f} "
        f"| {f['floor_bpd']:.4f} | {f['neg_elbo_bpd'] - f['floor_bpd']:+.4f} ± {f['neg_elbo_minus_floor_se_bpd']:.4f} |"
        for name, f in final.items()
    )
    experiments = "\n".join(
        f"| {name} | {in_one_cell(f['kl_per_latent_bits'])} | {f['recon_z_posterior_bpd']:.3f} "
        f"| {f['recon_z_shuffled_bpd']:.3f} | {f['recon_z_prior_bpd']:.3f} | {in_one_cell(f['decoder_stds'])} "
        f"| {in_one_cell(f['floor_stds'])} |"
        for name, f in final.items()
    )
    estimates = "\n".join(
        f"| {name} | {f['kl_same_points_bpd']:.4f} | {in_one_cell(f['information_bpd'], 4)} "
        f"± {f['information_se_bpd']:.4f} | {f['least_kl_bpd']:.4f} | {f['long_axis_r2']:.3f} "
        f"| {f['short_axis_r2']:.3f} "
        f"| {f['neg_iwae64_minus_floor_bpd']:+.5f} ± {f['neg_iwae64_minus_floor_se_bpd']:.5f} |"
        for name, f in final.items()
    )
    highest = max(f["neg_elbo_bpd"] - f["floor_bpd"] for f in final.values())
    return f"""# 1A: when does a VAE put information into its code?

Four VAEs, {metrics["args"]["epochs"]} epochs each on {data["train"]:,} points, trained in
{sum(curve["seconds"] for curve in curves):.0f} s on {metrics["env"]["device"]}. Numbers are bits per dimension on the
{data["test"]:,} test points, ± one standard error over them, unless a column says otherwise.

## 1. Loss curves and final losses

**On test, all four models are at most {highest:.4f} bits/dim above the true density** (last column, paired by point).

| model | −ELBO | KL term | decoder term | floor: true density | −ELBO − floor |
|---|---|---|---|---|---|
{rows}

![curves](curves.png)

The floor is the true density's mean −log p(x) on the same test points; no bound lies under it but by chance. The KL is
in closed form, the decoder term the mean over 64 draws of z per point. Each ± contains the noise of these draws, whose
own standard error is {max(f["neg_elbo_mc_se_bpd"] for f in final.values()):.5f} at most. Curves show one draw for each
of the first points of a split. Training steps skipped, as loss or gradients were not finite:
{sum(curve["skipped_steps"] for curve in curves)}.

## 2. Samples

![samples](samples.png)

## 3. Is the code used, how do we know, and what does it capture?

{chr(10).join(answer(name, f) for name, f in final.items())}

![evidence](evidence.png)

How we know, by experiment on the same test points: a code counts as used if the decoder term rises by more than 0.05
bits/dim, and by four standard errors, with another point's z.

| model | KL of each latent, bits | decoder term, one z | another's z | z ~ p(z) | decoder stds | at the floor |
|---|---|---|---|---|---|---|
{experiments}

What the code holds: R² of a linear fit on z says which axis of the data it follows. KL (in closed form), I and IWAE
are of the first 4,000 test points. KL = I + KL(q(z) || p(z)), with q(z) the distribution of all points' codes. So I is
no larger than the KL (its estimate may be, within its error), and the closer the two, the closer q(z) is to the prior.

| model | KL | I(x; z), lower and upper bound | at the floor | long axis R² | short axis R² | −IWAE-64 − floor |
|---|---|---|---|---|---|---|
{estimates}

"At the floor" is computed from the data's covariance, for the *least* code. A decoder with less noise, and a code that
carries more, can touch the same floor. Which latent carries the code, and its sign, are arbitrary.
{seeds_table(metrics.get("seeds", {}), of_one_seed)}"""


def of_one_seed(f: dict[str, Any]) -> dict[str, float]:
    """What the report says of a model over several seeds, by column."""
    return {
        "−ELBO": f["neg_elbo_bpd"], "KL term": f["kl_bpd"], "decoder term": f["recon_bpd"],
        "−ELBO − floor": f["neg_elbo_bpd"] - f["floor_bpd"], "cost of another's z": f["shuffling_costs_bpd"],
    }  # fmt: skip


def in_one_cell(values: list[float], digits: int = 3) -> str:
    """Numbers, with commas between them."""
    return ", ".join(f"{v:.{digits}f}" for v in values)


def plot_samples(samples: dict[str, tuple[Tensor, Tensor]], tests: dict[str, Tensor], final: dict, path: Path) -> None:
    """For each model: the data, x ~ p(x|z) and mu(z) for the same z ~ p(z), with equal axes."""
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.5), sharex=True, sharey=True, layout="constrained")
    for ax, (name, (x, mean)) in zip(axes, samples.items(), strict=True):
        ax.scatter(*tests[name][: len(x)].numpy().T, s=5, linewidths=0, color="0.75", label="test data")
        ax.scatter(*x.numpy().T, s=2, linewidths=0, color="C0", label="x ~ p(x|z)")
        ax.scatter(*mean.numpy().T, s=2, linewidths=0, color="C1", label="µ(z), no decoder noise")
        ax.set(xlabel="x₁", ylabel="x₂", aspect="equal")
        ax.set_title(f"{name}\n−ELBO {final[name]['neg_elbo_bpd']:.4f} bits/dim", fontsize=10)
    axes[0].legend(fontsize=8, markerscale=3)
    save_figure(fig, path)


def plot_all_curves(curves: dict[str, Any], floors: dict[str, Any], final: dict[str, Any], path: Path) -> None:
    """The curves of the four models. floors: {model: {split: the true density on the curve's points, bits/dim}}."""
    fig, axes = plt.subplots(4, 3, figsize=(11, 12), sharex=True, layout="constrained")
    for row, (name, curve) in zip(axes, curves.items(), strict=True):
        draw_curves(row, curve)
        for line in list(row[0].lines):  # of train, validation and test
            row[0].axhline(floors[name][line.get_label()], color=line.get_color(), ls=":")
        row[0].set_ylim(bottom=min(row[0].get_ylim()[0], min(floors[name].values()) - 0.002))
        row[0].set_title(f"{name}: −ELBO, test {final[name]['neg_elbo_bpd']:.4f} bits/dim", fontsize=10)
    fig.suptitle("Dotted: −log p(x) of the true density, on the same points as the curve of that colour")
    save_figure(fig, path)


@torch.no_grad()
def plot_evidence(models: dict[str, VAE], tests: dict[str, Tensor], final: dict[str, Any], path: Path) -> None:
    """Above: test points, coloured by the latent of the larger KL. Below: mu(z) and sigma(z) at draws z ~ p(z)."""
    fig, axes = plt.subplots(2, 4, figsize=(17, 7.5), layout="constrained")
    for (above, below), (name, model) in zip(axes.T, models.items(), strict=True):
        x, kl = tests[name][:3000], final[name]["kl_per_latent_bits"]
        latent = int(np.argmax(kl))
        colours = model.encoder(x)[0][:, latent].numpy()
        shown = above.scatter(*x.numpy().T, c=colours, s=3, linewidths=0, cmap="viridis")
        plt.colorbar(shown, ax=above, label=f"mean of z{'₁₂'[latent]}", shrink=0.8)
        above.set_title(f"{name}\nz{'₁₂'[latent]} costs {kl[latent]:.2f} bits", fontsize=10)
        mu, log_std = model.decoder(model.prior.sample(12, fixed_noise("ellipses")))
        below.scatter(*x.numpy().T, s=3, linewidths=0, color="0.85")
        for centre, std in zip(mu, log_std.exp().expand(-1, 2), strict=True):
            below.add_patch(Ellipse(centre.tolist(), *(2 * std).tolist(), fill=False, color="C0", lw=1))
        below.scatter(*mu.numpy().T, s=12, color="C1", zorder=3)
        below.set_title("12 draws of z ~ p(z): µ(z) and ± σ(z)", fontsize=10)
        for ax in (above, below):
            ax.set(xlabel="x₁", ylabel="x₂", aspect="equal", xlim=(-17, 19), ylim=(-15, 19))
    fig.suptitle("Above: test points by the latent that costs most. Below: what the decoder makes of the prior")
    save_figure(fig, path)


def run(args: argparse.Namespace, out: Path, last: bool) -> dict[str, Any]:
    """All of 1A with one seed: trains, writes checkpoint, metrics, figures and report; returns the metrics."""
    described, tests, curves, floors, final, models = {}, {}, {}, {}, {}, {}
    sets = {name: split_points(name, make_points(name)[: 5000 if args.smoke else None]) for name in TURN}
    prepare(out, args, min(len(data.splits["train"]) for data in sets.values()))
    for data_name, data in sets.items():
        splits = {k: x.to(args.device) for k, x in data.splits.items()}
        described[data_name] = data.describe()
        for decoder_name, num_log_stds in DECODERS.items():
            name = f"{data_name}_{decoder_name}"
            torch.manual_seed(args.seed)
            encoder, decoder = GaussianMLP(HIDDEN, nn.SiLU), GaussianMLP(HIDDEN, nn.SiLU, num_log_stds)
            model = VAE(encoder, decoder, StandardNormal((2,))).to(args.device)
            curves[name] = fit(
                model, splits, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
                path=out / "progress" / f"{name}.pt", resume=args.resume, run={"args": settings(args)}, name=name,
            )  # fmt: skip
            final[name] = measure(model, data_name, decoder_name, splits["test"])
            models[name], tests[name] = model.cpu(), data.splits["test"]
            of_curve = {split: x[: curves[name]["examples"]] for split, x in data.splits.items()}
            truth = {split: true_neg_log_prob(data_name, x).mean().item() for split, x in of_curve.items()}
            floors[name] = {split: bits_per_dim(nats, 2) for split, nats in truth.items()}
    state = {name: model.state_dict() for name, model in models.items()}
    save_checkpoint(out / "checkpoint.pt", {"script": "q1a", "args": settings(args), "state": state})
    metrics = describe_run("q1a", args, described, *models.values()) | {"curves": curves, "final": final}
    write_metrics(out, args, metrics)

    failed: dict[str, str] = {}
    with attempt("bounds that can be true", failed):
        for f in final.values():
            check_above(f["neg_elbo_bpd"] - f["floor_bpd"], f["neg_elbo_minus_floor_se_bpd"])
    with attempt("curves.png", failed):
        plot_all_curves(curves, floors, final, out / "curves.png")
    with attempt("samples.png", failed), torch.no_grad():
        samples = {name: model.sample(3000, fixed_noise("samples")) for name, model in models.items()}
        plot_samples(samples, tests, final, out / "samples.png")
    with attempt("evidence.png", failed):
        plot_evidence(models, tests, final, out / "evidence.png")
    metrics["failed"] = failed
    write_metrics(out, args, metrics)
    write_report(out, report(metrics), failed, last)
    return metrics


@gives_folders_back()
def main(argv: list[str] | None = None) -> None:
    parser = Parser("q1a")
    parser.add_argument("--seeds", type=number(int, 1, 100), default=1, help="runs, from --seed on")
    args, out = parse_args(parser, argv, DEFAULTS, SMOKE)
    runs: dict[int, dict[str, Any]] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        one = argparse.Namespace(**{**vars(args), "seed": seed, "seeds": 1, "started": time.monotonic()})
        runs[seed] = run(one, out if seed == args.seed else out / f"seed_{seed}", last=args.seeds == 1)
    if args.seeds > 1:
        seeds = {seed: of_seed["final"] for seed, of_seed in runs.items()}
        missing = [(what, seed, why) for seed, of_seed in runs.items() for what, why in of_seed["failed"].items()]
        failed = {f"{what} (seed {seed})": why for what, seed, why in missing}
        metrics = runs[args.seed] | {"args": settings(args), "seeds": seeds, "failed": failed}
        write_metrics(out, args, metrics)
        write_report(out, report(metrics), failed)


if __name__ == "__main__" and not pasted_into_cell():
    launch(main)
