"""Bonus: a variational lossy autoencoder. 2b's encoder and prior; as decoder, a PixelCNN that sees near pixels only.

    log p(x|z) = sum_i log p(x_i | z, those of x_<i within the receptive field),   i over the 32 x 32 pixels

Each factor is a mixture of 10 logistics, discretised to the 256 levels (arXiv:1701.05517): KL + decoder term bounds the
code length of the image as it is, without dequantisation. What a pixel can learn from its neighbours need not go
through z: the smaller the receptive field, the more should (arXiv:1611.02731).

    python bonus.py --epochs 20                  ->  results/bonus/report.md, on SVHN (downloaded)
    python bonus.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline

Then the same PixelCNN is trained without a code, as long; and three receptive fields, for a fifth of the epochs each.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from core import VAE, ConvDecoder, ConvEncoder, FlowPrior, StandardNormal, bits_per_dim

COMPONENTS = 10  # K, the logistics in a pixel's mixture
PER_COMPONENT = 1 + 3 + 3 + 3  # parameters: its logit; the colours' means, log scales and three coefficients
WIDTH, DEPTH = 128, 3  # channels and gated blocks of the PixelCNN
GAIN = 8  # enlarges the small differences between neighbours
RECEPTIVE_FIELDS = (1, 2, 3)  # of the table's rows
PRIORS = {"normal": StandardNormal, "flow": FlowPrior}
# kl_warmup: under the rule's rising weight, the KL is still falling at the end.
DEFAULTS = dict(epochs=20, latents=16, data="svhn", receptive_field=3, prior="flow", blind=1, kl_warmup=0.0)
SMOKE = dict(epochs=1, limit=48, latents=4, data="synthetic", table_epochs=1)


# --- the pixel's distribution


def logistic_log_prob(levels: Tensor, mu: Tensor, log_scale: Tensor, num_levels: int = 256) -> Tensor:
    """log P(level) of a logistic on [-1, 1], discretised to equal bins; elementwise, nats.
    Level v is the bin from 2v/L - 1 to 2(v+1)/L - 1, the first and last with the tails. With a < b the edges in units
    of the scale, in log space, so that nothing underflows:
        log(sigmoid(b) - sigmoid(a)) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b))"""
    step, sharpness = 2 / num_levels, torch.exp(-log_scale)
    a = (levels * step - 1 - mu) * sharpness
    b = ((levels + 1.0) * step - 1 - mu) * sharpness  # in floats, as in uint8 255 + 1 is 0
    up_to_b, from_a = F.logsigmoid(b), F.logsigmoid(-a)  # log P of this level or below; of this or above
    inside = up_to_b + from_a + torch.log(-torch.expm1(-step * sharpness))
    return torch.where(levels == 0, up_to_b, torch.where(levels == num_levels - 1, from_a, inside))


def split_params(params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, 10 K, ...] -> logits [B, K, ...]; mu, log scale and colour coefficients, each [B, K, 3, ...]."""
    logits, *of_colours = core.at_least_fp32(params).unflatten(1, (PER_COMPONENT, -1)).split((1, 3, 3, 3), 1)
    mu, raw, coefficients = (t.transpose(1, 2) for t in of_colours)
    return logits[:, 0], mu, core.bounded_log_std(raw - 3), torch.tanh(coefficients)  # raw = 0: a scale of 7.6 levels


def add_to_means(params: Tensor, x: Tensor) -> Tensor:
    """Add x [B, 3, ...] to the means of all K components in params [B, 10 K, ...], in x's float32 or wider."""
    shift = torch.cat([torch.zeros_like(x[:, :1]), x, torch.zeros_like(x), torch.zeros_like(x)], 1)  # (B, 10, ...)
    return (params.unflatten(1, (PER_COMPONENT, -1)) + shift[:, :, None]).flatten(1, 2)


def mixture_log_prob(levels: Tensor, params: Tensor, num_levels: int = 256) -> Tensor:
    """log P of pixels under a mixture each, colours in the order R -> G -> B, summed over pixels.
    A component's mean of G is moved by c0 (R - mu_R), its mean of B by c1 (R - mu_R) + c2 (G - mu_G), with the true
    levels' bin centres: one joint distribution of the three (Salimans et al. 2017, arXiv:1701.05517, section 2.2).
    levels [B, 3, H, W] integers, params [B, 10 K, H, W] -> [B], nats."""
    logits, mu, log_scale, coefficients = split_params(params)
    c0, c1, c2 = coefficients.unbind(2)
    x = ((levels + 0.5) * (2 / num_levels) - 1)[:, None]
    r, g, _ = (x - mu).unbind(2)  # each (B, K, H, W)
    mu = mu + torch.stack([torch.zeros_like(c0), c0 * r, c1 * r + c2 * g], 2)
    log_p = logistic_log_prob(levels[:, None], mu, log_scale, num_levels).sum(2)  # (B, K, H, W)
    return core.sum_dims(torch.logsumexp(F.log_softmax(logits, 1) + log_p, 1))


def mixture_sample(params: Tensor, u: Tensor) -> Tensor:
    """Colours drawn by uniform noise from `mixture_log_prob`'s distribution, as bin centres in [-1, 1].
    params [B, 10 K, P, 1], u in (0, 1) [B, K + 3, P, 1]: K to choose the component (Gumbel-max), 3 for the colours.
    -> [B, 3, P, 1]."""
    logits, *of_colours = split_params(params)
    chosen = (logits - torch.log(-torch.log(u[:, :-3]))).argmax(1)[:, None, None].expand(-1, -1, 3, -1, -1)
    mu, log_scale, c = (t.gather(1, chosen)[:, 0].unbind(1) for t in of_colours)  # three of (B, P, 1) each

    def colour(k: int, shift: Tensor) -> Tensor:
        x = mu[k] + shift + torch.exp(log_scale[k]) * torch.logit(u[:, k - 3])
        return core.bin_centres(core.quantise(x)).to(x.dtype)

    r = colour(0, torch.zeros_like(mu[0]))
    g = colour(1, c[0] * (r - mu[0]))
    return torch.stack([r, g, colour(2, c[1] * (r - mu[0]) + c[2] * (g - mu[1]))], 1)


# --- the model


class LocalPixelCNN(nn.Module):
    """Mixture parameters of every pixel, from z and from its neighbours before it in raster order.
    Its T = 2 n (n + 1) neighbours are those in n = `receptive_field` rows above, up to n columns to each side, and n to
    its left (the paper's 7 x 4 is n = 3). They are gathered; all else is 1 x 1, so that nothing else is seen.
    Neighbours are nearly equal: each is seen as its difference from the average of the pixels to the left and above.
    The mixture's means are corrections to it, added in fp32, as bf16's 8 bits would blur the levels."""

    def __init__(self, latent_channels: int, receptive_field: int):
        super().__init__()
        self.receptive_field = n = receptive_field
        self.trunk = ConvDecoder(latent_channels, WIDTH).net if latent_channels else None
        self.first = nn.Conv2d(4 * 2 * n * (n + 1) + 3, WIDTH, 1)  # from what `neighbours` gives
        blocks = [core.GatedResidualBlock(WIDTH, WIDTH, 1) for _ in range(DEPTH)]
        last = nn.Conv2d(WIDTH, PER_COMPONENT * COMPONENTS, 1)
        self.rest = nn.Sequential(*blocks, nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        bias = torch.zeros(PER_COMPONENT, COMPONENTS)
        bias[4:7] = torch.linspace(-3, 1, COMPONENTS)  # scales of 1 to 18 levels; from equal ones all learn the same
        last.bias = nn.Parameter(bias.flatten())

    def features(self, z: Tensor) -> Tensor:
        """[B, C, 8, 8] -> [B, WIDTH, 32, 32]; zeros if there is no code."""
        return self.trunk(z) if self.trunk else z.new_zeros(len(z), WIDTH, 32, 32)

    def neighbours(self, x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """What the pixels (i, j), int64 indices that broadcast to [P, Q], see of x [B, 3, 32, 32].
        -> [B, 4 T + 3, P, Q]: GAIN (neighbour - average) for each colour, 0 outside the image; whether the neighbour is
        inside, 1 or 0; and the average, of those of its two pixels that are inside (0 in the corner)."""
        n = self.receptive_field
        t = torch.arange(2 * n * (n + 1), device=x.device)[:, None, None]  # in raster order; the pixel itself is next
        padded = F.pad(torch.cat([x, torch.ones_like(x[:, :1])], 1), (n, n, n, 0))
        window = padded[:, :, i + t // (2 * n + 1), j + t % (2 * n + 1)]  # (B, 4, T, P, Q)
        left, above, inside = window[:, :, -1], window[:, :, -2 * n - 1], window[:, 3]
        average = (left + above)[:, :3] / (left + above)[:, 3:].clamp(min=1)
        differences = GAIN * (window[:, :3] - average[:, :, None]) * inside[:, None]
        return torch.cat([differences.flatten(1, 2), inside, average], 1)

    def at(self, x: Tensor, features: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """`forward` at the pixels in rows i and columns j: features [B, WIDTH, P, Q] -> [B, 10 K, P, Q]."""
        seen = self.neighbours(x, i, j)
        return add_to_means(self.rest(features + self.first(seen)), seen[:, -3:])

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x [B, 3, 32, 32] in [-1, 1], `features` of z [B, WIDTH, 32, 32] -> [B, 10 K, 32, 32]."""
        i = torch.arange(32, device=x.device)
        return self.at(x, features, i[:, None], i)

    @torch.no_grad()
    def sample(self, z: Tensor, u: Tensor, slope: int | None = None) -> Tensor:
        """x ~ p(x|z) from u ~ U[0, 1) [B or 1, K + 3, 32, 32] (see `mixture_sample`): uint8 [B, 3, 32, 32].
        One anti-diagonal after the other (`wavefronts`), at the new positions only; in float64 on the CPU: any device
        and any slope that is large enough draw the same levels."""
        net = copy.deepcopy(self).cpu().double()
        features = self.features(z).cpu().double()
        u64 = u.cpu().double() + 2.0**-25  # to the middle of its 24-bit bin
        x = features.new_zeros(len(z), 3, 32, 32)
        for i, j in wavefronts(slope or self.receptive_field + 1):
            x[:, :, i, j] = mixture_sample(net.at(x, features[:, :, i, j], i, j), u64[:, :, i, j])
        return core.quantise(x).to(z.device)


def wavefronts(slope: int) -> list[tuple[Tensor, Tensor]]:
    """The 32 x 32 positions in groups of equal j + slope i, in that order: rows i, columns j, each int64 [P, 1].
    With slope n + 1 every neighbour is in an earlier group (n columns right, a row up: n - slope = -1): a group is
    drawn at once. Slope 32 is raster order."""
    groups = [[i for i in range(32) if 0 <= k - slope * i < 32] for k in range(31 * slope + 32)]
    rows = [torch.tensor(group, device="cpu")[:, None] for group in groups]
    return [(i, k - slope * i) for k, i in enumerate(rows)]


class NoCode(nn.Module):
    """The encoder of a model without latents: q over nothing, so KL = 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nothing = x.new_zeros(len(x), 0, 8, 8)
        return nothing, nothing


class LossyVAE(VAE):
    """The VAE of 2b with a local PixelCNN as its decoder; recon + kl bounds -log P(levels) from above.
    levels uint8 [B, 3, 32, 32]. blind: a remedy for a code that stays empty (`loss`)."""

    decoder: LocalPixelCNN

    def __init__(self, latent_channels: int, receptive_field: int, prior: str, blind: float = 0):
        encoder = ConvEncoder(latent_channels) if latent_channels else NoCode()
        decoder = LocalPixelCNN(latent_channels, receptive_field)
        make_prior = PRIORS[prior] if latent_channels else StandardNormal
        super().__init__(encoder, decoder, make_prior((latent_channels, 8, 8)))
        self.blind = blind if latent_channels else 0.0

    def to_x(self, levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bin centres: the levels themselves are scored, so there is nothing to dequantise. [B, 3, 32, 32]."""
        return core.bin_centres(levels)

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """log P(levels | z). x: the levels' bin centres [B, 3, 32, 32] -> [B], nats."""
        return mixture_log_prob(core.quantise(x), self.decoder(x, self.decoder.features(z)))

    def loss(self, levels: Tensor, kl_weight: float = 1.0, done: float = 0.0) -> Tensor:
        """The negative ELBO, and blind * (1 - done) times a second decoder term, bits/dim, [].
        In it pixels see z but no neighbours: a decoder learns faster from neighbours, and once it does without z it
        never uses z again. It fades, as it asks for more in z than pays."""
        x = self.to_x(levels)
        z, mu, log_std = self.posterior(x)
        features = self.decoder.features(z)
        nats = kl_weight * self.kl(z, mu, log_std) - mixture_log_prob(levels, self.decoder(x, features))
        if self.blind:
            nats = nats - self.blind * (1 - done) * mixture_log_prob(levels, self.decoder.rest(features))
        return bits_per_dim(nats.mean(), levels[0].numel())

    @torch.no_grad()
    def draw_levels(self, z: Tensor, *noise_key: Any, same: bool = False) -> Tensor:
        """x ~ p(x|z), uint8 [B, 3, 32, 32]; `same` noise for all of them, or each its own."""
        shape = (1 if same else len(z), COMPONENTS + 3, 32, 32)
        return self.decoder.sample(z, core.noise(torch.rand, shape, "cpu", core.fixed_noise(*noise_key)))


# --- the answers


@torch.no_grad()
def cost_of_another_code(model: LossyVAE, levels: Tensor) -> dict[str, float]:
    """By how much the decoder term rises if each image is decoded from another's z; mean, bits/dim."""
    costs, before = [], torch.empty(0)
    for x, z, _, _ in core.posteriors(model, levels):
        another = z.roll(1, 0) if len(z) > 1 else before  # the last batch may hold a single image
        costs.append(bits_per_dim(model.log_p_x(x, z) - model.log_p_x(x, another), levels[0].numel()))
        before = z[-1:]
    cost = torch.cat(costs)
    return {"another_code_costs_bpd": cost.mean().item(), "another_code_costs_se_bpd": core.standard_error(cost)}


def table_text(rows: list[dict]) -> str:
    """Whether the receptive field moves the code, then the table."""
    lines = "\n".join(
        f"| {r['receptive_field']} | {core.with_error(r, 'neg_elbo')} | {core.with_error(r, 'kl')} "
        f"| {r['recon_bpd']:.4f} |"
        for r in rows
    )
    kl, error = [r["kl_bpd"] for r in rows], math.hypot(rows[0]["kl_se_bpd"], rows[-1]["kl_se_bpd"])
    verdict = "No sign that a smaller field puts more into z."
    if kl == sorted(kl, reverse=True) and kl[0] - kl[-1] > 2 * error:
        verdict = "The more of its neighbours a pixel sees, the less goes into z."
    return f"""**{verdict}** Epochs of each row: {rows[0]["epochs"]}; one seed, on test.

| pixels seen above and left | −ELBO, bits/dim | KL: the code | decoder: the rest |
|---|---|---|---|
{lines}
"""


def code_text(metrics: dict) -> str:
    """Whether the code is used, whether it pays, and what it holds."""
    cost, error = metrics["another_code_costs_bpd"], metrics["another_code_costs_se_bpd"]
    used = "is used" if cost > 0.001 + 4 * error else "is not measurably used"
    test = metrics["final"]["test"]
    bound = test["neg_elbo_bpd"]
    pays = "Whether it pays is not known: the PixelCNN without a code was not trained."
    if no_code := metrics.get("no_code"):
        above, two_errors = no_code["above_bpd"], 2 * no_code["above_se_bpd"]
        without = "worse" if above > two_errors else "better" if above < -two_errors else "as good"
        saved = no_code["neg_elbo_bpd"] - test["recon_bpd"]
        pays = f"""**Without a code the PixelCNN is {without}**: trained for as many epochs, it needs
{no_code["neg_elbo_bpd"]:.4f} bits/dim, {above:+.4f} ± {no_code["above_se_bpd"]:.4f} against {bound:.4f} with the code
(paired by image; one seed each). The code costs {test["kl_bpd"]:.4f}, its KL, and saves the decoder {saved:.4f}."""
    code = 3072 * test["kl_bpd"]
    return f"""**The code {used}**: given another image's z, an image costs {cost:.4f} ± {error:.4f} bits/dim more (on
up to 4,000 test images).

{pays}

The code of a test image holds at most {code:,.0f} of the {3072 * bound:,.0f} bits that the image costs. To prevent a
collapse to 0, training added a loss that sees no neighbours (`--blind {metrics["args"]["blind"]:g}`). It pulls
more into z than the bound does; as it fades, the KL falls."""


def report(metrics: dict) -> str:
    """The handout's deliverables in its order, every number from metrics."""
    args, rows = metrics["args"], metrics.get("receptive_fields")
    table = table_text(rows) if rows else "No receptive-field table was made (`--table-epochs`)."
    return f"""# Bonus: a lossy VAE with a local PixelCNN as its decoder

Receptive field {args["receptive_field"]}, {args["prior"]} prior. {core.bounds_text(metrics)}

## 2. Samples

![samples](samples.png)

x ~ p(x|z), z ~ p(z). Texture and edges are the PixelCNN's, which sees near pixels; larger shapes have to come from z.

## 3. Interpolations

![interpolations](interpolations.png)

Test images at both ends; between them x ~ p(x|z), with one noise (its marks stay in place), on a straight line: above
in z, below (flow prior) in ε, the flow's noise. In z shapes cross-fade, in ε they often vanish.

## Reconstructions: what z keeps, and what the PixelCNN redraws

![lossy](lossy.png)

From above: test images; three draws x ~ p(x|z) from each one's code; the second and third minus the first, around grey.
What the draws share is in z; what differs (noise; of a small code, also the tint) is lost.

## What goes into z, and what the receptive field leaves to it

{code_text(metrics)}

{table}
"""


# --- main


def draw_figures(model: LossyVAE, test: Tensor, out: Path, samples: int) -> None:
    """100 samples; of five test pairs, interpolations and three draws from each code; single samples."""
    x = model.draw_levels(model.prior.sample(100, core.fixed_noise("samples")), "pixels")
    core.save_grid((x,), 10, out / "samples.png")
    path = out / "interpolations.png"
    images, codes = core.draw_interpolations(model, test, lambda z: model.draw_levels(z, "pixels", same=True), path)
    draws = [model.draw_levels(codes, "pixels", k) for k in (1, 2, 3)]
    differences = [(128 + draw.int() - draws[0].int()).clamp(0, 255).to(torch.uint8) for draw in draws[1:]]
    core.save_grid((images, *draws, *differences), 10, out / "lossy.png", stacked=True)
    for first in range(0, samples, 100):
        z = model.prior.sample(min(100, samples - first), core.fixed_noise("single samples", first))
        core.write_images(model.draw_levels(z, "single pixels", first), out / "samples", first)


def main(argv: list[str] | None = None) -> None:
    parser = core.Parser("bonus", images=True)
    add = parser.add_argument
    add("--receptive-field", type=core.number(int, 1, 15), help="rows above, and columns to each side, that are seen")
    add("--prior", choices=tuple(PRIORS), help="of z")
    add("--blind", type=core.number(float, 0, 100), help="weight, fading to 0, of a decoder term without neighbours")
    add("--table-epochs", type=core.number(int, 0, 10**9), help="of each receptive field; 0: none; unset: a fifth")
    args, out = core.parse_args(parser, argv, DEFAULTS, SMOKE)
    device, precision = core.choose_machine(args.device, args.precision)

    # 1. Data and model.
    data = core.load_images(args.data, args.data_root, args.limit, args.seed, only_test=bool(args.evaluate))
    splits = {name: x.to(device) for name, x in data.splits.items()}
    test = splits["test"]

    def make_model(latents: int = args.latents, receptive_field: int = args.receptive_field) -> LossyVAE:
        torch.manual_seed(args.seed)
        model = LossyVAE(latents, receptive_field, args.prior, args.blind)
        return model.to(device).to(memory_format=torch.channels_last)

    # 2. Training; or, with --evaluate, an earlier training's weights.
    model = make_model()
    args, recipe = core.image_recipe(args, len(splits["train"]), precision)
    about = {"script": "bonus", "args": vars(args)}
    lock = core.claim(out, args.resume)
    if args.evaluate:
        curves = core.load_trained(model, args.evaluate)
    else:
        curves = core.fit(model, splits, recipe, out / "checkpoint.pt", about, args.resume)

    # 3. Bounds, and whether the code is used.
    of_test, measured = core.measure_images(model, splits)
    metrics = core.describe_run("bonus", args, data.describe(), device, precision, model)
    metrics |= {"curves": curves} | measured | cost_of_another_code(model, test[:4000])
    core.write_results(out, metrics)

    # 4. Figures and report.
    core.plot_image_curves(metrics, "bonus", out)
    draw_figures(model, test, out, args.samples)
    core.write_results(out, metrics, report(metrics))
    if args.evaluate:
        return lock.release(force=True)

    # 5. Further trainings: does the code pay, what does the receptive field leave to it?
    without = make_model(latents=0)
    core.fit(without, splits, recipe, out / "no_code.pt", about, args.resume, "no code")
    no_code = core.evaluate(without, test)
    above = bits_per_dim(no_code.neg_elbo - of_test.neg_elbo, 3072)  # paired by image
    metrics["no_code"] = core.in_bits(no_code, 3072)
    metrics["no_code"] |= {"above_bpd": above.mean().item(), "above_se_bpd": core.standard_error(above)}
    table_epochs = math.ceil(args.epochs / 5) if args.table_epochs is None else args.table_epochs
    for size in RECEPTIVE_FIELDS if table_epochs else ():
        another, name = make_model(receptive_field=size), f"receptive field {size}"
        path = out / f"receptive_field_{size}.pt"
        core.fit(another, splits, replace(recipe, epochs=table_epochs), path, about, args.resume, name)
        row = {"receptive_field": size, "epochs": table_epochs, **core.in_bits(core.evaluate(another, test), 3072)}
        metrics.setdefault("receptive_fields", []).append(row)
    core.write_results(out, metrics, report(metrics))
    lock.release(force=True)


if __name__ == "__main__" and not core.pasted_into_cell():
    core.launch(main)
