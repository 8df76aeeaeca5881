"""Question 1A: when does a VAE put information into its code?

Four VAEs: data with independent coordinates (data1) and the same data turned by 45 degrees (data2), each with a decoder
N(mu(z), diag sigma(z)^2) (diagonal) and a decoder N(mu(z), sigma(z)^2 I) (isotropic). z is 2-D, p(z) = N(0, I).

    -ELBO = KL(q(z|x) || p(z)) + E_q[-log p(x|z)]  >=  -log p(x)

    python q1a.py  ->  results/q1a/report.md
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Ellipse
from torch import Tensor, nn

import core
from core import VAE, GaussianMLP, StandardNormal, bits_per_dim

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


def least_kl(covariance: np.ndarray, decoder: str) -> float:
    """The least KL, nats, of models whose bound touches the floor.
    The decoder's noise can have any diagonal (or isotropic) covariance D with covariance - D >= 0; the code makes up
    the rest. The KL is then I(x; z) = 1/2 ln(det covariance / det D), least where det D is largest. Isotropic: D is the
    smallest eigenvalue times I. Diagonal, in 2-D: the data's variances times 1 - r, with r = |correlation|."""
    short, long = np.linalg.eigvalsh(covariance)
    r = abs(covariance[0, 1]) / math.sqrt(covariance[0, 0] * covariance[1, 1])
    return 0.5 * math.log(long / short if decoder == "isotropic" else (1 + r) / (1 - r))


@torch.no_grad()
def use_of_code(model: VAE, x: Tensor, covariance: np.ndarray) -> dict:
    """Is z used, and for what? Each latent's KL; what another point's z costs; the decoder's mean stds; r^2 of the
    latent of larger KL with the data's long and short axis. x [N, 2]; draws of z: a collapsed posterior's mean can be
    linear in x."""
    z, mu, log_std = model.posterior(x, core.fixed_noise("codes"))
    kl_i = 0.5 * (mu**2 + torch.exp(2 * log_std) - 1) - log_std  # (N, 2), nats
    cost = bits_per_dim(model.log_p_x(x, z) - model.log_p_x(x, z.roll(1, 0)), 2)
    axes = torch.from_numpy(np.linalg.eigh(covariance)[1]).flip(1).to(x)
    latent = z.index_select(1, kl_i.mean(0).argmax().view(1))  # (N, 1)
    both = torch.cat([latent, x @ axes], 1)
    both = (both - both.mean(0)) / both.std(0)
    return {
        "kl_per_latent_bits": bits_per_dim(kl_i.mean(0), 1).tolist(),
        "shuffling_costs_bpd": cost.mean().item(),
        "shuffling_costs_se_bpd": core.standard_error(cost),
        "decoder_stds": model.decoder(z)[1].exp().mean(0).tolist(),
        "axes_r2": ((both[:, :1] * both[:, 1:]).mean(0) ** 2).tolist(),
    }


def measure(model: VAE, data_name: str, decoder_name: str, test: Tensor) -> dict:
    """What the report says of one model; test [N, 2]."""
    covariance, floor = true_covariance(data_name), true_neg_log_prob(data_name, test.cpu())
    return {
        **core.bounds_of_points(model, test, floor),
        "least_kl_bpd": bits_per_dim(least_kl(covariance, decoder_name), 2),
        **use_of_code(model, test, covariance),
    }


def answer(name: str, f: dict) -> str:
    """A line of the report: whether this model uses its code, and whether it has to."""
    cost, se = f["shuffling_costs_bpd"], f["shuffling_costs_se_bpd"]
    used = "uses its code" if cost > max(0.05, 4 * se) else "hardly uses its code"
    need = f"a KL of {f['least_kl_bpd']:.3f} or more" if f["least_kl_bpd"] else "no code"
    return (
        f"- `{name}` **{used}**: with another point's z the decoder term rises by {cost:.3f} ± {se:.3f} bits/dim. To "
        f"reach the floor takes {need}."
    )


def report(metrics: dict) -> str:
    """The deliverables in the handout's order, every number from metrics."""
    final, data, curves = metrics["final"], metrics["data"]["data1"], metrics["curves"].values()

    def two_cells(values: list[float]) -> str:  # an isotropic decoder has one std for both
        return " | ".join(f"{v:.3f}" for v in (values * 2)[:2])

    rows = "\n".join(
        f"| {name} | {core.with_error(f, 'neg_elbo')} | {f['kl_bpd']:.4f} | {f['recon_bpd']:.4f} "
        f"| {f['floor_bpd']:.4f} | {core.with_error(f, 'excess')} |"
        for name, f in final.items()
    )
    columns = ("kl_per_latent_bits", "axes_r2", "decoder_stds")
    experiments = "\n".join(f"| {name} | {' | '.join(two_cells(f[k]) for k in columns)} |" for name, f in final.items())
    highest = max(f["excess_bpd"] for f in final.values())
    return f"""# 1A: when does a VAE put information into its code?

Four VAEs, {metrics["args"]["epochs"]} epochs each on {data["train"]:,} points, trained in
{sum(curve["seconds"] for curve in curves):.0f} s on {metrics["env"]["device"]}. In bits/dim on {data["test"]:,} test
points, ± one standard error over them, unless a column says otherwise.

## 1. Loss curves and final losses

**On test, all four models are at most {highest:.4f} bits/dim above the true density** (last column, paired by point).

| model | −ELBO | KL term | decoder term | floor: true density | −ELBO − floor |
|---|---|---|---|---|---|
{rows}

![curves](curves.png)

Floor: the true density's mean −log p(x) on the same points. A bound falls below it only by sampling error. The KL is in
closed form, the decoder term the mean over 64 draws of z per point; the ± includes their error (at most
{max(f["neg_elbo_mc_se_bpd"] for f in final.values()):.5f}). Curves: one draw for
each of the first points of a split. Weights: the best on validation, of epochs
{", ".join(f"{curve['best_epoch']:.1f}" for curve in curves)}.

## 2. Samples

![samples](samples.png)

µ(z), of the same z, is near one point where the code is unused, a line along the long axis where it is used.

## 3. Is the code used, how do we know, and what does it capture?

**A code is used where the decoder's noise cannot have the data's shape.** data1 has stds {STD[0]:g} and {STD[1]:g}
along the axes, data2 is data1 turned by 45 degrees. Diagonal noise can have data1's shape; the other
three models need z for the long axis: log₂ {STD[0] / STD[1]:g} bits per point.

{chr(10).join(answer(name, f) for name, f in final.items())}

A code counts as used if another point's z costs over 0.05 bits/dim and over four standard errors.

![evidence](evidence.png)

Above: the colour is the encoder's mean of the latent with the larger KL; one colour throughout: unused. Below,
of 12 draws z ~ p(z): µ(z) as a dot, ± σ(z) as an ellipse.

| model | KL of z₁, bits | of z₂ | r²: long axis | short axis | decoder's std of x₁ | of x₂ |
|---|---|---|---|---|---|---|
{experiments}

r²: of draws of the latent of larger KL with the data's axes. A used z is the place along the long axis; at the floor
its r² is 1 − ({STD[1]:g} / {STD[0]:g})². Which latent it is, and its sign, are arbitrary.
"""


def plot_samples(samples: dict[str, tuple[Tensor, Tensor]], tests: dict[str, Tensor], final: dict, path: Path) -> None:
    """For each model: the data, x ~ p(x|z) and mu(z) for the same z ~ p(z), with equal axes."""
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.6), sharex=True, sharey=True, layout="constrained")
    for ax, (name, (x, mean)) in zip(axes.flat, samples.items(), strict=True):
        ax.scatter(*tests[name][: len(x)].numpy().T, s=5, linewidths=0, color="0.75", label="test data")
        ax.scatter(*x.numpy().T, s=2, linewidths=0, color="C0", label="x ~ p(x|z)")
        ax.scatter(*mean.numpy().T, s=2, linewidths=0, color="C1", label="µ(z), no decoder noise")
        ax.set(xlabel="x₁", ylabel="x₂", aspect="equal")
        ax.set_title(f"{name}\n−ELBO {final[name]['neg_elbo_bpd']:.4f} bits/dim", fontsize=10)
    axes[0, 0].legend(fontsize=8, markerscale=3)
    core.save_figure(fig, path)


@torch.no_grad()
def plot_evidence(models: dict[str, VAE], tests: dict[str, Tensor], final: dict, path: Path) -> None:
    """Above: test points, coloured by the latent of the larger KL. Below: mu(z) and sigma(z) at draws z ~ p(z)."""
    fig, axes = plt.subplots(2, 4, figsize=(11, 5.4), sharex=True, sharey=True, layout="constrained")
    for (above, below), (name, model) in zip(axes.T, models.items(), strict=True):
        x, kl = tests[name][:3000], final[name]["kl_per_latent_bits"]
        latent = int(np.argmax(kl))
        colours = model.encoder(x)[0][:, latent].numpy()
        shown = above.scatter(*x.numpy().T, c=colours, s=3, linewidths=0, vmin=-3, vmax=3)
        above.set_title(f"{name}\nKL of z{'₁₂'[latent]}: {kl[latent]:.2f} bits", fontsize=10)
        mu, log_std = model.decoder(model.prior.sample(12, core.fixed_noise("ellipses")))
        below.scatter(*x.numpy().T, s=3, linewidths=0, color="0.85")
        for centre, std in zip(mu, log_std.exp().expand(-1, 2), strict=True):
            below.add_patch(Ellipse(centre.tolist(), *(2 * std).tolist(), fill=False, color="C0", lw=1))
        below.scatter(*mu.numpy().T, s=12, color="C1", zorder=3)
        for ax in (above, below):
            ax.set(xlabel="x₁", aspect="equal", xlim=(-17, 19), ylim=(-15, 19))
    axes[0, 0].set_ylabel("test points\nx₂")
    axes[1, 0].set_ylabel("12 draws of z ~ p(z)\nx₂")
    plt.colorbar(shown, ax=axes[0], label="encoder's mean of that latent")
    core.save_figure(fig, path)


def main(argv: list[str] | None = None) -> None:
    args, out = core.parse_args(core.Parser("q1a"), argv, DEFAULTS, SMOKE, file="data1_diagonal.pt")
    device, _ = core.choose_machine(args.device, threads=1)  # the networks are too small to share out

    # 1. Data.
    sets = {
        name: core.split_points(name, make_points(name)[: 5000 if args.smoke else None], args.batch_size)
        for name in TURN
    }
    lock = core.claim(out, args.resume)

    # 2. Four trainings, and what is measured of each model.
    recipe = core.Recipe(args.epochs, args.batch_size, args.lr, seed=args.seed)
    about = {"script": "q1a", "args": vars(args)}
    curves, final, models, tests = {}, {}, {}, {}
    for data_name, data in sets.items():
        splits = {k: x.to(device) for k, x in data.splits.items()}
        for decoder_name, num_log_stds in DECODERS.items():
            name = f"{data_name}_{decoder_name}"
            torch.manual_seed(args.seed)
            encoder, decoder = GaussianMLP(HIDDEN, nn.SiLU), GaussianMLP(HIDDEN, nn.SiLU, num_log_stds)
            model = VAE(encoder, decoder, StandardNormal((2,))).to(device)
            curves[name] = core.fit(model, splits, recipe, out / f"{name}.pt", about, args.resume, name)
            final[name] = measure(model, data_name, decoder_name, splits["test"])
            models[name], tests[name] = model.cpu(), data.splits["test"]
    described = {name: data.describe() for name, data in sets.items()}
    metrics = core.describe_run("q1a", args, described, device, "fp32", *models.values())
    metrics |= {"curves": curves, "final": final}
    core.write_results(out, metrics)

    # 3. Figures and report.
    x = tests[name][: curves[name]["examples"]]  # of any model: all have one floor
    floor = bits_per_dim(true_neg_log_prob(data_name, x).mean().item(), 2)
    floors = {name: {"test: true density": floor} for name in curves}
    core.plot_curves(curves, floors, "1A", out / "curves.png")
    samples = {name: model.sample(3000, core.fixed_noise("samples")) for name, model in models.items()}
    plot_samples(samples, tests, final, out / "samples.png")
    plot_evidence(models, tests, final, out / "evidence.png")
    core.write_results(out, metrics, report(metrics))
    if any(f["excess_bpd"] < -4 * f["excess_se_bpd"] for f in final.values()):
        raise ValueError("a bound is 4 standard errors below its floor")
    lock.release(force=True)


if __name__ == "__main__" and not core.pasted_into_cell():
    core.launch(main)
