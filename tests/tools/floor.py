"""Between which bounds the best possible bits/dim of the synthetic test images lies: into results/published/floor.json.

    python tests/tools/floor.py               the full set: its first 1,000 test images
    python tests/tools/floor.py --limit 4000  the set of --data synthetic --limit 4000: its 400

Lower bound: the entropy of the images given their scenes s, the mean of -log P(x | s) (`scene_log_prob`). No model has
a smaller mean -log p(x), since knowing s can only help. Upper bound: for any density q,

    -log p(x) <= -E log (1/K) sum_k p(s_k) P(x | s_k) / q(s_k),    s_k ~ q,

which a model reaches that knows the generator. This script reports the difference of the two, what the scene itself
costs, over the first 96 images, K = 16. The inequality holds for every q, so q may know the image's own scene. Font,
digits, presence of neighbours and sign of the ink cost their log-probability. The other 19 coordinates: a normal around
the own scene, or one step of Fisher scoring from there; where the prior is N(0, I), of precision I + Fisher matrix.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import core  # noqa: E402
from q1b import iwae  # noqa: E402

CHOICES = ("u_font", "u_digits", "u_left", "u_right", "z_sign")  # draws that only choose among finitely many
WIDTHS = (1.0, 0.5, 0.2, 0.05)  # of q, in its standard deviations
SMALL = 0.02  # step of the central differences, about one standard deviation of q


class Scenes(NamedTuple):
    """Synthetic images uint8 [n, 3, 32, 32], their pictures before the noise, of that shape, and their scenes."""

    levels: Tensor
    pictures: Tensor
    draws: dict[str, Tensor]


def synthetic_scenes(start: int, stop: int) -> Scenes:
    """Images start..stop-1 of the stream, with their scenes."""
    first, size = start // core.SYNTHETIC_BATCH, core.SYNTHETIC_BATCH
    batches = itertools.islice(core.synthetic_batches(), first, -(-stop // size))  # those before are drawn too
    images, pictures, draws = zip(*batches, strict=True)
    here = slice(start - first * size, stop - first * size)
    levels = torch.from_numpy(np.concatenate(images)[here]).permute(0, 3, 1, 2)
    return Scenes(levels, torch.cat(pictures)[here], {k: torch.cat([d[k] for d in draws])[here] for k in draws[0]})


# ------------------------------------------------------------------------------------------- lower bound: P(x | scene)


def log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    """log P(low < X < high), X ~ N(0, 1), low < high, elementwise, nats; exact to either side, however far out.
    By symmetry both ends are taken to the left, where log_ndtr keeps its digits; then the log of a difference."""
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high = torch.special.log_ndtr(high)
    return log_high + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - log_high))


def scene_log_prob(levels: Tensor, mean: Tensor, amount: Tensor, step: float = 0.125) -> Tensor:
    """log P(levels | scene) of synthetic images, [B], nats. No model's log P(levels) is higher on average.
    levels [B, 3, H, W], integers; mean, the same shape, of `core.render`; amount a [B], `core.noise_amount`. Given the
    scene, pixels are independent. A pixel's colours share a n, n ~ N(0, 1); given n they are independent,
    N(mean + a n, (a / 4)^2), rounded and clamped to 0..255. So P(pixel) = integral N(n; 0, 1) prod_c P(level_c | n) dn:
    a sum over points `step` apart, 7 to both sides of about the integrand's peak. The integrand is smooth on a scale of
    1/7, whatever a is, so half the step changes the result by less than 1e-9 nats."""
    a = amount.double()[:, None, None, None]
    low = (torch.where(levels == 0, -math.inf, levels - 0.5) - mean.double()) / a
    high = (torch.where(levels == 255, math.inf, levels + 0.5) - mean.double()) / a
    points = step * torch.arange(-round(7 / step), round(7 / step) + 1).to(low)
    # The integrand's peak, as if each colour lay at its bin's point nearest to the mean.
    peak = 16 / 49 * (low.clamp(min=0) + high.clamp(max=0)).sum(1)  # 16 = 1 / (1/4)^2, 49 = 1 + 3 * 16
    log_prob = []
    for low_b, high_b, peak_b in zip(low, high, peak, strict=True):  # one image at a time: 1 MB per tensor
        n = peak_b + points[:, None, None]  # (points, H, W)
        log_joint = -(n**2) / 2 + math.log(step / math.sqrt(2 * math.pi))
        for colour in range(3):
            log_joint += log_normal_mass(4 * (low_b[colour] - n), 4 * (high_b[colour] - n))
        log_prob.append(torch.logsumexp(log_joint, 0).sum())
    return torch.stack(log_prob)


# ------------------------------------------------------------------------------------ upper bound: the scene's own cost


def choices_log_prob(draws: dict[str, Tensor]) -> Tensor:
    """log p(font, digits that are present, presence, sign), [n], nats. An absent digit is integrated out, for free."""
    left, right = draws["u_left"] < 0.75, draws["u_right"] < 0.75
    log_prob = torch.full(left.shape, -math.log(8 * 10 * 2), dtype=torch.float64)
    for present in (left, right):
        log_prob += torch.where(present, math.log(0.75 / 10), math.log(0.25))
    return log_prob


def to_normal(draws: dict[str, Tensor]) -> Tensor:
    """The continuous draws as coordinates xi [n, 19] whose prior is N(0, I); the last is the noise amount's."""
    columns = []
    for name, value in draws.items():
        if name not in CHOICES:
            value = value.double().reshape(len(value), -1)
            columns.append(torch.special.ndtri(value.clamp(1e-6, 1 - 1e-6)) if name.startswith("u_") else value)
    return torch.cat(columns, 1)


def from_normal(xi: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverts `to_normal`: n rows xi [n, 19] as draws, with the choices of the one scene `like`."""
    draws, used = {}, 0
    for name, value in like.items():
        if name in CHOICES:
            draws[name] = value.expand(len(xi), *value.shape[1:])
            continue
        width = value[0].numel()
        part, used = xi[:, used : used + width], used + width
        part = 0.5 * torch.erfc(part * -math.sqrt(0.5)) if name.startswith("u_") else part
        draws[name] = part.float().reshape(len(xi), *value.shape[1:])
    return draws


class Image:
    """One image: its log joint density in the coordinates xi, and normal approximations of p(xi | image)."""

    def __init__(self, scenes: Scenes, index: int, atlas: Tensor):
        self.levels = scenes.levels[[index]]
        self.draws = {name: value[index : index + 1] for name, value in scenes.draws.items()}
        self.atlas = atlas
        self.own = to_normal(self.draws)[0]
        self.lower = -scene_log_prob(self.levels, scenes.pictures[[index]], core.noise_amount(self.draws)).item()

    def log_likelihood(self, xi: Tensor) -> Tensor:
        """log P(image | xi), xi [n, 19] -> [n], nats."""
        draws = from_normal(xi, self.draws)
        means, amounts = core.render(draws, self.atlas), core.noise_amount(draws)
        return scene_log_prob(self.levels.expand(len(xi), -1, -1, -1), means, amounts)

    def approximation(self) -> tuple[Tensor, Tensor]:
        """One step of Fisher scoring from the own scene, [19], and I + Fisher information there, [19, 19].
        With a^2 (11^T + I/16) + I/12 for the covariance of a pixel's colours (I/12: rounding), and without saturated
        levels, of which a normal approximation knows nothing."""
        d = len(self.own)
        steps = SMALL * torch.eye(d, dtype=torch.float64)
        nearby = torch.cat([self.own[None], self.own + steps, self.own - steps])
        draws = from_normal(nearby, self.draws)
        means, a2 = core.render(draws, self.atlas).double(), core.noise_amount(draws)[0].double() ** 2
        jacobian = (means[1 : d + 1] - means[d + 1 :]) / (2 * SMALL)  # [19, 3, 32, 32]
        seen = ((self.levels > 0) & (self.levels < 255)).double()
        alone = a2 / 16 + 1 / 12  # the part of a colour's variance that is its own
        share = a2 / (alone + seen.sum(1, keepdim=True) * a2)
        common = share * (seen * jacobian).sum(1, keepdim=True)
        weighted = seen * (jacobian - common) / alone  # the inverse covariance times the Jacobian
        information = weighted.flatten(1) @ jacobian.flatten(1).T
        # The noise amount: d covariance / d log a has the covariance's eigenvectors; 1/2 sum of squared ratios.
        ratios = (2 * a2 * (3 + 1 / 16) / (a2 * (3 + 1 / 16) + 1 / 12), 2 * (a2 / 16) / alone)
        information[-1, -1] += (ratios[0] ** 2 + 2 * ratios[1] ** 2) / 2 * 0.5**2 * seen.sum() / 3
        precision = torch.eye(d, dtype=torch.float64) + information
        gradient = (weighted * (self.levels - means[0])).sum((1, 2, 3)) - self.own
        up, down = self.log_likelihood(self.own + torch.stack([steps[-1], -steps[-1]])).tolist()
        gradient[-1] += (up - down) / (2 * SMALL)
        return self.own + torch.linalg.solve(precision, gradient), precision

    def log_weights(self, centre: Tensor, precision: Tensor, width: float, noise: Tensor) -> Tensor:
        """log p(xi) P(image | xi) / q(xi) at draws of q, made of noise [K, 19] ~ N(0, I). [K], nats.
        q = N(centre, width^2 precision^-1); precision = L L^T, so L^-T noise has the covariance precision^-1."""
        root = torch.linalg.cholesky(precision)
        xi = centre + width * torch.linalg.solve_triangular(root.T, noise.T, upper=True).T
        log_q = -noise.square().sum(1) / 2 + root.diagonal().log().sum() - len(centre) * math.log(width)
        return self.log_likelihood(xi) - xi.square().sum(1) / 2 - log_q  # the 2 pi of prior and q cancel

    def scene_cost(self, draws: int, pilot: int, generator: torch.Generator) -> float:
        """Upper bound minus -log P(image | own scene), nats, without the choices.
        Of q's centres and widths it takes those that do best on `pilot` draws of their own."""
        trial, noise = torch.randn(pilot + draws, 19, generator=generator, dtype=torch.float64).split([pilot, draws])
        scored, precision = self.approximation()
        tries = itertools.product((self.own, scored), (precision,), WIDTHS)
        best = max(tries, key=lambda q: iwae(self.log_weights(*q, trial)).item())
        return -iwae(self.log_weights(*best, noise)).item() - self.lower


def summary(nats: Tensor) -> dict[str, float]:
    """Mean over images, bits/dim, with its standard error."""
    bits = core.bits_per_dim(nats.double(), 3072)
    return {"bpd": bits.mean().item(), "se": core.standard_error(bits)}


def sides(scenes: Scenes, num_scenes: int, draws: int, pilot: int = 8) -> dict:
    """Both bounds for these images; the upper one from the first num_scenes."""
    known = -scene_log_prob(scenes.levels, scenes.pictures, core.noise_amount(scenes.draws))
    generator, atlas, choices = torch.Generator().manual_seed(0), core.digit_atlas(), choices_log_prob(scenes.draws)
    costs = [Image(scenes, index, atlas).scene_cost(draws, pilot, generator) for index in range(num_scenes)]
    return {
        "images": len(known), "scene_known": summary(known), "scenes": num_scenes, "draws": draws,
        "scene_costs_at_most": summary(torch.tensor(costs) - choices[:num_scenes]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="as in the scripts: the set whose test images are meant")
    limit = parser.parse_args().limit
    train, valid, test = (limit, limit // 10, limit // 10) if limit else core.SVHN_SIZES
    start, path = train + valid, ROOT / "results" / "published" / "floor.json"
    scenes = synthetic_scenes(start, start + min(1000, test))
    found = {"first_image": start, **sides(scenes, min(96, len(scenes.levels)), draws=16)}
    known = json.loads(path.read_text("utf-8"))
    known[f"synthetic, --limit {limit}" if limit else "synthetic"] = found
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
