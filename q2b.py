"""Question 2b: the VAE of 2a with an autoregressive flow as its prior, and nothing else different.

    z = f(eps):  z_i = t_i(z_<i) + exp(s_i(z_<i)) eps_i,  eps ~ N(0, I),  i over the 8 x 8 positions in raster order,
                 z_i all channels of a position, s and t from a shallow PixelCNN
    log p(z) = log N(eps; 0, I) + log |det d eps / d z| = log N(eps; 0, I) - sum_i s_i

    -log P(image) <= E_u E_q[log q(z|x) - log p(z) - log p(x|z)] + 3072 ln 128,   x = (levels + u) / 128 - 1

(arXiv:1611.02731, equations 12 to 14). Same encoder, decoder, loss, seed and batches as 2a; the flow starts as the
identity, so that training starts from the same bound. Does the prior make a difference, and why? --compare answers by
three experiments: (i) a flow fitted to a frozen 2a; (ii) what is in the KL; (iii) what the flow removes from z.

    python q2b.py --epochs 20 --compare        ->  results/q2b/report.md, on SVHN (downloaded); 2a is trained first
    python q2b.py --epochs 20                  ->  2b alone, without the comparison
    python q2b.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
    python q2b.py --evaluate results/q2b/checkpoint.pt --data FILE.npz  ->  results/q2b/evaluate/report.md
"""

import argparse
import copy
import math
from pathlib import Path
from typing import Any

from core import (  # before torch, whose import reads what core has set
    CODECS, FlowPrior, ImageParser, ImageVAE, StandardNormal, Terms, attempt, between_ends, bin_centres,
    bits_per_dim, bounds_text, check_above, check_prior, claim, codec_bits_per_dim, describe_run, differences,
    error_of_one_draw, evaluate, evaluate_splits, evenly_spaced, fail, fit, fixed_noise, gives_folders_back,
    in_bits, kl_per_position, launch, load_images, load_trained, parse_args, pasted_into_cell, plot_curves,
    plot_images, posteriors, prepare, quantise, read_checkpoint, save_figure, settings, sha256_of, standard_error,
    straight_lines, synthetic_floor, to_device, training_text, what_must_match, write_images, write_metrics,
    write_report,
)  # fmt: skip

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

DEFAULTS = dict(epochs=20, batch_size=16, lr=2e-3, muon_lr=0.012, schedule="trapezoid", latents=16, data="svhn")
SMOKE = dict(epochs=1, batch_size=16, limit=48, latents=4, data="synthetic")

# -------------------------------------------------------------------------------- what the prior changes: experiments


def make_2a(args: argparse.Namespace, splits: dict[str, Tensor], path: Path) -> ImageVAE:
    """2a's model, not trained yet. A folder that another run writes into, or another training's, is refused."""
    torch.manual_seed(args.seed)
    model = to_device(ImageVAE(args.latents, StandardNormal), args)
    claim(path.parent, resume=True)
    if path.exists():
        saved = read_checkpoint(path, ("args", "must_match"), "q2a")
        theirs = saved["must_match"] | {"--epochs": saved["args"]["epochs"]}
        ours = what_must_match({"args": settings(args, but=("compare",))}, model, splits) | {"--epochs": args.epochs}
        if differing := differences(theirs, ours):
            hint = "move it away, choose another --out, or train it on (q2a.py --resume) if it has fewer epochs"
            fail(f"--compare: {path} is of another {', '.join(differing)}; {hint}")
    return model


def fit_flow_to_frozen_2a(
    a: ImageVAE, args: argparse.Namespace, splits: dict[str, Tensor], epochs: int, path: Path
) -> ImageVAE:
    """2a with encoder and decoder frozen and a flow, fitted to its codes, as the prior."""
    fitted = copy.deepcopy(a)
    fitted.encoder.requires_grad_(False)
    fitted.decoder.requires_grad_(False)
    torch.manual_seed(args.seed)
    fitted.prior = FlowPrior(a.prior.latent_shape).to(args.device)
    fit(
        fitted, splits, epochs=epochs, batch_size=args.batch_size, lr=args.lr,
        muon_lr=args.muon_lr, schedule=args.schedule, seed=args.seed, precision=args.precision, path=path,
        resume=args.resume, run={"args": settings(args, but=("compare",))}, name="flow on frozen 2a",
    )  # fmt: skip
    return fitted


def neighbour_correlation(z: Tensor) -> dict[str, float]:
    """Mean over channels of |correlation| between a position and the one to its right, and below. z [N, C, H, W]."""
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    pairs = {"right": (z[..., :-1], z[..., 1:]), "below": (z[..., :-1, :], z[..., 1:, :])}
    return {side: (one * other).mean((0, 2, 3)).abs().mean().item() for side, (one, other) in pairs.items()}


def paired(before: Tensor, after: Tensor) -> dict[str, float]:
    """Mean over images of after - before and its standard error, bits/dim, from [N] nats each on the same images."""
    change = bits_per_dim(after - before, 3072)
    return {"bpd": change.mean().item(), "se_bpd": standard_error(change)}


@torch.no_grad()
def compare(a: ImageVAE, fitted: ImageVAE, b: ImageVAE, test: Tensor, of_b: Terms) -> dict[str, Any]:
    """What the flow changes on test, paired by image, and what it does to z.

    a: 2a; fitted: 2a with a flow fitted to its codes; b: 2b, with its terms on test.
    """
    of_a, of_fitted = evaluate(a, test), evaluate(fitted, test)
    named = {"2a": of_a, "2a_fitted_flow": of_fitted, "2b": of_b}

    def codes(model: ImageVAE) -> Tensor:
        return torch.cat([z for _, z, _, _ in posteriors(model, test[:1000])])

    z_of_a, z_of_b = codes(a), codes(b)
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
        "kl_per_position_bits": {name: kl_per_position(m, test).tolist() for name, m in (("2a", a), ("2b", b))},
    }


def plot_comparison(found: dict[str, Any], title: str, path: Path) -> None:
    """(i) where the difference comes from; (ii) what is in the KL; (iii) KL by position, correlation of neighbours."""
    fig, axes = plt.subplots(1, 5, figsize=(17, 3.8), layout="constrained")
    bars = {"2b − 2a": found["neg_elbo"], "a better\nprior alone": found["prior_alone"], "the rest": found["rest"]}
    errors = [2 * bar["se_bpd"] for bar in bars.values()]
    axes[0].bar(list(bars), [bar["bpd"] for bar in bars.values()], yerr=errors, capsize=4, color="0.6")
    axes[0].axhline(0, color="k", lw=0.8)
    axes[0].set(title="(i) change of −ELBO, ± 2 s.e.", ylabel="bits/dim")
    kl = found["kl_bits"]
    axes[1].bar(["2a", "2b"], [kl["2a_fitted_flow"], kl["2b"]], color="0.6", label="I(x; z) at most")
    excess = kl["2a"] - kl["2a_fitted_flow"]
    axes[1].bar(["2a"], [excess], bottom=[kl["2a_fitted_flow"]], color="0.85", label="distance from N(0, I), at least")
    axes[1].set(title="(ii) what is in the KL", ylabel="bits per image", ylim=(0, 1.45 * max(kl.values())))
    axes[1].legend(fontsize=8)
    top = max(np.max(bits) for bits in found["kl_per_position_bits"].values())
    for ax, (name, bits) in zip(axes[2:4], found["kl_per_position_bits"].items(), strict=True):
        shown = ax.imshow(bits, vmin=0, vmax=top, cmap="viridis")
        ax.set(title=f"(iii) {name}: KL by position, bits", xlabel="column", ylabel="row")
        fig.colorbar(shown, ax=ax, shrink=0.8)
    for k, side in enumerate(("right", "below")):
        heights = [correlation[side] for correlation in found["correlation"].values()]
        axes[4].bar(np.arange(3) + 0.4 * k - 0.2, heights, 0.36, label=side, color=("0.3", "0.7")[k])
    axes[4].set(title="(iii) |correlation| of neighbours", xticks=range(3), xticklabels=list(found["correlation"]))
    axes[4].legend(fontsize=8)
    fig.suptitle(title)
    save_figure(fig, path)


# ------------------------------------------------------------------------------------------------- what the report says


def verdict(found: dict[str, Any]) -> str:
    """Whether the prior made a difference, and what of it, from the measured differences and their errors alone."""

    def shows(change: dict[str, float]) -> str:
        if abs(change["bpd"]) <= 2 * change["se_bpd"]:
            return "does not measurably change"
        return "lowers" if change["bpd"] < 0 else "raises"

    def amount(change: dict[str, float]) -> str:
        return f"{change['bpd']:+.4f} ± {change['se_bpd']:.4f}"

    total, kl, recon, alone = (found[name] for name in ("neg_elbo", "kl", "recon", "prior_alone"))
    text = f"""**The flow prior {shows(total)} −ELBO**: {amount(total)} bits/dim. It {shows(kl)} the KL term
({amount(kl)}) and {shows(recon)} the decoder term ({amount(recon)}).

**(i) A better prior, or better codes?** A flow that was fitted afterwards to the codes of 2a's frozen encoder
{shows(alone)} the KL: {amount(alone)}."""
    if shows(alone) == "lowers":
        text += f" So a better prior alone saves at least {-alone['bpd']:.4f}, as the flow may not be the best one."
    if shows(total) == shows(found["rest"]) == "lowers":
        text += f""" The rest, {amount(found["rest"])}, is the most that training
encoder and decoder together with the flow can have brought."""
    if shows(total) == "lowers" and abs(kl["bpd"]) < abs(total["bpd"]) / 4:
        text += " Most of the gain is in the decoder term: for about the same KL, 2b's z tells its decoder more."
    return text


def comparison_text(found: dict[str, Any]) -> str:
    """The answer, the table of paired differences, and one paragraph for each experiment."""
    rows = {
        "−ELBO": found["neg_elbo"], "KL term": found["kl"], "decoder term": found["recon"],
        f"KL, 2a's encoder with a flow (epochs: {found['prior_alone_epochs']})": found["prior_alone"],
    }  # fmt: skip
    table = "\n".join(f"| {name} | {change['bpd']:+.4f} ± {change['se_bpd']:.4f} |" for name, change in rows.items())
    kl, correlation = found["kl_bits"], found["correlation"]
    by_position = found["kl_per_position_bits"]["2b"]
    before, after = (np.mean(list(correlation[name].values())) for name in ("2b: z", "2b: ε"))
    removes = f"removes {1 - after / before:.0%} of" if after < 0.9 * before else "does not remove"
    return f"""{verdict(found)}

| test, paired by image | change against 2a, bits/dim |
|---|---|
{table}

Same data, arguments, batches and noise. ± is one standard error over images; "lowers" and "raises" above ask for two.
This is one seed: how seeds differ is not in it. 2a's own report comes from `q2a.py --resume` with the same arguments.

![comparison](experiments.png)

**(ii) What does the KL pay for?** For any density r, the mean over images of KL(q(z|x) || r) is I(x; z), what z tells
about its image, plus KL(q(z) || r), how far all codes together lie from r. With r = N(0, I) it is {kl["2a"]:,.0f} bits
per image for 2a; with r the flow fitted to the same codes, {kl["2a_fitted_flow"]:,.0f} bits. So 2a's z tells at most
{kl["2a_fitted_flow"]:,.0f} bits, and at least {kl["2a"] - kl["2a_fitted_flow"]:,.0f} bits of 2a's KL are no information
but a distance between codes and prior. 2b's z tells at most {kl["2b"]:,.0f} bits.

**(iii) What does the flow remove?** Neighbouring positions of z correlate by {before:.3f} in 2b (channel by channel,
mean of absolute values); of ε, after the flow, by {after:.3f} (by chance: about {found["correlation_by_chance"]:.3f}).
The flow {removes} this correlation. The maps show what each position costs: in 2b the first one, which the flow cannot
predict, {by_position[0][0]:.1f} bits, an average one {np.mean(by_position):.1f}. The samples below are decoded from the
same noise ε: it is 2a's z as it is; 2b's flow first gives it the correlations of its codes.

![samples of both priors, the same noise](samples_2a_2b.png)
"""


def report(metrics: dict[str, Any]) -> str:
    """The handout's deliverables in its order, every number from metrics."""
    if metrics.get("against_2a"):
        comparison = comparison_text(metrics["against_2a"])
    elif metrics["args"]["compare"]:
        comparison = "The comparison failed."
    elif metrics["args"]["evaluate"]:
        comparison = "Only a training run compares, with `--compare`."
    else:
        comparison = """Not compared: the same command with `--compare --resume` trains 2a, unless it is there, and
compares. 2b is not trained again."""
    return f"""# 2b: the same VAE with an autoregressive flow prior

{training_text(metrics)}

## 1. The bound on train, validation and test

{bounds_text(metrics, colours_apart=True)}
## 2. Samples

![samples](samples.png)

## 3. Interpolations

![interpolations](interpolations.png)

## Reconstructions

![reconstructions](reconstructions.png)

## Does the autoregressive prior make a difference, and why?

{comparison}
"""


# ---------------------------------------------------------------------------------------------------------------- main


def draw_figures(model: ImageVAE, test: Tensor, title: str, out: Path, samples: int, failed: dict[str, str]) -> None:
    """100 samples, interpolations in z and in eps of five pairs of test images, reconstructions; single images."""
    with attempt("samples.png", failed):
        x, mu = model.sample(100, fixed_noise("samples"))
        panels = {"µ(z), the decoder's mean": quantise(mu), "x ~ p(x|z) at the same z": quantise(x)}
        plot_images(panels, 10, f"{title}\n100 samples, z ~ p(z)", out / "samples.png")
    shown = evenly_spaced(test, 10)
    codes, _ = model.encoder(bin_centres(shown))  # the posterior's means
    with attempt("interpolations.png", failed):
        in_z, _ = model.decoder(straight_lines(codes, steps=10))  # both ends included
        eps, _ = model.prior.z_to_eps(codes)
        in_eps, _ = model.decoder(model.prior.eps_to_z(straight_lines(eps, steps=10)))
        panels = {
            "straight in z": between_ends(shown, quantise(in_z)),
            "straight in ε, the flow's noise": between_ends(shown, quantise(in_eps)),
        }
        name = f"{title}\ninterpolations, true test images at the ends"
        plot_images(panels, 12, name, out / "interpolations.png", stacked=True)
    with attempt("reconstructions.png", failed):
        x, mu = model.decode(codes, fixed_noise("reconstructions"))
        panels = {"test images": shown, "µ(z), the decoder's mean": quantise(mu), "x ~ p(x|z)": quantise(x)}
        name = f"{title}\ndecoded from the posterior's mean"
        plot_images(panels, 10, name, out / "reconstructions.png", stacked=True)
    with attempt("single samples", failed):
        for first in range(0, samples, 100):
            x, _ = model.sample(min(100, samples - first), fixed_noise("single samples", first))
            write_images(quantise(x), out / "samples", first)


@gives_folders_back()
def main(argv: list[str] | None = None) -> None:
    parser = ImageParser("q2b")
    parser.add_argument("--compare", action="store_true", help="with 2a, trained first unless it is already")
    args, out = parse_args(parser, argv, DEFAULTS, SMOKE)
    if args.compare and args.evaluate:
        fail("--compare needs a training; leave it or --evaluate out")
    trained = load_trained(args, "q2b") if args.evaluate else None

    # 1. Data and models. A comparison that cannot be made is refused before anything is trained.
    data = load_images(args)
    splits = {name: x.to(args.device) for name, x in data.splits.items()}
    torch.manual_seed(args.seed)
    model = to_device(ImageVAE(args.latents, FlowPrior), args, trained)
    path_2a = out.with_name("q2a") / "checkpoint.pt"
    model_a = make_2a(args, splits, path_2a) if args.compare else None
    prepare(out, args, len(splits["train"]))  # moves an earlier run's results aside, unless --resume

    # 2. Training, with --compare first of 2a: from the start, or from its checkpoint on, which may be its end already.
    # Checkpoints are on disk before anything else is done; --evaluate takes an earlier one's.
    recipe = dict(
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, muon_lr=args.muon_lr, schedule=args.schedule,
        kl_warmup=args.kl_warmup, seed=args.seed, precision=args.precision,
    )  # fmt: skip
    alike = settings(args, but=("compare",))  # as q2a.py saves them: either script can go on with 2a
    if model_a:
        run = {"script": "q2a", "args": alike}
        fit(model_a, splits, **recipe, path=path_2a, run=run, resume=True, name="2a")
    if trained:
        curves = trained["curves"]
    else:
        run = {"script": "q2b", "args": alike}
        curves = fit(model, splits, **recipe, path=out / "checkpoint.pt", run=run, resume=args.resume)

    # 3. Bounds on all of validation and test, and as many images of train. Written before the figures are drawn.
    metrics = describe_run("q2b", args, data.describe(), model) | {"curves": curves}
    metrics["finished"] = trained is None or trained["finished"]
    terms = evaluate_splits(model, splits)
    metrics["final"] = {name: in_bits(of_split, 3072) for name, of_split in terms.items()}
    write_metrics(out, args, metrics)
    print(f"test: -ELBO {metrics['final']['test']['neg_elbo_bpd']:.4f} bits/dim, on all images")

    # 4. Figures and checks. One that fails is named in the report, and costs no other; the exit status is then 1.
    failed: dict[str, str] = {}
    if args.data == "synthetic":
        with attempt("a bound above its floor", failed):  # the floor is below the entropy: -log P(image | its scene)
            floor = synthetic_floor(splits, terms["test"].neg_elbo)
            metrics["floor"] = floor
            check_above(floor["excess_bpd"], floor["excess_se_bpd"])
    test, title = splits["test"], f"2b: flow prior, {data.name}"
    with attempt("curves.png", failed):
        if trained:
            plot_curves(curves, "the training of the checkpoint", out / "curves.png")
        else:
            name = f"{title}\ntest −ELBO {metrics['final']['test']['neg_elbo_bpd']:.3f} bits/dim"
            plot_curves(curves, name, out / "curves.png", metrics.get("floor"))
    with torch.no_grad():
        draw_figures(model, test, title, out, args.samples, failed)
    with attempt("the error of one draw", failed):  # from a second draw for 1,000 images
        metrics["test_draw_se_bpd"] = error_of_one_draw(model, splits["test"], terms["test"].neg_elbo)
    with attempt("the check of the prior", failed):  # against autograd's Jacobian: 0 up to rounding
        metrics["check_prior_nats"] = check_prior(model.prior)
    with attempt("codecs", failed):
        metrics["test_codecs_bpd"] = {codec: codec_bits_per_dim(test[:1000], codec) for codec in CODECS}

    # 5. The experiments: 2a, 2a with a flow fitted to its codes, and 2b.
    if model_a:
        with attempt("the comparison with 2a", failed):
            epochs = math.ceil(args.epochs / 3)  # a choice: a longer fit could lower the KL further
            weights = sha256_of(model_a.state_dict())  # with another 2a, --resume fits another flow
            path = out / "progress" / f"flow_on_2a_{weights[:8]}.pt"
            fitted = fit_flow_to_frozen_2a(model_a, args, splits, epochs, path)
            found = compare(model_a, fitted, model, test, terms["test"]) | {"prior_alone_epochs": epochs}
            metrics["against_2a"] = found
            with attempt("experiments.png", failed):
                plot_comparison(found, f"2b against 2a, {data.name}", out / "experiments.png")
        with attempt("samples_2a_2b.png", failed), torch.no_grad():
            of_a, _ = model_a.sample(100, fixed_noise("samples"))
            of_b, _ = model.sample(100, fixed_noise("samples"))
            panels = {"2a, N(0, I)": quantise(of_a), "2b, flow": quantise(of_b)}
            name = "100 samples x ~ p(x|z), the same ε for both priors"
            plot_images(panels, 10, name, out / "samples_2a_2b.png")

    # 6. Report.
    write_metrics(out, args, metrics | {"failed": failed})
    write_report(out, report(metrics), failed)


if __name__ == "__main__" and not pasted_into_cell():
    launch(main)
