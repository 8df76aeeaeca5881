"""Bonus: a variational lossy autoencoder. 2b's encoder and prior; a PixelCNN that sees only its neighbours as decoder.

    log p(x|z) = sum_i log p(x_i | z, those of x_<i within the receptive field),   i over the 32 x 32 pixels

Each factor is a mixture of 10 logistics, discretised to the 256 levels (arXiv:1701.05517), so that KL + decoder term
bounds the code length of the image as it is, without dequantisation. What a pixel can learn from its neighbours need
not go through z: the smaller the receptive field, the more does (arXiv:1611.02731).

    python bonus.py --epochs 20                  ->  results/bonus/report.md, on SVHN (downloaded)
    python bonus.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
    python bonus.py --evaluate results/bonus/checkpoint.pt --data FILE.npz  ->  results/bonus/evaluate/metrics.json
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import (  # before torch, whose import reads what core has set
    IMAGE_DEFAULTS, IMAGE_SMOKE, VAE, ConvDecoder, ConvEncoder, FlowPrior, GatedResidualBlock, MaskedConv2d, Noise,
    StandardNormal, at_least_fp32, bits_per_dim, bounded_log_std, dequantise, evaluate_splits, exact, fit, in_notebook,
    launch, number, parse_args, plot_tiles, posteriors, quantise, run_images, save_figure, spread, standard_error,
    sum_dims, wavefront_slope, wavefronts,
)  # fmt: skip

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAIN = 8  # by which the differences between neighbours are enlarged before the first layer
COMPONENTS = 10  # logistics in a pixel's mixture
WIDTH, DEPTH = 128, 3  # channels and gated blocks of the PixelCNN
PRIORS = {"normal": StandardNormal, "flow": FlowPrior}
DEFAULTS = {**IMAGE_DEFAULTS, "lr": 2e-3, "receptive_field": 3, "prior": "flow", "blind": 1.0, "free_bits": 0.0}
SMOKE = {**IMAGE_SMOKE, "table_epochs": 1}
TABLE = ((1, None), (2, None), (3, None), (3, 0))  # receptive field and latents (None: --latents) of the table's rows


# ----------------------------------------------------------------------------------------- the pixel's distribution


def logistic_log_prob(levels: Tensor, mu: Tensor, log_scale: Tensor, num_levels: int = 256) -> Tensor:
    """log P(level) of a logistic on [-1, 1], discretised to equal bins; elementwise, nats.

    Level v is the bin from 2v/L - 1 to 2(v+1)/L - 1, the first and the last with the tails. With a < b the edges in
    units of the scale, all in log space, so that nothing underflows and no gradient is lost:
        log(sigmoid(b) - sigmoid(a)) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b))
    """
    step, sharpness = 2 / num_levels, torch.exp(-log_scale)
    a, b = ((levels * step - 1 - mu) * sharpness, ((levels + 1) * step - 1 - mu) * sharpness)
    inside = F.logsigmoid(b) + F.logsigmoid(-a) + torch.log(-torch.expm1(-step * sharpness))
    edges = torch.where(levels == 0, F.logsigmoid(b), F.logsigmoid(-a))
    return torch.where((levels == 0) | (levels == num_levels - 1), edges, inside)


def split_params(params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, 10 K, ...] -> logits [B, K, ...]; mu, log scale and colour coefficients, each [B, K, 3, ...]."""
    logits, *rest = at_least_fp32(params).unflatten(1, (10, -1)).split((1, 3, 3, 3), 1)
    mu, raw, coefficients = (t.transpose(1, 2) for t in rest)
    return logits[:, 0], mu, bounded_log_std(raw - 3), torch.tanh(coefficients)  # scales start near 6 levels


def add_to_means(params: Tensor, x: Tensor) -> Tensor:
    """Add x [B, 3, ...] to the means of all K components in params [B, 10 K, ...]; in float32 or wider."""
    shift = torch.cat([torch.zeros_like(x[:, :1]), x, torch.zeros_like(x), torch.zeros_like(x)], 1)  # (B, 10, ...)
    return (at_least_fp32(params).unflatten(1, (10, -1)) + shift[:, :, None]).flatten(1, 2)


def mixture_log_prob(levels: Tensor, params: Tensor, num_levels: int = 256) -> Tensor:
    """log P of pixels under a mixture each, the colours of a component in the order R -> G -> B, summed over pixels.

    A component's mean of G is moved by c0 (R - mu_R), its mean of B by c1 (R - mu_R) + c2 (G - mu_G), with R and G the
    true levels' bin centres in [-1, 1]: so the three colours are one joint distribution (Salimans et al. 2017,
    arXiv:1701.05517, section 2.2; there without the subtraction, which is the same family in other coordinates).
    levels [B, 3, H, W] integers, params [B, 10 K, H, W] -> [B], nats.
    """
    logits, mu, log_scale, (c0, c1, c2) = *(t := split_params(params))[:3], t[3].unbind(2)
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
    logits, *rest = split_params(params)
    chosen = (logits - torch.log(-torch.log(u[:, :-3]))).argmax(1)[:, None, None].expand(-1, -1, 3, -1, -1)
    mu, log_scale, c = (t.gather(1, chosen)[:, 0].unbind(1) for t in rest)  # three of (B, P, 1) each

    def draw(k: int, shift: Tensor) -> Tensor:
        x = mu[k] + shift + torch.exp(log_scale[k]) * torch.logit(u[:, k - 3])
        return dequantise(quantise(x), torch.full_like(x, 0.5))

    r = draw(0, torch.zeros_like(mu[0]))
    g = draw(1, c[0] * (r - mu[0]))
    return torch.stack([r, g, draw(2, c[1] * (r - mu[0]) + c[2] * (g - mu[1]))], 1)


# -------------------------------------------------------------------------------------------------------- the model


class LocalPixelCNN(nn.Module):
    """Mixture parameters of every pixel, from z and from its neighbours before it in raster order.

    One masked convolution sees `receptive_field` rows above and as many columns to each side (in the paper's notation
    3 is 7 x 4); z's features of that pixel are added; the rest is 1 x 1, so that nothing else is seen. Neighbouring
    pixels are nearly equal, and what is new is in their small differences. So the convolution sees differences only
    (the level itself enters through the average below), and the means are corrections to the average of the pixels
    to the left and above, added in fp32: bf16's 8 bits would blur the levels.
    """

    def __init__(self, latent_channels: int, receptive_field: int):
        super().__init__()
        self.trunk = ConvDecoder(latent_channels, WIDTH).net if latent_channels else None
        self.first = MaskedConv2d("A", 3, WIDTH, 2 * receptive_field + 1, differences=True)
        self.average, self.level = MaskedConv2d("A", 3, 3, 3).requires_grad_(False), nn.Conv2d(3, WIDTH, 1)
        blocks, last = [GatedResidualBlock(WIDTH, WIDTH, 1) for _ in range(DEPTH)], nn.Conv2d(WIDTH, 10 * COMPONENTS, 1)
        self.rest = nn.Sequential(*blocks, nn.ReLU(), last)
        with torch.no_grad():
            for parameter in (*self.average.parameters(), *last.parameters()):
                parameter.zero_()
            self.average.weight[range(3), range(3), 1, 0] = self.average.weight[range(3), range(3), 0, 1] = 0.5
            last.get_parameter("bias")[4 * COMPONENTS : 7 * COMPONENTS] = torch.linspace(-3, 1, COMPONENTS).repeat(3)

    def features(self, z: Tensor) -> Tensor:
        """[B, C, 8, 8] -> [B, WIDTH, 32, 32]; zeros where there is no code."""
        return self.trunk(z) if self.trunk else z.new_zeros(len(z), WIDTH, 32, 32)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x [B, 3, 32, 32] in [-1, 1], `features` of z [B, WIDTH, 32, 32] -> [B, 10 K, 32, 32]."""
        with torch.autocast(x.device.type, enabled=False):
            average = self.average(x)
        return add_to_means(self.rest(self.first(GAIN * x) + self.level(average) + features), average)

    @torch.no_grad()
    def sample(self, z: Tensor, noise: Noise, slope: int | None = None) -> Tensor:
        """x ~ p(x|z), one anti-diagonal after the other (see `wavefronts`): uint8 [B, 3, 32, 32].

        Only the new positions are computed, in float64: any valid slope draws the same levels.
        """
        first, average, level, rest = (exact(net) for net in (self.first, self.average, self.level, self.rest))
        features = self.features(z)
        u = noise.uniform(COMPONENTS + 3, 32, 32).to(first.weight) + 2.0**-25  # to the middle of its 24-bit bin
        x = u.new_zeros(len(z), 3, 32, 32)
        for i, j in wavefronts(32, 32, slope or wavefront_slope(self)):
            mean = average.at(x, i, j)  # (B, 3, P, 1)
            h = first.at(GAIN * x, i, j) + level(mean) + features[:, :, i, j, None].to(x)  # (B, WIDTH, P, 1)
            x[:, :, i, j] = mixture_sample(add_to_means(rest(h), mean), u[:, :, i, j, None])[..., 0]
        return quantise(x).to(z.device)


class NoCode(nn.Module):
    """The encoder of a model without latents: q over nothing, so KL = 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nothing = x.new_zeros(len(x), 0, 8, 8)
        return nothing, nothing


class LossyVAE(VAE):
    """The VAE of 2b with a local PixelCNN as its decoder: levels in, log P(levels) out."""

    decoder: LocalPixelCNN

    def __init__(self, latent_channels: int, receptive_field: int, prior: str, blind: float = 0.0):
        encoder = ConvEncoder(latent_channels) if latent_channels else NoCode()
        make_prior = PRIORS[prior] if latent_channels else StandardNormal
        decoder = LocalPixelCNN(latent_channels, receptive_field)
        super().__init__(encoder, decoder, make_prior((latent_channels, 8, 8)))
        self.blind = blind if latent_channels else 0.0

    def forward(self, levels: Tensor, noise: Noise) -> Any:
        """levels uint8 [B, 3, 32, 32] -> Terms of [B], nats, whose sum bounds -log P(levels) from above."""
        return super().forward(self.to_x(levels, noise), noise)

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """log P(levels | z). x: the levels' bin centres [B, 3, 32, 32] -> [B], nats.

        In training, plus `blind` times the same for a decoder that sees no neighbours: neighbours teach the decoder
        faster than z does, and one that has learned to do without z never asks for it again.
        """
        levels, features = quantise(x), self.decoder.features(z)
        log_p = mixture_log_prob(levels, self.decoder(x, features))
        if self.training and self.blind:
            log_p = log_p + self.blind * mixture_log_prob(levels, self.decoder.rest(features))
        return log_p

    def to_x(self, levels: Tensor, noise: Noise | None = None) -> Tensor:
        """Bin centres: uint8 [B, 3, 32, 32] -> the same in [-1, 1]."""
        return dequantise(levels, torch.full_like(levels, 0.5, dtype=torch.float32))

    def to_z(self, levels: Tensor) -> Tensor:
        """The posterior mean. uint8 [B, 3, 32, 32] -> [B, C, 8, 8]."""
        return self.encoder(self.to_x(levels))[0]

    def to_images(self, z: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Pictures of z, [B, C, 8, 8], by title: uint8 [B, 3, 32, 32]."""
        return {"x ~ p(x|z)": self.decoder.sample(z, noise)}


def make_model(args: argparse.Namespace) -> LossyVAE:
    return LossyVAE(args.latents, args.receptive_field, args.prior, args.blind)


# ------------------------------------------------------------------------------------------------------ the answers


def compare_receptive_fields(
    splits: dict[str, Tensor], args: argparse.Namespace, progress: Path
) -> list[dict[str, Any]]:
    """Test bounds of models that differ in receptive field or in having a code at all, all on the same small budget."""
    rows = []
    for receptive_field, latents in TABLE:
        latents = args.latents if latents is None else latents
        print(f"receptive field {receptive_field}, {latents} latent channels:")
        changes = {"receptive_field": receptive_field, "latents": latents, "epochs": args.table_epochs}
        row_args = argparse.Namespace(**{**vars(args), **changes})
        torch.manual_seed(args.seed)
        model = make_model(row_args).to(args.device).to(memory_format=torch.channels_last)
        keep = progress / f"table_{receptive_field}_{latents}.pt"
        fit(model, splits, row_args, keep, free_bits=args.free_bits)
        rows.append({**changes, **evaluate_splits(model, splits)["test"]})
    return rows


@torch.no_grad()
def cost_of_another_code(model: LossyVAE, levels: Tensor) -> dict[str, float]:
    """By how much the decoder term rises where each image is decoded from its neighbour's z; its mean, bits/dim."""
    costs = []
    for x, z, _, _ in posteriors(model, levels):
        costs.append(bits_per_dim(model.log_p_x(x, z) - model.log_p_x(x, z.roll(1, 0)), levels[0].numel()))
    cost = torch.cat(costs)
    return {"another_code_costs_bpd": cost.mean().item(), "another_code_costs_se_bpd": standard_error(cost)}


def table_text(rows: list[dict[str, Any]]) -> str:
    """The receptive-field table, and what moved between its two parts, from the rows alone."""
    lines = "\n".join(
        f"| {r['receptive_field']} | {r['latents'] or 'none'} | {r['neg_elbo_bpd']:.4f} ± {r['neg_elbo_se_bpd']:.4f} "
        f"| {r['kl_bpd']:.4f} | {r['recon_bpd']:.4f} |"
        for r in rows
    )
    first, *_, last = coded = [r for r in rows if r["latents"]]
    error = math.hypot(first["kl_se_bpd"], last["kl_se_bpd"])
    falls = all(a["kl_bpd"] > b["kl_bpd"] for a, b in itertools.pairwise(coded))
    verdict = (
        "The more of its neighbours a pixel sees, the less went into z: the KL falls in every row."
        if falls and first["kl_bpd"] - last["kl_bpd"] > 2 * error
        else "The KL does not clearly fall as the receptive field grows: this budget does not show the trade."
    )
    return f"""
| pixels seen above and left | latent channels | −ELBO, bits/dim | KL: the code | decoder: the rest |
|---|---|---|---|---|
{lines}

{rows[0]["epochs"]} epochs each; test. {verdict}
From a receptive field of {first["receptive_field"]} to one of {last["receptive_field"]} the code changed by
{last["kl_bpd"] - first["kl_bpd"]:+.4f} ± {error:.4f} and the decoder term by
{last["recon_bpd"] - first["recon_bpd"]:+.4f} bits/dim. The last row has no code: its PixelCNN is alone.
"""


def plot_table(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against decoder term, one point for each row of the table."""
    fig, ax = plt.subplots(figsize=(6, 4))
    for r in rows:
        label = f"{r['receptive_field']}" if r["latents"] else f"{r['receptive_field']}, no code"
        ax.errorbar(r["kl_bpd"], r["recon_bpd"], xerr=r["kl_se_bpd"], fmt="o" if r["latents"] else "s", capsize=3)
        ax.annotate(label, (r["kl_bpd"], r["recon_bpd"]), xytext=(6, 4), textcoords="offset points", fontsize=9)
    ax.set(xlabel="KL: the code, bits/dim (± 1 s.e.)", ylabel="decoder term, bits/dim")
    ax.margins(0.12)  # room for the labels
    ax.set_title(f"Receptive fields after {rows[0]['epochs']} epochs each, test", fontsize=10)
    save_figure(fig, path)


def nearest(samples: Tensor, train: Tensor) -> Tensor:
    """For each sample the training image at the least squared distance. uint8 [S, ...], [N, ...] -> [S, ...]."""
    distances = torch.cdist(samples.flatten(1).float(), train.flatten(1).float())
    return train[distances.argmin(1)]


def finish(args: argparse.Namespace, model: LossyVAE, splits: dict[str, Tensor], metrics: dict, out: Path) -> str:
    """lossy.png, the receptive-field table, and the part of the report that holds them."""
    shown = spread(splits["test"], 10)
    z, few = model.to_z(shown), torch.arange(len(shown), device=shown.device)
    draws = {f"x ~ p(x|z), draw {k} of one z": model.decoder.sample(z, Noise.fixed(few, seed=k)) for k in (1, 2, 3)}
    title = f"Lossy: what z keeps, and what the PixelCNN redraws; receptive field {args.receptive_field}, "
    panels = {"test images": shown, **draws}
    plot_tiles(panels, len(shown), title + metrics["data"]["name"], out / "lossy.png", stacked=True)
    ten = torch.arange(10, device=shown.device)
    samples = model.decoder.sample(model.prior.sample(Noise.fixed(ten, 1)), Noise.fixed(ten, 1))
    panels = {"samples": samples, "their nearest training images": nearest(samples, splits["train"])}
    plot_tiles(panels, 10, f"Not copies: {metrics['data']['name']}", out / "neighbours.png", stacked=True)
    metrics["receptive_fields"] = compare_receptive_fields(splits, args, out / "progress") if args.table_epochs else []
    metrics |= cost_of_another_code(model.eval(), splits["test"][:4000])
    cost, error = metrics["another_code_costs_bpd"], metrics["another_code_costs_se_bpd"]
    used = "is used" if cost > 0.001 + 4 * error else "is not measurably used"
    bound = metrics["final"]["test"]["neg_elbo_bpd"]
    positions = [bits for row in metrics["test_kl_per_position_bits"] for bits in row]
    table = "\nNot run: `--table-epochs 0`.\n"
    if args.table_epochs:
        plot_table(metrics["receptive_fields"], out / "receptive_fields.png")
        table = table_text(metrics["receptive_fields"]) + "\n![receptive fields](receptive_fields.png)\n"
    return f"""
## Lossy reconstructions

![lossy](lossy.png)

**The code {used}**: decoded from another image's z, the decoder term rises by {cost:.4f} ± {error:.4f} bits/dim (the
first 4,000 test images, at most), which is {3072 * cost:,.0f} bits an image. The code of a test image holds
{sum(positions):,.0f} bits of the {3072 * bound:,.0f} that the image costs. Each position of the 8 x 8 grid costs
{min(positions):.2f} to {max(positions):.2f} bits on average: one at 0 has collapsed to the prior. The remedies, in
training alone: `--blind`, the weight of a second decoder term whose pixels see no neighbours, so that z has to hold the
picture, here {args.blind:g}; and `--free-bits`, bits/dim of KL that are not charged for, here {args.free_bits:g}.

## Ten samples and the training images nearest to them

![neighbours](neighbours.png)

## What goes into z, and what the receptive field leaves to it
{table}"""


def flags(add: Callable[..., Any]) -> None:
    """The flags that only this script has."""
    add("--receptive-field", type=number(int, 1, 15), help="rows above, and columns to each side, that a pixel sees")
    add("--prior", choices=tuple(PRIORS), help="of z")
    blind = "weight, in training, of a decoder term without neighbours, so that z is used; bounds are without it"
    add("--blind", type=number(float, 0, 100), help=blind)
    add("--free-bits", type=number(float, 0, 8), help="bits/dim of KL that training does not charge for")
    add("--table-epochs", type=number(int, 0, 10**9), help="of each row of the receptive-field table; 0: no table")


def main(argv: list[str] | None = None) -> None:
    args, out = parse_args("bonus", argv, DEFAULTS, SMOKE, images=True, more=flags)
    if args.table_epochs is None:
        args.table_epochs = -(-args.epochs // 5)
    heading = f"bonus: a lossy VAE, PixelCNN decoder of receptive field {args.receptive_field}, {args.prior} prior"
    run_images("bonus", args, out, make_model, heading, functools.partial(finish, args))


if __name__ == "__main__" and not in_notebook():
    launch(main)
