"""Bonus: a variational lossy autoencoder. 2b's encoder and prior; as decoder, a PixelCNN that sees near pixels only.

    log p(x|z) = sum_i log p(x_i | z, those of x_<i within the receptive field),   i over the 32 x 32 pixels

Each factor is a mixture of 10 logistics, discretised to the 256 levels (arXiv:1701.05517), so that KL + decoder term
bounds the code length of the image as it is, without dequantisation. What a pixel can learn from its neighbours need
not go through z: the smaller the receptive field, the more should (arXiv:1611.02731).

    python bonus.py --epochs 20                  ->  results/bonus/report.md, on SVHN (downloaded)
    python bonus.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
    python bonus.py --evaluate results/bonus/checkpoint.pt --data FILE.npz  ->  results/bonus/evaluate/report.md

After the model, the first two train the same PixelCNN without a code, for as many epochs, and a model for each of three
receptive fields, for a fifth of the epochs each, rounded up (`--table-epochs`). With --epochs 20 these take nearly half
of the training time, with --epochs 1 most of it.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from core import (  # before torch, whose import reads what core has set
    CODECS, VAE, ConvDecoder, ConvEncoder, FlowPrior, GatedResidualBlock, ImageParser, MaskedConv2d, StandardNormal,
    Terms, at_least_fp32, attempt, between_ends, bin_centres, bits_per_dim, bounded_log_std, bounds_text, check_above,
    check_prior, codec_bits_per_dim, describe_run, error_of_one_draw, evaluate, evaluate_splits, evenly_spaced, fit,
    fixed_noise, float64_copy, gives_folders_back, in_bits, kl_per_position, launch, load_images, load_trained, noise,
    number, parse_args, pasted_into_cell, plot_curves, plot_images, posteriors, prepare, quantise, rank_and_world,
    save_figure, settings, standard_error, straight_lines, sum_dims, sum_over_processes, synthetic_floor, to_device,
    training_text, wavefront_slope, wavefronts, write_images, write_metrics, write_report,
)  # fmt: skip

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPONENTS = 10  # K, the logistics in a pixel's mixture
PER_COMPONENT = 1 + 3 + 3 + 3  # parameters: its logit; and for each colour a mean, a log scale and a coefficient
WIDTH, DEPTH = 128, 3  # channels and gated blocks of the PixelCNN
GAIN = 8  # by which the differences between neighbours are enlarged before the first layer
RECEPTIVE_FIELDS = (1, 2, 3)  # of the table's rows
PRIORS = {"normal": StandardNormal, "flow": FlowPrior}
DEFAULTS = dict(
    epochs=20, batch_size=16, lr=2e-3, muon_lr=0.012, schedule="trapezoid", latents=16, data="svhn", receptive_field=3,
    prior="flow", blind=1.0, free_bits=0.0,
)  # fmt: skip
SMOKE = dict(epochs=1, batch_size=16, limit=48, latents=4, data="synthetic", table_epochs=1)


# ----------------------------------------------------------------------------------------- the pixel's distribution


def logistic_log_prob(levels: Tensor, mu: Tensor, log_scale: Tensor, num_levels: int = 256) -> Tensor:
    """log P(level) of a logistic on [-1, 1], discretised to equal bins; elementwise, nats.

    Level v is the bin from 2v/L - 1 to 2(v+1)/L - 1, the first and the last with the tails. With a < b the edges in
    units of the scale, all in log space, so that nothing underflows and no gradient is lost:
        log(sigmoid(b) - sigmoid(a)) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b))
    """
    step, sharpness = 2 / num_levels, torch.exp(-log_scale)
    a = (levels * step - 1 - mu) * sharpness
    b = ((levels + 1.0) * step - 1 - mu) * sharpness  # in floats, as in uint8 255 + 1 is 0
    up_to_b, from_a = F.logsigmoid(b), F.logsigmoid(-a)  # log P of this level and all below; and all above
    inside = up_to_b + from_a + torch.log(-torch.expm1(-step * sharpness))
    return torch.where(levels == 0, up_to_b, torch.where(levels == num_levels - 1, from_a, inside))


def split_params(params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, 10 K, ...] -> logits [B, K, ...]; mu, log scale and colour coefficients, each [B, K, 3, ...]."""
    logits, *of_colours = at_least_fp32(params).unflatten(1, (PER_COMPONENT, -1)).split((1, 3, 3, 3), 1)
    mu, raw, coefficients = (t.transpose(1, 2) for t in of_colours)
    return logits[:, 0], mu, bounded_log_std(raw - 3), torch.tanh(coefficients)  # raw = 0: a scale of 7.6 levels


def add_to_means(params: Tensor, x: Tensor) -> Tensor:
    """Add x [B, 3, ...] to the means of all K components in params [B, 10 K, ...]; in float32 or wider."""
    shift = torch.cat([torch.zeros_like(x[:, :1]), x, torch.zeros_like(x), torch.zeros_like(x)], 1)  # (B, 10, ...)
    return (at_least_fp32(params).unflatten(1, (PER_COMPONENT, -1)) + shift[:, :, None]).flatten(1, 2)


def mixture_log_prob(levels: Tensor, params: Tensor, num_levels: int = 256) -> Tensor:
    """log P of pixels under a mixture each, the colours of a component in the order R -> G -> B, summed over pixels.

    A component's mean of G is moved by c0 (R - mu_R), its mean of B by c1 (R - mu_R) + c2 (G - mu_G), with R and G the
    true levels' bin centres in [-1, 1]: so the three colours are one joint distribution (Salimans et al. 2017,
    arXiv:1701.05517, section 2.2; there without the subtraction, which is the same family in other coordinates).
    levels [B, 3, H, W] integers, params [B, 10 K, H, W] -> [B], nats.
    """
    logits, mu, log_scale, coefficients = split_params(params)
    c0, c1, c2 = coefficients.unbind(2)
    x = ((levels + 0.5) * (2 / num_levels) - 1)[:, None]
    r, g, _ = (x - mu).unbind(2)  # each (B, K, H, W)
    mu = mu + torch.stack([torch.zeros_like(c0), c0 * r, c1 * r + c2 * g], 2)
    log_p = logistic_log_prob(levels[:, None], mu, log_scale, num_levels).sum(2)  # (B, K, H, W)
    return sum_dims(torch.logsumexp(F.log_softmax(logits, 1) + log_p, 1))


def mixture_sample(params: Tensor, u: Tensor) -> Tensor:
    """A level for each colour from uniform noise, as bin centres in [-1, 1].

    params [B, 10 K, P, 1], u in (0, 1) [B, K + 3, P, 1]: K to choose the component (Gumbel-max), 3 for the colours.
    -> [B, 3, P, 1]. Rounding a logistic sample down to its bin is exactly the distribution of `logistic_log_prob`.
    """
    logits, *of_colours = split_params(params)
    chosen = (logits - torch.log(-torch.log(u[:, :-3]))).argmax(1)[:, None, None].expand(-1, -1, 3, -1, -1)
    mu, log_scale, c = (t.gather(1, chosen)[:, 0].unbind(1) for t in of_colours)  # three of (B, P, 1) each

    def colour(k: int, shift: Tensor) -> Tensor:
        x = mu[k] + shift + torch.exp(log_scale[k]) * torch.logit(u[:, k - 3])
        return bin_centres(quantise(x)).to(x.dtype)

    r = colour(0, torch.zeros_like(mu[0]))
    g = colour(1, c[0] * (r - mu[0]))
    return torch.stack([r, g, colour(2, c[1] * (r - mu[0]) + c[2] * (g - mu[1]))], 1)


# -------------------------------------------------------------------------------------------------------- the model


class DifferenceConv2d(MaskedConv2d):
    """A masked convolution whose weights sum to 0 for each channel: it sees differences between positions only."""

    def kernel(self) -> Tensor:
        kernel = super().kernel()
        return kernel - self.mask * (kernel.sum((2, 3), keepdim=True) / self.mask.sum())


def sum_of_neighbours(x: Tensor) -> Tensor:
    """The pixel to the left plus the pixel above, zeros outside the image. [B, C, H, W] -> the same."""
    return F.pad(x, (1, 0))[..., :-1] + F.pad(x, (0, 0, 1, 0))[..., :-1, :]


class LocalPixelCNN(nn.Module):
    """Mixture parameters of every pixel, from z and from its neighbours before it in raster order.

    One masked convolution sees `receptive_field` rows above and as many columns to each side (in the paper's notation
    3 is 7 x 4); z's features of that pixel are added; the rest is 1 x 1, so that nothing else is seen.

    Neighbouring pixels are nearly equal, and what is new is in their small differences. So the convolution sees
    differences only. The level itself enters through the average of the pixels to the left and above: the mixture's
    means are corrections to it, added in fp32, as bf16's 8 bits would blur the levels. At the image's border the
    average is of those that exist, and what lies outside counts as equal to it, not as the mid-grey of a zero.
    `border`, a masked convolution of ones, tells the network where it is.
    """

    def __init__(self, latent_channels: int, receptive_field: int):
        super().__init__()
        self.trunk = ConvDecoder(latent_channels, WIDTH).net if latent_channels else None
        self.first = DifferenceConv2d("A", 3, WIDTH, 2 * receptive_field + 1)
        self.border = MaskedConv2d("A", 1, WIDTH, 2 * receptive_field + 1)
        self.level = nn.Conv2d(3, WIDTH, 1)
        blocks = [GatedResidualBlock(WIDTH, WIDTH, 1) for _ in range(DEPTH)]
        last = nn.Conv2d(WIDTH, PER_COMPONENT * COMPONENTS, 1)
        self.rest = nn.Sequential(*blocks, nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        bias = torch.zeros(PER_COMPONENT, COMPONENTS)
        bias[4:7] = torch.linspace(-3, 1, COMPONENTS)  # scales of 1 to 18 levels; from equal ones all learn the same
        last.bias = nn.Parameter(bias.flatten())

    def features(self, z: Tensor) -> Tensor:
        """[B, C, 8, 8] -> [B, WIDTH, 32, 32]; zeros if there is no code."""
        return self.trunk(z) if self.trunk else z.new_zeros(len(z), WIDTH, 32, 32)

    def at_the_border(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three things that depend on the place alone, in x's type.

        How many pixels the average is of, [1, 1, 32, 32] (in the corner 1, not 0); the sum of those weights of `first`
        that lie within the image, for each colour, [3, WIDTH, 32, 32]; and `border`, [1, WIDTH, 32, 32].
        """
        ones = x.new_ones(1, 1, 32, 32)
        colours = torch.eye(3, dtype=x.dtype, device=x.device)[:, :, None, None] * ones  # (3, 3, 32, 32)
        inside = F.conv2d(colours, self.first.kernel(), padding=self.first.padding)
        return sum_of_neighbours(ones).clamp(min=1), inside, self.border(ones)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x [B, 3, 32, 32] in [-1, 1], `features` of z [B, WIDTH, 32, 32] -> [B, 10 K, 32, 32]."""
        neighbours, inside, border = self.at_the_border(x)
        average = sum_of_neighbours(x) / neighbours
        seen = self.first(GAIN * x) - torch.einsum("cohw,bchw->bohw", inside, GAIN * average)
        return add_to_means(self.rest(seen + border + self.level(average) + features), average)

    @torch.no_grad()
    def sample(self, z: Tensor, u: Tensor, slope: int | None = None) -> Tensor:
        """x ~ p(x|z) from u ~ U[0, 1) [B or 1, K + 3, 32, 32] (see `mixture_sample`): uint8 [B, 3, 32, 32].

        One anti-diagonal after the other (see `wavefronts`), at the new positions only, in float64: any slope that is
        large enough draws the same levels.
        """
        net = float64_copy(self)
        features = self.features(z).to(net.level.weight.device).double()
        u64 = u.to(features.device).double() + 2.0**-25  # to the middle of its 24-bit bin
        x = features.new_zeros(len(z), 3, 32, 32)
        neighbours, inside, border = net.at_the_border(x)
        for i, j in wavefronts(32, 32, slope or wavefront_slope(self), x.device):
            average = (sum_of_neighbours(x) / neighbours)[:, :, i, j, None]  # (B, 3, P, 1)
            seen = net.first.at(GAIN * x, i, j) - torch.einsum("cop,bcpq->bopq", inside[:, :, i, j], GAIN * average)
            h = seen + border[:, :, i, j, None] + net.level(average) + features[:, :, i, j, None]  # (B, WIDTH, P, 1)
            x[:, :, i, j] = mixture_sample(add_to_means(net.rest(h), average), u64[:, :, i, j, None])[..., 0]
        return quantise(x).to(z.device)


class NoCode(nn.Module):
    """The encoder of a model without latents: q over nothing, so KL = 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nothing = x.new_zeros(len(x), 0, 8, 8)
        return nothing, nothing


class LossyVAE(VAE):
    """The VAE of 2b with a local PixelCNN as its decoder; recon + kl bounds -log P(levels) from above.

    levels uint8 [B, 3, 32, 32]. blind and free_bits: remedies for a code that stays empty, in training alone (`loss`).
    """

    decoder: LocalPixelCNN

    def __init__(self, latent_channels: int, receptive_field: int, prior: str, blind: float = 0, free_bits: float = 0):
        encoder = ConvEncoder(latent_channels) if latent_channels else NoCode()
        decoder = LocalPixelCNN(latent_channels, receptive_field)
        make_prior = PRIORS[prior] if latent_channels else StandardNormal
        super().__init__(encoder, decoder, make_prior((latent_channels, 8, 8)))
        self.blind, self.free_bits = blind if latent_channels else 0.0, free_bits

    def to_x(self, levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bin centres: the levels themselves are scored, so there is nothing to dequantise. [B, 3, 32, 32]."""
        return bin_centres(levels)

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """log P(levels | z). x: the levels' bin centres [B, 3, 32, 32] -> [B], nats."""
        return mixture_log_prob(quantise(x), self.decoder(x, self.decoder.features(z)))

    def loss(self, levels: Tensor, kl_weight: float = 1.0, done: float = 0.0) -> Tensor:
        """The negative ELBO with two changes, in bits/dim, [].

        Added: blind * (1 - done) times a second decoder term, in which pixels see z but no neighbours. A decoder learns
        faster from neighbours, and once it does without z it never uses z again. The term fades, as it asks for more in
        z than pays. Left out: a batch's KL if it is below free_bits, bits/dim (Kingma et al. 2016, arXiv:1606.04934).
        """
        x = self.to_x(levels)
        z, mu, log_std = self.posterior(x)
        features = self.decoder.features(z)
        recon = -mixture_log_prob(levels, self.decoder(x, features))
        if self.blind:
            recon = recon - self.blind * (1 - done) * mixture_log_prob(levels, self.decoder.rest(features))
        recon = bits_per_dim(recon.mean(), levels[0].numel())
        kl = bits_per_dim(self.kl(z, mu, log_std).mean(), levels[0].numel())
        if self.free_bits:
            kl = kl * (sum_over_processes(kl) / rank_and_world()[1] > self.free_bits)
        return recon + kl_weight * kl

    @torch.no_grad()
    def draw_levels(self, z: Tensor, *noise_key: Any, same: bool = False) -> Tensor:
        """x ~ p(x|z), uint8 [B, 3, 32, 32]; `same` noise for all of them, or each its own."""
        shape = (1 if same else len(z), COMPONENTS + 3, 32, 32)
        return self.decoder.sample(z, noise(torch.rand, shape, z.device, fixed_noise(*noise_key)))


def make_model(args: argparse.Namespace, **changes: int) -> LossyVAE:
    """The model of these arguments, with changes, from --seed."""
    torch.manual_seed(args.seed)
    flags = vars(args) | changes
    return LossyVAE(flags["latents"], flags["receptive_field"], flags["prior"], flags["blind"], flags["free_bits"])


# ------------------------------------------------------------------------------------------------------ the answers


def fit_variant(
    args: argparse.Namespace, splits: dict[str, Tensor], epochs: int, progress: Path, name: str, **changes: int
) -> Terms:
    """A model with changes to the flags that make it, trained as the main one: its terms on test, [N], nats."""
    model = to_device(make_model(args, **changes), args)
    fit(
        model, splits, epochs=epochs, batch_size=args.batch_size, lr=args.lr, muon_lr=args.muon_lr, name=name,
        schedule=args.schedule, kl_warmup=args.kl_warmup, seed=args.seed, precision=args.precision, resume=args.resume,
        path=progress / f"{name.replace(' ', '_')}.pt", run={"args": settings(args, but=("table_epochs",)) | changes},
    )  # fmt: skip
    return evaluate(model, splits["test"])


def compare_receptive_fields(args: argparse.Namespace, splits: dict[str, Tensor], progress: Path) -> list[Any]:
    """Test bounds of models that differ in their receptive field alone, after --table-epochs each."""
    rows = []
    for size in RECEPTIVE_FIELDS:
        terms = fit_variant(args, splits, args.table_epochs, progress, f"receptive field {size}", receptive_field=size)
        rows.append({"receptive_field": size, "epochs": args.table_epochs, **in_bits(terms, 3072)})
    return rows


@torch.no_grad()
def cost_of_another_code(model: LossyVAE, levels: Tensor) -> dict[str, float]:
    """By how much the decoder term rises where each image is decoded from the z of another; its mean, bits/dim."""
    costs, before = [], torch.empty(0)
    for x, z, _, _ in posteriors(model, levels):
        another = z.roll(1, 0) if len(z) > 1 else before  # the last batch may hold a single image
        costs.append(bits_per_dim(model.log_p_x(x, z) - model.log_p_x(x, another), levels[0].numel()))
        before = z[-1:]
    cost = torch.cat(costs)
    return {"another_code_costs_bpd": cost.mean().item(), "another_code_costs_se_bpd": standard_error(cost)}


def table_text(rows: list[dict[str, Any]]) -> str:
    """Whether the receptive field moves the code, then the table, from the rows alone."""
    lines = "\n".join(
        f"| {r['receptive_field']} | {r['neg_elbo_bpd']:.4f} ± {r['neg_elbo_se_bpd']:.4f} "
        f"| {r['kl_bpd']:.4f} ± {r['kl_se_bpd']:.4f} | {r['recon_bpd']:.4f} |"
        for r in rows
    )
    kl = [r["kl_bpd"] for r in rows]
    error = math.hypot(rows[0]["kl_se_bpd"], rows[-1]["kl_se_bpd"])
    verdict = "The KL does not clearly fall as the receptive field grows: this budget does not show the trade."
    if kl == sorted(kl, reverse=True) and kl[0] - kl[-1] > 2 * error:
        verdict = "The more of its neighbours a pixel sees, the less goes into z: the KL falls in every row."
    return f"""**{verdict}** Epochs of each row: {rows[0]["epochs"]}; one seed, on test.

| pixels seen above and left | −ELBO, bits/dim | KL: the code | decoder: the rest |
|---|---|---|---|
{lines}

![receptive fields](receptive_fields.png)
"""


def plot_table(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against decoder term, one point for each row of the table."""
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for r in rows:
        ax.errorbar(r["kl_bpd"], r["recon_bpd"], xerr=r["kl_se_bpd"], fmt="o", capsize=3)
        ax.text(r["kl_bpd"], r["recon_bpd"], f"  {r['receptive_field']}", va="bottom", fontsize=9)
    ax.set(xlabel="KL: the code, bits/dim (± 1 s.e.)", ylabel="decoder term, bits/dim")
    ax.margins(0.12)  # room for the labels
    ax.set_title(f"Receptive fields after {rows[0]['epochs']} epochs each, test", fontsize=10)
    save_figure(fig, path)


def nearest(samples: Tensor, train: Tensor) -> Tensor:
    """For each sample the training image at the least squared distance. uint8 [S, ...], [N, ...] -> [S, ...]."""
    x = samples.flatten(1).float()
    distances = [torch.cdist(x, some.flatten(1).float()) for some in train.split(4096)]  # less memory than all at once
    return train[torch.cat(distances, 1).argmin(1)]


def code_text(metrics: dict[str, Any]) -> str:
    """Whether the code is used, whether it pays, and what it holds."""
    args, cost, error = metrics["args"], metrics["another_code_costs_bpd"], metrics["another_code_costs_se_bpd"]
    used = "is used" if cost > 0.001 + 4 * error else "is not measurably used"
    bound = metrics["final"]["test"]["neg_elbo_bpd"]
    pays = "Whether it pays is not known here: the PixelCNN without a code was not trained."
    if no_code := metrics.get("no_code"):
        above, two_errors = no_code["above_bpd"], 2 * no_code["above_se_bpd"]
        answer = "pays" if above > two_errors else "does not pay" if above < -two_errors else "neither pays nor costs"
        pays = f"""**The code {answer}**: the same PixelCNN without latents, trained for as many epochs, needs
{no_code["neg_elbo_bpd"]:.4f} bits/dim, {above:+.4f} ± {no_code["above_se_bpd"]:.4f} against {bound:.4f} with the code
(paired by image; one seed each, whose spread is not in the error)."""
    positions = [bits for row in metrics["test_kl_per_position_bits"] for bits in row]
    return f"""**The code {used}**: decoded from another image's z, the decoder term rises by {cost:.4f} ± {error:.4f}
bits/dim (the first 4,000 test images, at most).

{pays}

The code of a test image holds at most {sum(positions):,.0f} bits of the {3072 * bound:,.0f} that the image costs:
{min(positions):.2f} to {max(positions):.2f} at a position of the 8 x 8 grid, where 0 would be a collapse to the prior.
Against a collapse, in training: `--blind {args["blind"]:g}` (fading to 0), `--free-bits {args["free_bits"]:g}`."""


def report(metrics: dict[str, Any]) -> str:
    """The handout's deliverables in its order, every number from metrics."""
    args, rows = metrics["args"], metrics.get("receptive_fields")
    neighbours = "\nTen of them, and the training images nearest to each:\n\n![neighbours](neighbours.png)\n"
    neighbours = neighbours if metrics["data"]["train"] else ""
    code = code_text(metrics) if "another_code_costs_bpd" in metrics else ""
    table = table_text(rows) if rows else "No receptive-field table was made (`--table-epochs`)."
    return f"""# Bonus: a lossy VAE with a local PixelCNN as its decoder

{training_text(metrics)} Receptive field {args["receptive_field"]}, {args["prior"]} prior.

## 1. The bound on train, validation and test

{bounds_text(metrics, colours_apart=False)}
## 2. Samples

![samples](samples.png)
{neighbours}
## 3. Interpolations

![interpolations](interpolations.png)

## Reconstructions

![reconstructions](reconstructions.png)

![lossy](lossy.png)

## What goes into z, and what the receptive field leaves to it

{code}

{table}
"""


# ---------------------------------------------------------------------------------------------------------------- main


def draw_figures(
    model: LossyVAE, splits: dict[str, Tensor], title: str, out: Path, samples: int, failed: dict[str, str]
) -> None:
    """100 samples, the training images nearest to ten of them, interpolations, reconstructions; single images."""
    with attempt("samples.png or neighbours.png", failed):
        x = model.draw_levels(model.prior.sample(100, fixed_noise("samples")), "pixels")
        plot_images({"x ~ p(x|z), z ~ p(z)": x}, 10, f"{title}\n100 samples", out / "samples.png")
        if len(splits["train"]):
            panels = {"samples": x[:10], "their nearest training images": nearest(x[:10], splits["train"])}
            plot_images(panels, 10, f"Not copies: {title}", out / "neighbours.png", stacked=True)
    shown = evenly_spaced(splits["test"], 10)
    codes = model.encoder(bin_centres(shown))[0]  # the posterior's means
    with attempt("interpolations.png", failed):
        in_z = model.draw_levels(straight_lines(codes, steps=10), "pixels", same=True)
        panels = {"straight in z": between_ends(shown, in_z)}
        if isinstance(model.prior, FlowPrior):
            eps = straight_lines(model.prior.z_to_eps(codes)[0], steps=10)
            in_eps = model.draw_levels(model.prior.eps_to_z(eps), "pixels", same=True)
            panels["straight in ε, the flow's noise"] = between_ends(shown, in_eps)
        name = f"{title}\ninterpolations, true test images at the ends"
        plot_images(panels, 12, name, out / "interpolations.png", stacked=True)
    with attempt("reconstructions.png", failed):
        panels = {"test images": shown, "x ~ p(x|z)": model.draw_levels(codes, "pixels")}
        name = f"{title}\ndecoded from the posterior's mean"
        plot_images(panels, 10, name, out / "reconstructions.png", stacked=True)
    with attempt("lossy.png", failed):
        draws = {f"x ~ p(x|z), draw {k} of one z": model.draw_levels(codes, "pixels", k) for k in (1, 2, 3)}
        name = f"Lossy: what z keeps, and what the PixelCNN redraws\n{title}"
        plot_images({"test images": shown, **draws}, 10, name, out / "lossy.png", stacked=True)
    with attempt("single samples", failed):
        for first in range(0, samples, 100):
            z = model.prior.sample(min(100, samples - first), fixed_noise("single samples", first))
            write_images(model.draw_levels(z, "single pixels", first), out / "samples", first)


@gives_folders_back()
def main(argv: list[str] | None = None) -> None:
    parser = ImageParser("bonus")
    add = parser.add_argument
    add("--receptive-field", type=number(int, 1, 15), help="rows above, and columns to each side, that a pixel sees")
    add("--prior", choices=tuple(PRIORS), help="of z")
    blind = "weight, fading to 0 over training, of a decoder term without neighbours, so that z is used"
    add("--blind", type=number(float, 0, 100), help=blind)
    add("--free-bits", type=number(float, 0, 8), help="in training, a batch's KL below so many bits/dim costs nothing")
    table = "epochs of each row of the receptive-field table; 0: no table (default: a fifth of --epochs)"
    add("--table-epochs", type=number(int, 0, 10**9), default=argparse.SUPPRESS, help=table)
    args, out = parse_args(parser, argv, DEFAULTS, SMOKE)
    vars(args).setdefault("table_epochs", math.ceil(args.epochs / 5))
    trained = load_trained(args, "bonus") if args.evaluate else None

    # 1. Data and model.
    data = load_images(args)
    splits = {name: x.to(args.device) for name, x in data.splits.items()}
    model = to_device(make_model(args), args, trained)
    prepare(out, args, len(splits["train"]))  # moves an earlier run's results aside, unless --resume

    # 2. Training. Its checkpoint is on disk before anything else is done; --evaluate takes an earlier one's.
    if trained:
        curves = trained["curves"]
    else:
        curves = fit(
            model, splits, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
            muon_lr=args.muon_lr, schedule=args.schedule, kl_warmup=args.kl_warmup, seed=args.seed,
            precision=args.precision, path=out / "checkpoint.pt", resume=args.resume,
            run={"script": "bonus", "args": settings(args, but=("table_epochs",))},
        )  # fmt: skip

    # 3. Bounds on all of validation and test, and as many images of train. Written before the figures are drawn.
    metrics = describe_run("bonus", args, data.describe(), model) | {"curves": curves}
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
    test = splits["test"]
    with attempt("curves.png", failed):
        if trained:
            plot_curves(curves, "the training of the checkpoint", out / "curves.png")
        else:
            name = f"bonus, {data.name}\ntest −ELBO {metrics['final']['test']['neg_elbo_bpd']:.3f} bits/dim"
            plot_curves(curves, name, out / "curves.png", metrics.get("floor"))
    title = f"bonus: receptive field {args.receptive_field}, {args.prior} prior, {data.name}"
    with torch.no_grad():
        draw_figures(model, splits, title, out, args.samples, failed)
    with attempt("the error of one draw", failed):  # from a second draw for 1,000 images
        metrics["test_draw_se_bpd"] = error_of_one_draw(model, test, terms["test"].neg_elbo)
    with attempt("the check of the prior", failed):  # against autograd's Jacobian: 0 up to rounding
        metrics["check_prior_nats"] = check_prior(model.prior)
    with attempt("codecs", failed):
        metrics["test_codecs_bpd"] = {codec: codec_bits_per_dim(test[:1000], codec) for codec in CODECS}

    # 5. Experiments: does the code pay, is it used, and what does the receptive field leave to it?
    if not trained:
        with attempt("the model without a code", failed):
            without = fit_variant(args, splits, args.epochs, out / "progress", "no code", latents=0)
            above = bits_per_dim(without.neg_elbo - terms["test"].neg_elbo, 3072)  # paired by image
            metrics["no_code"] = in_bits(without, 3072)
            metrics["no_code"] |= {"above_bpd": above.mean().item(), "above_se_bpd": standard_error(above)}
    with attempt("the use of the code", failed):
        metrics["test_kl_per_position_bits"] = kl_per_position(model, test).tolist()
        metrics |= cost_of_another_code(model, test[:4000])
    if args.table_epochs and not trained:
        with attempt("the receptive-field table", failed):
            metrics["receptive_fields"] = compare_receptive_fields(args, splits, out / "progress")
            plot_table(metrics["receptive_fields"], out / "receptive_fields.png")

    # 6. Report.
    write_metrics(out, args, metrics | {"failed": failed})
    write_report(out, report(metrics), failed)


if __name__ == "__main__" and not pasted_into_cell():
    launch(main)
