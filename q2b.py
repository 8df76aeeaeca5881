"""Question 2b: the VAE of 2a with an autoregressive flow as its prior, and nothing else different.

    z = f(eps):  z_i = t_i(z_<i) + exp(s_i(z_<i)) eps_i,  eps ~ N(0, I),  i over the 8 x 8 positions in raster order,
                 z_i all channels of a position, s and t from a shallow PixelCNN
    log p(z) = log N(eps; 0, I) + log |det d eps / d z| = log N(eps; 0, I) - sum_i s_i

    -log P(image) <= E_u E_q[log q(z|x) - log p(z) - log p(x|z)] + 3072 ln 128,   x = (levels + u) / 128 - 1

(arXiv:1611.02731, equations 12 to 14). The flow starts as the identity. Does the prior make a difference, and why?
--compare answers by three experiments: (i) a flow fitted to a frozen 2a; (ii) what is in the KL; (iii) what the flow
removes from z.

    python q2b.py --epochs 20 --compare        ->  results/q2b/report.md, on SVHN (downloaded); 2a is trained too
    python q2b.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import core
from core import FlowPrior, ImageVAE, StandardNormal, Terms, bits_per_dim, evaluate

DEFAULTS = dict(epochs=20, latents=16, data="svhn")
SMOKE = dict(epochs=1, limit=48, latents=4, data="synthetic")

# --- what the prior changes: experiments


def refuse_another_2a(path: Path, ours: dict, data_hash: str) -> None:
    """2a's checkpoint, if there is one, has to be of the same arguments and data."""
    if path.exists():
        saved = core.read_checkpoint(path, "q2a")
        free = core.OF_ONE_COMMAND | core.MAY_DIFFER - {"epochs", "precision"}
        differing = core.differences(saved["args"], {k: v for k, v in ours.items() if k not in free})
        differing = differing or "the data" * (saved["data"] != data_hash)
        if differing:
            core.fail(f"--compare: {path} is of another 2a: {differing}; move it away, or choose another --out")


def with_fitted_flow(a: ImageVAE) -> ImageVAE:
    """2a, frozen, with a flow as its prior, to be fitted to its codes."""
    fitted = copy.deepcopy(a)
    fitted.encoder.requires_grad_(False)
    fitted.decoder.requires_grad_(False)
    fitted.prior = FlowPrior(a.prior.latent_shape)
    return fitted


def neighbour_correlation(z: Tensor) -> dict[str, float]:
    """Mean over channels of |correlation| between a position and the one to its right, and below. z [N, C, H, W]."""
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    pairs = {"right": (z[..., :-1], z[..., 1:]), "below": (z[..., :-1, :], z[..., 1:, :])}
    return {side: (one * other).mean((0, 2, 3)).abs().mean().item() for side, (one, other) in pairs.items()}


def paired(before: Tensor, after: Tensor) -> dict[str, float]:
    """after - before, [N] nats each, on the same images: mean and its standard error, bits/dim."""
    change = bits_per_dim(after - before, 3072)
    return {"bpd": change.mean().item(), "se_bpd": core.standard_error(change)}


@torch.no_grad()
def compare(a: ImageVAE, fitted: ImageVAE, b: ImageVAE, test: Tensor, of_b: Terms) -> dict:
    """What the flow changes on test, paired by image, and what it does to z.
    fitted: 2a with a flow fitted to its codes; of_b: 2b's terms on test."""
    of_a, of_fitted = evaluate(a, test), evaluate(fitted, test)
    named = {"2a": of_a, "2a_fitted_flow": of_fitted, "2b": of_b}
    z_of_a, z_of_b = (torch.cat([z for _, z, _, _ in core.posteriors(model, test[:1000])]) for model in (a, b))
    return {
        "neg_elbo": paired(of_a.neg_elbo, of_b.neg_elbo),
        "kl": paired(of_a.kl, of_b.kl),
        "recon": paired(of_a.recon, of_b.recon),
        "prior_alone": paired(of_a.kl, of_fitted.kl),
        "rest": paired(of_fitted.neg_elbo, of_b.neg_elbo),
        "kl_bits": {name: bits_per_dim(terms.kl.mean().item(), 1) for name, terms in named.items()},  # per image
        "correlation": {
            "2a: z": neighbour_correlation(z_of_a),
            "2b: z": neighbour_correlation(z_of_b),
            "2b: ε": neighbour_correlation(b.prior.z_to_eps(z_of_b)[0]),
        },
        "correlation_by_chance": math.sqrt(2 / math.pi / (7 * 8 * len(z_of_b))),  # 7 x 8 pairs per image and side
    }


def plot_comparison(found: dict, title: str, path: Path) -> None:
    """(i) where the difference comes from; (ii) what is in the KL; (iii) correlation of neighbours."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    names = ("2b − 2a", "flow on\nfrozen 2a", "joint training,\nat most")
    bars = [found[part] for part in ("neg_elbo", "prior_alone", "rest")]
    errors = [2 * bar["se_bpd"] for bar in bars]
    axes[0].bar(names, [bar["bpd"] for bar in bars], yerr=errors, capsize=4, color="0.6")
    axes[0].axhline(0, color="k", lw=0.8)
    axes[0].set(title="(i) change of −ELBO, ± 2 s.e.", ylabel="bits/dim")
    kl = found["kl_bits"]
    axes[1].bar(["2a", "2b"], [kl["2a_fitted_flow"], kl["2b"]], color="0.6", label="I(x; z) at most")
    excess = kl["2a"] - kl["2a_fitted_flow"]
    axes[1].bar(["2a"], [excess], bottom=[kl["2a_fitted_flow"]], color="0.85", label="distance from N(0, I), at least")
    axes[1].set(title="(ii) what is in the KL", ylabel="bits per image", ylim=(0, 1.45 * max(kl.values())))
    axes[1].legend(fontsize=8)
    for k, side in enumerate(("right", "below")):
        heights = [correlation[side] for correlation in found["correlation"].values()]
        axes[2].bar(np.arange(3) + 0.4 * k - 0.2, heights, 0.36, label=side, color=("0.3", "0.7")[k])
    axes[2].set(title="(iii) |correlation| of neighbours", xticks=range(3), xticklabels=list(found["correlation"]))
    axes[2].legend(fontsize=8)
    fig.suptitle(title)
    core.save_figure(fig, path)


# --- figures and the report


def change_of(what: str, change: dict[str, float]) -> str:
    """ "lowers −ELBO by 0.2456 ± 0.0005": a difference in words, by its sign and two standard errors."""
    if abs(change["bpd"]) <= 2 * change["se_bpd"]:
        return f"does not measurably change {what} ({change['bpd']:+.4f} ± {change['se_bpd']:.4f})"
    verb = "lowers" if change["bpd"] < 0 else "raises"
    return f"{verb} {what} by {abs(change['bpd']):.4f} ± {change['se_bpd']:.4f}"


def comparison_text(found: dict) -> str:
    """Does the prior make a difference, and why: answer, table, experiments."""
    names = {"neg_elbo": "−ELBO", "kl": "KL term", "recon": "decoder term", "prior_alone": "KL term, flow on frozen 2a"}
    rows = "\n".join(f"| {names[k]} | {found[k]['bpd']:+.4f} ± {found[k]['se_bpd']:.4f} |" for k in names)
    kl, correlation = found["kl_bits"], found["correlation"]
    of_2a, before, after = (np.mean(list(correlation[k].values())) for k in ("2a: z", "2b: z", "2b: ε"))
    return f"""**The flow prior {change_of("−ELBO", found["neg_elbo"])} bits/dim.** It
{change_of("the KL term", found["kl"])} and {change_of("the decoder term", found["recon"])}.

**Why it can:** patches of an image depend on each other, and so do their codes (iii). N(0, I) charges each as if it
stood alone (ii); the flow charges what those before it do not tell. (i) measures this on a finished 2a.

| test, paired by image | change from 2a, bits/dim |
|---|---|
{rows}

Same data, arguments, batches and noise; one seed. ± is one standard error over images, "lowers" and "raises"
mean more than two. Other seeds, lengths and recipes differ by more, above all in the two terms.

![comparison](experiments.png)

**(i) A better prior, or better codes?** A flow fitted to the codes of a frozen 2a (epochs:
{found["prior_alone_epochs"]}) {change_of("the KL term", found["prior_alone"])}; a better flow could save more. Against
this model, 2b {change_of("−ELBO", found["rest"])}: at most this comes from joint training.

**(ii) What does the KL pay for?** For any density r, the mean over images of KL(q(z|x) || r) is I(x; z), what z tells
about its image, plus how far all codes together lie from r. 2a's KL to N(0, I) is {kl["2a"]:,.0f} bits per image, to
the flow fitted to the same codes {kl["2a_fitted_flow"]:,.0f}. So at least {kl["2a"] - kl["2a_fitted_flow"]:,.0f} bits
of 2a's KL say nothing about the image; they pay for codes that do not follow N(0, I). I(x; z) is at most
{kl["2a_fitted_flow"]:,.0f} bits in 2a, {kl["2b"]:,.0f} in 2b.

**(iii) What does the flow remove?** Neighbouring positions of 2b's z correlate by {before:.3f} (2a's: {of_2a:.3f};
mean over both sides and channels of absolute values), those of its ε by {after:.3f} (by chance: about
{found["correlation_by_chance"]:.3f}). Below: samples of 2a (left), from ε itself, and of 2b, from the same ε through
the flow.

![samples of both priors, the same noise](samples_2a_2b.png)"""


def report(metrics: dict) -> str:
    """The handout's deliverables in its order, every number from metrics."""
    comparison = "Not compared. `python q2b.py --resume --compare` trains 2a, but not 2b again, and compares."
    if "against_2a" in metrics:
        comparison = comparison_text(metrics["against_2a"])
    return f"""# 2b: the same VAE with an autoregressive flow prior

{core.bounds_text(metrics)}

## 2. Samples

![samples](samples.png)

z ~ p(z). Left: µ(z), the decoder's mean; right: x ~ p(x|z) of the same z. The flow draws each position of z to fit
those before it, z_i = t_i(z_<i) + exp(s_i(z_<i)) ε_i, so that neighbouring patches can belong together. One unlike
any image's can drive the next further off, until the sample breaks into noise.

## 3. Interpolations

![interpolations](interpolations.png)

True test images at both ends; between them µ(z) on a straight line between their codes' means: above in z, below in ε,
the flow's noise. In z one image fades into the other; in ε the middle is nearer to 0 than draws of N(0, I): less
detail.

## Reconstructions

![reconstructions](reconstructions.png)

From above: test images; µ(z) at the posterior's mean z; x ~ p(x|z) of the same z. As in 2a, z keeps shapes and colours;
the decoder's noise is coloured, that of the images nearly grey.

## Does the autoregressive prior make a difference, and why?

{comparison}
"""


# --- main


def main(argv: list[str] | None = None) -> None:
    parser = core.Parser("q2b", images=True)
    parser.add_argument("--compare", action="store_true", help="with 2a, trained too if absent; not of --evaluate")
    args, out = core.parse_args(parser, argv, DEFAULTS, SMOKE)
    device, precision = core.choose_machine(args.device, args.precision)
    comparing = args.compare and not args.evaluate

    # 1. Data and model.
    data = core.load_images(args.data, args.data_root, args.limit, args.seed, only_test=bool(args.evaluate))
    splits = {name: x.to(device) for name, x in data.splits.items()}
    test = splits["test"]
    torch.manual_seed(args.seed)
    model = ImageVAE(args.latents, FlowPrior).to(device).to(memory_format=torch.channels_last)

    # 2. Training; or, with --evaluate, an earlier training's weights.
    args, recipe = core.image_recipe(args, len(splits["train"]), precision)
    of_2a = {name: value for name, value in vars(args).items() if name != "compare"}  # q2a.py's arguments
    path_2a = out.with_name("q2a") / "checkpoint.pt"
    if comparing:
        refuse_another_2a(path_2a, of_2a, data.describe()["sha256"])
    about = {"script": "q2b", "args": vars(args)}
    lock = core.claim(out, args.resume)
    if args.evaluate:
        curves = core.load_trained(model, args.evaluate)
    else:
        curves = core.fit(model, splits, recipe, out / "checkpoint.pt", about, args.resume)

    # 3. Bounds, the check of the prior, lossless codecs.
    of_test, measured = core.measure_images(model, splits)
    metrics = core.describe_run("q2b", args, data.describe(), device, precision, model)
    metrics |= {"curves": curves} | measured
    core.write_results(out, metrics)

    # 4. Figures and report.
    core.plot_image_curves(metrics, "2b: flow prior", out)
    core.draw_image_figures(model, test, out, args.samples)
    core.write_results(out, metrics, report(metrics))

    # 5. The comparison: 2a, 2a with a flow fitted to its codes, and 2b.
    if comparing:
        torch.manual_seed(args.seed)
        model_a = ImageVAE(args.latents, StandardNormal).to(device).to(memory_format=torch.channels_last)
        lock_2a = core.claim(path_2a.parent, resume=path_2a.exists())
        core.fit(model_a, splits, recipe, path_2a, {"script": "q2a", "args": of_2a}, resume=True, name="2a")
        torch.manual_seed(args.seed)
        fitted = with_fitted_flow(model_a).to(device).to(memory_format=torch.channels_last)
        epochs = math.ceil(args.epochs / 3)
        path = out / f"flow_on_2a_of_{args.epochs}_epochs.pt"
        core.fit(fitted, splits, replace(recipe, epochs=epochs, kl_warmup=None), path, about, args.resume, "flow on 2a")
        metrics["against_2a"] = compare(model_a, fitted, model, test, of_test) | {"prior_alone_epochs": epochs}
        plot_comparison(metrics["against_2a"], f"2b against 2a, {data.name}", out / "experiments.png")
        (of_a, _), (of_b, _) = (m.sample(100, core.fixed_noise("samples")) for m in (model_a, model))
        core.save_grid((core.quantise(of_a), core.quantise(of_b)), 10, out / "samples_2a_2b.png")
        core.write_results(out, metrics, report(metrics))
        lock_2a.release(force=True)
    lock.release(force=True)


if __name__ == "__main__" and not core.pasted_into_cell():
    core.launch(main)
