"""Question 2b: the VAE of 2a with an autoregressive flow as its prior, and nothing else different.

    z = f(eps):  z_i = t_i(z_<i) + exp(s_i(z_<i)) eps_i,  i over the 8 x 8 positions in raster order
                 with s and t from a shallow PixelCNN
    log p(z) = log N(eps; 0, I) + log |det d eps / d z| = log N(eps; 0, I) - sum_i s_i

(arXiv:1611.02731, equations 12 to 14). Same encoder, decoder, loss, seed and batches as 2a; the flow starts as the
identity, so that training starts from the same bound. Does the prior make a difference, and why? Three experiments.

    python q2b.py --epochs 20                  ->  results/q2b/report.md, on SVHN (downloaded)
    python q2b.py --epochs 20 --compare        ->  2a with the same arguments first, where its results are not there
    python q2b.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
    python q2b.py --evaluate results/q2b/checkpoint.pt --data FILE.npz  ->  results/q2b/evaluate/metrics.json
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import (  # before torch, whose import reads what core has set
    IMAGE_DEFAULTS, IMAGE_SMOKE, FlowPrior, ImageVAE, Noise, StandardNormal, Terms, bits_per_dim, evaluate, fit,
    in_notebook, information_bounds, kl_per_position, launch, load_checkpoint, normal_log_prob, parse_args,
    plot_tiles, posteriors, run_images, save_figure, standard_error,
)  # fmt: skip

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

UNCOMPARED = ("out", "data_root", "compare", "evaluate", "clock")  # arguments in which 2a and 2b may differ


def make_2a(args: argparse.Namespace) -> ImageVAE:
    return ImageVAE(args.latents, StandardNormal)


def make_model(args: argparse.Namespace) -> ImageVAE:
    return ImageVAE(args.latents, FlowPrior)


def load_2a(args: argparse.Namespace, data: dict[str, Any] | None, folder: Path) -> tuple[ImageVAE | None, str]:
    """2a's model, if its results in `folder` were made with these arguments and this data; else None and the reason."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        theirs, their_data = metrics["args"], metrics["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"There are no results of 2a in {folder}."
    differing = [k for k, v in theirs.items() if k not in UNCOMPARED and v != vars(args).get(k)]
    if data is not None and their_data != data:
        differing.append("data")
    if differing:
        return None, f"The results of 2a in {folder} were made with another {', '.join(differing)}: not compared."
    model = make_2a(args)
    model.load_state_dict(load_checkpoint(folder / "checkpoint.pt", "q2a")["state"])
    return model.to(args.device), ""


# ----------------------------------------------------------------------------------------------------- experiments


class PriorOnly(nn.Module):
    """A prior to be fitted to the aggregated posterior of a frozen encoder: Terms with the KL alone."""

    def __init__(self, frozen: ImageVAE, prior: StandardNormal):
        super().__init__()
        self.frozen, self.prior = [frozen], prior  # in a list: its weights are not this module's

    def forward(self, levels: Tensor, noise: Noise) -> Terms:
        with torch.no_grad():
            z, mu, log_std = self.frozen[0].posterior(self.frozen[0].to_x(levels, noise), noise)
            log_q = normal_log_prob(z, mu, log_std)
        return Terms(recon=torch.zeros_like(log_q), kl=log_q - self.prior.log_prob(z))


def neighbour_correlation(z: Tensor) -> dict[str, float]:
    """Mean over channels of |correlation| between a position and the one to its right, and below. z [N, C, H, W]."""
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    pairs = {"right": (z[..., :-1], z[..., 1:]), "below": (z[..., :-1, :], z[..., 1:, :])}
    return {side: (a * b).mean((0, 2, 3)).abs().mean().item() for side, (a, b) in pairs.items()}


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """Mean of b - a over images and its standard error, from pairs. [N] nats each -> bits/dim."""
    d = bits_per_dim(b - a, 3072)
    return {"bpd": d.mean().item(), "se_bpd": standard_error(d)}


def experiments(
    args: argparse.Namespace, a: ImageVAE, b: ImageVAE, splits: dict[str, Tensor], keep: Path | None
) -> dict[str, Any]:
    """What the flow prior changes (test, paired by image), and what it does to z. a: 2a's model, b: 2b's."""
    x = splits["test"]
    print("the flow prior alone, fitted to 2a's frozen encoder:")
    torch.manual_seed(args.seed)
    fitted = PriorOnly(a, FlowPrior(a.prior.latent_shape).to(args.device))
    third = argparse.Namespace(**{**vars(args), "epochs": -(-args.epochs // 3)})
    fit(fitted, splits, third, keep)
    terms_a, terms_b, terms_fitted = (evaluate(m, x) for m in (a, b, fitted))
    found: dict[str, Any] = {
        "neg_elbo": difference(terms_a.neg_elbo, terms_b.neg_elbo), "kl": difference(terms_a.kl, terms_b.kl),
        "recon": difference(terms_a.recon, terms_b.recon), "prior_alone": difference(terms_a.kl, terms_fitted.kl),
        "rest": difference(terms_fitted.kl + terms_a.recon, terms_b.neg_elbo), "prior_alone_epochs": third.epochs,
    }  # fmt: skip
    for name, model, terms in (("2a", a, terms_a), ("2b", b, terms_b)):
        z, mu, log_std = (torch.cat(t) for t in list(zip(*posteriors(model, x[:1000]), strict=True))[1:])
        positions = [[bound.mean().item() for bound in information_bounds(*(t[:, :, i, j] for t in (z, mu, log_std)))]
                     for i in range(8) for j in range(8)]  # fmt: skip
        kl = bits_per_dim(terms.kl.mean().item(), 1)
        information = [bits_per_dim(t.mean().item(), 1) for t in information_bounds(z, mu, log_std)]
        found[name] = {
            "kl_bits": kl, "information_images": len(z),
            "information_bits": [information[0], min(information[1], kl)],  # the KL is an upper bound too
            "information_sum_over_positions_bits": bits_per_dim(np.sum(positions, 0), 1).tolist(),
            "correlation_z": neighbour_correlation(z),
            "correlation_eps": neighbour_correlation(model.prior.z_to_eps(z)[0]),
            "kl_per_position_bits": kl_per_position(model, x),
        }  # fmt: skip
    return found


# --------------------------------------------------------------------------------------------------------- answers


def plot_experiments(found: dict[str, Any], title: str, path: Path) -> None:
    """(i) where the difference comes from; (ii) the KL and what it buys; (iii) KL by position; correlations."""
    fig, axes = plt.subplots(1, 5, figsize=(17, 3.6))
    bars = {"2b − 2a": found["neg_elbo"], "a better\nprior alone": found["prior_alone"], "the rest": found["rest"]}
    errors = [2 * bar["se_bpd"] for bar in bars.values()]
    axes[0].bar(list(bars), [bar["bpd"] for bar in bars.values()], yerr=errors, capsize=4, color="0.6")
    axes[0].axhline(0, color="k", lw=0.8)
    axes[0].set(title="(i) change of −ELBO, ± 2 s.e.", ylabel="bits/dim")
    for k, name in enumerate(("2a", "2b")):
        lower, upper = found[name]["information_bits"]
        axes[1].bar(k, found[name]["kl_bits"], color="0.8", label="KL" if k else None)
        axes[1].plot([k, k], [lower, upper], "k_-", markersize=12, label="I(x; z), between bounds" if k else None)
    axes[1].set(
        title="(ii) the KL, and I(x; z) in it", ylabel="bits per image", xticks=(0, 1), xticklabels=("2a", "2b")
    )
    axes[1].legend(fontsize=8)
    top = max(np.max(found[name]["kl_per_position_bits"]) for name in ("2a", "2b"))
    for ax, name in zip(axes[2:4], ("2a", "2b"), strict=True):
        shown = ax.imshow(found[name]["kl_per_position_bits"], vmin=0, vmax=top, cmap="viridis")
        ax.set(title=f"(iii) {name}: KL by position, bits", xlabel="column", ylabel="row")
        fig.colorbar(shown, ax=ax, shrink=0.8)
    series = (
        ("2a: z", found["2a"]["correlation_z"]),
        ("2b: z", found["2b"]["correlation_z"]),
        ("2b: ε", found["2b"]["correlation_eps"]),
    )
    for k, side in enumerate(("right", "below")):
        axes[4].bar(
            np.arange(3) + 0.4 * k - 0.2, [c[side] for _, c in series], 0.36, label=side, color=("0.3", "0.7")[k]
        )
    axes[4].set(title="(iii) |correlation| of neighbours", xticks=range(3), xticklabels=[name for name, _ in series])
    axes[4].legend(fontsize=8)
    fig.suptitle(title)
    save_figure(fig, path)


def verdict(found: dict[str, Any]) -> str:
    """Whether the prior made a difference, and what of it, from the measured differences and their errors alone."""

    def shows(change: dict[str, float]) -> str:
        clear = abs(change["bpd"]) > 2 * change["se_bpd"]
        return ("lowers" if change["bpd"] < 0 else "raises") if clear else "does not measurably change"

    total, alone = found["neg_elbo"], found["prior_alone"]
    text = f"""**The flow prior {shows(total)} −ELBO**: {total["bpd"]:+.4f} ± {total["se_bpd"]:.4f} bits/dim. Fitted
afterwards to 2a's frozen encoder, a flow {shows(alone)} the KL: {alone["bpd"]:+.4f} ± {alone["se_bpd"]:.4f}, which is
what a better prior alone is worth."""
    if total["bpd"] < -2 * total["se_bpd"]:
        rest = found["rest"]
        text += f""" The rest, {rest["bpd"]:+.4f} ± {rest["se_bpd"]:.4f}, is encoder and decoder making use of it:
{found["recon"]["bpd"]:+.4f} in the decoder term, {found["kl"]["bpd"] - alone["bpd"]:+.4f} in the KL."""
    return text


def report(found: dict[str, Any]) -> str:
    """The answer, the table of paired differences, and one paragraph for each experiment."""
    names = {
        "−ELBO": "neg_elbo",
        "KL term": "kl",
        "decoder term": "recon",
        "KL, 2a's encoder with a flow": "prior_alone",
    }
    rows = "\n".join(f"| {name} | {found[k]['bpd']:+.4f} ± {found[k]['se_bpd']:.4f} |" for name, k in names.items())
    a, b = found["2a"], found["2b"]
    before, after = np.mean(list(b["correlation_z"].values())), np.mean(list(b["correlation_eps"].values()))
    removes = "removes part of" if after < 0.9 * before else "does not remove"
    information = "\n".join(
        "| {} | {:,.0f} | {:,.1f} to {:,.0f} | {:,.0f} to {:,.0f} |".format(
            name, f["kl_bits"], *f["information_bits"], *f["information_sum_over_positions_bits"]
        )
        for name, f in (("2a", a), ("2b", b))
    )
    chance = math.sqrt(2 / math.pi / (56 * b["information_images"]))
    return f"""
{verdict(found)}

| test, paired by image | change against 2a, bits/dim |
|---|---|
{rows}

Same data, arguments, batches and noise. ± one standard error over images; another seed is not in it.

![experiments](experiments.png)

**(i)** As said above; epochs for which the flow was fitted: {found["prior_alone_epochs"]}.

**(ii)** KL = I(x; z) + KL(q(z) || p(z)): what z tells about x, and how far the codes of all images together lie from
the prior. Bounds on I(x; z) from {a["information_images"]} test images, in bits an image:

| model | KL | I(x; z) | sum over the 64 positions of each one's own information |
|---|---|---|---|
{information}

The lower bound can never exceed log2 of the number of images, {math.log2(a["information_images"]):.1f} bits; the upper
one is at most the KL. Codes of so many dimensions hardly overlap, and so few images cannot close the gap. Where the
information is known, the bounds close on it (a linear-Gaussian model, in the tests).

**(iii)** Neighbouring positions of z correlate by {before:.3f} in 2b; of ε, after the flow, by {after:.3f} (chance:
about {chance:.3f}). The flow {removes} what is predictable from the neighbours.

![samples of both priors, the same noise](samples_2a_2b.png)
"""


def flags(add: Callable[..., Any]) -> None:
    """The flag that only this script has."""
    add("--compare", action="store_true", help="train 2a with the same arguments first, unless its results are there")


def main(argv: list[str] | None = None) -> None:
    args, out = parse_args("q2b", argv, IMAGE_DEFAULTS, IMAGE_SMOKE, images=True, more=flags)
    folder = out.with_name("q2a")
    if args.compare and not args.evaluate and load_2a(args, None, folder)[0] is None:
        run_images("q2a", args, folder, make_2a, "2a: a convolutional VAE with a standard normal prior")

    def finish(model: ImageVAE, splits: dict[str, Tensor], metrics: dict[str, Any], out: Path) -> str:
        heading = "\n## Does the autoregressive prior make a difference, and why?\n"
        other, reason = load_2a(args, metrics["data"], folder)
        if other is None:
            return f"{heading}\n{reason} `python q2b.py --compare` trains 2a with the same arguments first.\n"
        metrics["against_2a"] = found = experiments(args, other, model, splits, out / "progress" / "prior_alone.pt")
        plot_experiments(found, f"2b against 2a, {metrics['data']['name']}", out / "experiments.png")
        few = torch.arange(100, device=splits["test"].device)
        panels = {}
        for name, one in (("2a, N(0, I)", other), ("2b, flow", model)):
            noise = Noise.fixed(few, seed=1)
            panels[name] = list(one.to_images(one.prior.sample(noise), noise).values())[1]
        plot_tiles(panels, 10, "100 samples x ~ p(x|z), the same ε for both priors", out / "samples_2a_2b.png")
        return heading + report(found)

    run_images("q2b", args, out, make_model, "2b: the same VAE with an autoregressive flow prior", finish)


if __name__ == "__main__" and not in_notebook():
    launch(main)
