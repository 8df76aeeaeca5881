"""The core that the question scripts share, in the order of the mathematics.

    conventions -> distributions -> bounds and units -> VAE -> blocks -> masks and flow -> data -> training ->
    figures and files -> command line

One example is one point [2] or one image [3, 32, 32]; B is the batch size. A density, a KL or a log-determinant is [B],
in nats per example; the mean over examples is taken once, last. `bits_per_dim` is the only conversion of units.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import textwrap
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

# torch reads this when it is imported: on Apple's mps, an operator that is missing runs on the CPU, with a warning.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
if "ipykernel" not in sys.modules:  # a script writes figures to files alone; in Colab the environment says otherwise
    os.environ["MPLBACKEND"] = "agg"

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm.auto
from PIL import Image, ImageDraw, ImageFont, ImageOps  # Pillow comes with matplotlib and torchvision
from torch import Tensor, nn

IN_KERNEL = "ipykernel" in sys.modules  # Jupyter's or Colab's, which shows figures and progress bars
if not IN_KERNEL:
    matplotlib.rcdefaults()  # a user's matplotlibrc may ask for what is not there, such as LaTeX

# ---------------------------------------------------------------------------------------------------- conventions


class Terms(NamedTuple):
    """The two terms of the negative ELBO, each [B], in nats: recon = -log p(data|z) and kl = log q(z|x) - log p(z).

    In 2a and 2b recon is -log p(levels + u|z), with 3072 ln 128 for the scale; only recon + kl is a bound for levels.
    """

    recon: Tensor
    kl: Tensor

    @property
    def neg_elbo(self) -> Tensor:
        """-ELBO = recon + kl, [B], nats. For one z, minus the log importance weight log p(x, z) - log q(z|x)."""
        return self.recon + self.kl


def noise(
    kind: Callable[..., Tensor], shape: tuple[int, ...], device: Any, generator: torch.Generator | None = None
) -> Tensor:
    """Noise of the given shape [B, ...] on the device; kind is torch.randn or torch.rand.

    With a generator, which lives on the CPU, the noise is the same on every device. Without one, in training, it comes
    from the device's global generator; of several processes each draws for the whole batch and keeps its share.
    """
    if generator is not None:
        return kind(shape, generator=generator, device="cpu").to(device)
    rank, world = rank_and_world()
    return kind((shape[0] * world, *shape[1:]), device=device)[rank::world]


def seed_of(*key: str | int) -> int:
    """One 32-bit seed from words and numbers, such as ("evaluation", seed, batch): numpy's SeedSequence mixes them."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


def fixed_noise(*key: str | int) -> torch.Generator:
    """A CPU generator for the noise that belongs to the key: the same in every run and on every device."""
    return torch.Generator().manual_seed(seed_of(*key))


# -------------------------------------------------------------------------------------------------- distributions

# Bounds of every learned log standard deviation. Reasons: the noise that dequantisation adds to a pixel has, in the
# model's units, log std log(1 / (128 sqrt 12)) = -6.09, so -7 lets a decoder be sharper than the sharpest truth; the
# widest thing to model, the long axis of question 1A, has log 5 = 1.61.
LOG_STD_LOW, LOG_STD_HIGH = -7.0, 3.0


def sum_dims(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first: [B, ...] -> [B]."""
    return x.flatten(1).sum(1)


def at_least_fp32(x: Tensor) -> Tensor:
    """x, widened to float32 if autocast left it in a 16-bit type: no density is computed in less."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def bounded_log_std(raw: Tensor) -> Tensor:
    """A smooth, increasing map of the reals onto (-7, 3) with f(0) = 0 and f'(0) = 1; elementwise.

    Each half is a scaled tanh, b tanh(raw / b) with b the bound on its side. (The handout's plain tanh bounds a log
    std by -1 and 1. For pixels in [-1, 1] that is a std of 47 grey levels or more: 6.88 bits/dim with a perfect mean.)
    """
    high, low = LOG_STD_HIGH * torch.tanh(raw / LOG_STD_HIGH), LOG_STD_LOW * torch.tanh(raw / LOG_STD_LOW)
    return torch.where(raw > 0, high, low)


def normal_log_density(x: Tensor, mu: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mu, exp(log_std)^2) of each element. x [B, ...], mu and log_std broadcast to x -> [B, ...], nats.

    Kingma & Welling 2014 (arXiv:1312.6114), appendix C.2. Computed in float32 or wider under any autocast.
    """
    x, mu, log_std = at_least_fp32(x), at_least_fp32(mu), at_least_fp32(log_std)
    return -0.5 * ((x - mu) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)


def normal_log_prob(x: Tensor, mu: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mu, diag exp(log_std)^2): `normal_log_density`, summed over dimensions. [B, ...] -> [B], nats."""
    return sum_dims(normal_log_density(x, mu, log_std))


class Prior(nn.Module):
    """p(z) as the distribution of z = f(eps) with eps ~ N(0, I), for an invertible f. A subclass defines

    eps_to_z: f, eps [B, *latent_shape] -> z of that shape;
    z_to_eps: its inverse, z -> eps, log |det d eps / d z| [B], nats;
    mean_and_log_std: of each p(z_i | z_<i), which is normal, z -> two tensors that broadcast to z.
    """

    zeros: Tensor
    eps_to_z: Callable[..., Tensor]
    z_to_eps: Callable[..., tuple[Tensor, Tensor]]
    mean_and_log_std: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, latent_shape: tuple[int, ...]):
        super().__init__()
        self.latent_shape = latent_shape
        self.register_buffer("zeros", torch.zeros(latent_shape), persistent=False)  # mean and log std of eps

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) = log N(eps; 0, I) + log |det d eps / d z|. z [B, *latent_shape] -> [B], nats."""
        eps, log_det = self.z_to_eps(z)
        return normal_log_prob(eps, self.zeros, self.zeros) + log_det

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """z ~ p(z), [n, *latent_shape]."""
        return self.eps_to_z(noise(torch.randn, (n, *self.latent_shape), self.zeros.device, generator))


class StandardNormal(Prior):
    """p(z) = N(0, I): f is the identity."""

    def z_to_eps(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))

    def eps_to_z(self, eps: Tensor) -> Tensor:
        return eps

    def mean_and_log_std(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.zeros, self.zeros


# ----------------------------------------------------------------------------------------------- bounds and units

PIXEL_SCALE = 128  # grey levels that one unit of x spans: x = (level + u) / 128 - 1 lies in [-1, 1]


def bits_per_dim(nats: Any, num_dims: int) -> Any:
    """nats / (num_dims ln 2): nats per example -> bits per dimension. The laboratory's only conversion of units."""
    return nats / (num_dims * math.log(2))


def iwae(log_w: Tensor) -> Tensor:
    """The importance-weighted bound log (1/K) sum_k w_k on log p(x). log_w [K, ...] -> [...], nats.

    log_w = log p(x, z_k) - log q(z_k|x), z_k ~ q(z|x). K = 1 is the ELBO; the bound rises with K in expectation
    (Burda et al. 2016, arXiv:1509.00519, theorem 1).
    """
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def dequantise(levels: Tensor, u: Tensor | float) -> Tensor:
    """x = (levels + u) / 128 - 1: integers 0..255 and u ~ U[0, 1), same shape, to continuous x in [-1, 1]."""
    return (levels + u) / PIXEL_SCALE - 1


def bin_centres(levels: Tensor) -> Tensor:
    """`dequantise` with u = 1/2: each level at the centre of its bin."""
    return dequantise(levels.float(), 0.5)


def quantise(x: Tensor) -> Tensor:
    """The grey level in whose bin x lies: inverts `dequantise` for u <= 1 - 2**-16. float [...] -> uint8 [...]."""
    return ((x + 1) * PIXEL_SCALE).floor().clamp(0, 255).to(torch.uint8)


def density_to_levels(log_p_x: Tensor, num_dims: int) -> Tensor:
    """log p(x) -> log p(v), v = levels + u, whose mean over u is at most log P(levels). [B] -> [B], nats.

    v = 128 (x + 1), so p(v) = p(x) / 128 per dimension and log p(v) = log p(x) - num_dims ln 128; and
    E_u log p(v) <= log P(levels) by Jensen (Theis et al. 2016, arXiv:1511.01844, section 3.1).
    """
    return log_p_x - num_dims * math.log(PIXEL_SCALE)


def in_bits(terms: Terms, num_dims: int) -> dict[str, float]:
    """Means over examples in bits/dim of -ELBO, KL and decoder term, and the standard errors of the first two."""
    neg_elbo, kl = bits_per_dim(terms.neg_elbo, num_dims), bits_per_dim(terms.kl, num_dims)
    return {
        "neg_elbo_bpd": neg_elbo.mean().item(),
        "neg_elbo_se_bpd": standard_error(neg_elbo),
        "kl_bpd": kl.mean().item(),
        "kl_se_bpd": standard_error(kl),
        "recon_bpd": bits_per_dim(terms.recon.mean().item(), num_dims),
    }


def standard_error(x: Tensor) -> float:
    """The standard error of the mean of x [N], N independent values."""
    return x.std().item() / math.sqrt(len(x))


# ------------------------------------------------------------------------------------------------------------ VAE


class VAE(nn.Module):
    """q(z|x) = N(encoder(x)), p(x|z) = N(decoder(z)) and p(z), a `Prior` that can be swapped.

    encoder: x -> (mu, log_std) of z; decoder: z -> (mu, log_std) of x. Kingma & Welling 2014 (arXiv:1312.6114).
    A subclass for other data replaces `to_x` and `log_p_x`; with another kind of decoder, `decode` too.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Prior):
        super().__init__()
        self.encoder, self.decoder, self.prior = encoder, decoder, prior

    def forward(self, data: Tensor, generator: torch.Generator | None = None) -> Terms:
        """Both terms of the negative ELBO from one sample of z. data [B, ...] -> Terms of [B], nats."""
        x = self.to_x(data, generator)
        z, mu, log_std = self.posterior(x, generator)
        return Terms(recon=-self.log_p_x(x, z), kl=self.kl(z, mu, log_std))

    def to_x(self, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What encoder and decoder work on; here the data as they are. [B, ...] -> [B, ...]."""
        return data

    def posterior(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z = mu + std eps ~ q(z|x), and q's mean and log std, each [B, *latent_shape]."""
        mu, log_std = self.encoder(x)
        return mu + torch.exp(log_std) * noise(torch.randn, tuple(mu.shape), mu.device, generator), mu, log_std

    def kl(self, z: Tensor, mu: Tensor, log_std: Tensor) -> Tensor:
        """log q(z|x) - log p(z) at a sampled z, for every prior. Each [B, *latent_shape] -> [B], nats.

        If q(z|x) is the true posterior, recon + kl is -log p(x) exactly, whatever the noise. log q(z|x) is
        differentiated through z alone (its other derivative has mean zero): then the encoder's gradient has no noise at
        that point either (Roeder et al. 2017, arXiv:1703.09194).
        """
        return normal_log_prob(z, mu.detach(), log_std.detach()) - self.prior.log_prob(z)

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), here of a normal. x [B, ...], z [B, *latent_shape] -> [B], nats."""
        return normal_log_prob(x, *self.decoder(z))

    def loss(self, data: Tensor, kl_weight: float = 1.0, done: float = 0.0) -> Tensor:
        """What training minimises: mean of recon + kl_weight kl, bits/dim, []. Every reported bound has weight 1.

        done: the fraction of training that is over, for a subclass whose loss changes on the way.
        """
        recon, kl = self(data)
        return bits_per_dim((recon + kl_weight * kl).mean(), data[0].numel())

    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x ~ p(x|z) and the decoder's mean mu(z), each [B, ...]."""
        mu, log_std = self.decoder(z)
        return mu + torch.exp(log_std) * noise(torch.randn, tuple(mu.shape), mu.device, generator), mu

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """z ~ p(z), decoded: x ~ p(x|z) and mu(z) at the same z, each [n, ...]."""
        return self.decode(self.prior.sample(n, generator), generator)


class ImageVAE(VAE):
    """The VAE of question 2: 8-bit images, dequantised; recon + kl bounds -log P(levels) from above.

    levels uint8 [B, 3, 32, 32]; z [B, C, 8, 8] with C = latent_channels. The prior is made last, so that 2a and 2b
    start from the same encoder and decoder.
    """

    def __init__(self, latent_channels: int, prior: Callable[[tuple[int, ...]], Prior]):
        encoder, decoder = ConvEncoder(latent_channels), ConvDecoder(latent_channels)
        super().__init__(encoder, decoder, prior((latent_channels, 8, 8)))

    def to_x(self, levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x = (levels + u) / 128 - 1 with u ~ U[0, 1). uint8 [B, 3, 32, 32] -> float of that shape."""
        return dequantise(levels, noise(torch.rand, tuple(levels.shape), levels.device, generator))

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """The normal's log density at x, taken to that of levels + u (`density_to_levels`). -> [B], nats."""
        return density_to_levels(super().log_p_x(x, z), x[0].numel())


# --------------------------------------------------------------------------------------------------------- blocks


class GaussianMLP(nn.Module):
    """An MLP from the plane to a normal in the plane: x [B, 2] -> mu [B, 2], bounded log_std [B, 2 or 1]."""

    def __init__(self, hidden: tuple[int, ...], activation: Callable[[], nn.Module], num_log_stds: int = 2):
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise((2, *hidden)):
            layers += [nn.Linear(width_in, width_out), activation()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden[-1], 2 + num_log_stds))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, raw = self.net(x).tensor_split([2], 1)  # (B, 2), (B, num_log_stds)
        return mu, bounded_log_std(raw)


class GatedResidualBlock(nn.Module):
    """x + a * sigmoid(b), with (a, b) the halves of [relu, conv to hidden, relu, conv to 2 x width].

    The gated linear unit of Dauphin et al. 2017 (arXiv:1612.08083) as the residual branch. The handout's 64 * 2 filters
    fit a stream of 64 channels; its own stream has 256, so the second convolution has 2 x 256.
    [B, width, H, W] -> the same.
    """

    def __init__(self, width: int, hidden: int = 64, size: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, size, padding=size // 2)
        self.conv2 = nn.Conv2d(hidden, 2 * width, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv2(F.relu(self.conv1(F.relu(x)))).chunk(2, 1)  # each (B, width, H, W)
        return x + a * torch.sigmoid(b)


def residual_stack(width: int) -> nn.Sequential:
    """The handout's Residual_stack: five gated residual blocks, then relu. [B, width, H, W] -> the same."""
    return nn.Sequential(*[GatedResidualBlock(width) for _ in range(5)], nn.ReLU())


class ConvEncoder(nn.Module):
    """q(z|x): the handout's convolutions, then a linear 1x1 head, as the stack ends in a relu and a mean has a sign.

    x [B, 3, 32, 32] -> mu, log_std, each [B, C, 8, 8]. Log stds start near -2: a posterior that starts narrow, so that
    the decoder learns to use z early.
    """

    def __init__(self, latent_channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 128, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(128, 256, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), residual_stack(256),
            nn.Conv2d(256, 2 * latent_channels, 1),
        )  # fmt: skip
        bias = self.net[-1].get_parameter("bias")
        nn.init.constant_(bias[latent_channels:], -2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, raw = at_least_fp32(self.net(x)).chunk(2, 1)  # each (B, C, 8, 8)
        return mu, bounded_log_std(raw)


class ConvDecoder(nn.Module):
    """p(x|z): the handout's decoder, with 6 output channels in place of 3: a mean and a log std for each pixel.

    z [B, C, 8, 8] -> mu, log_std, each [B, 3, 32, 32]; its `net` alone gives out_channels features for each pixel.
    """

    def __init__(self, latent_channels: int, out_channels: int = 6):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(latent_channels, 256, 3, padding=1), residual_stack(256),
            nn.ConvTranspose2d(256, 128, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(128, out_channels, 4, 2, 1),
        )  # fmt: skip

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mu, raw = at_least_fp32(self.net(z)).chunk(2, 1)  # each (B, 3, 32, 32)
        return mu, bounded_log_std(raw)


# ------------------------------------------------------------------------------------------------- masks and flow


def causal_mask(mask_type: str, size: int) -> Tensor:
    """PixelCNN's mask (van den Oord et al. 2016, arXiv:1601.06759), [size, size]: 1 where a weight may stay.

    In raster order a position sees the rows above and what is to its left; "B" sees itself too, "A" does not.
    """
    if mask_type not in ("A", "B"):
        raise ValueError(f"mask_type must be 'A' or 'B', not {mask_type!r}")
    mask = torch.zeros(size * size)
    mask[: size * size // 2 + (mask_type == "B")] = 1
    return mask.view(size, size)


class MaskedConv2d(nn.Conv2d):
    """A 'same' convolution of odd size that sees only earlier positions; every input channel of a position alike."""

    mask: Tensor

    def __init__(self, mask_type: str, in_channels: int, out_channels: int, size: int):
        super().__init__(in_channels, out_channels, size, padding=size // 2)
        self.register_buffer("mask", causal_mask(mask_type, size))

    def kernel(self) -> Tensor:
        """The weights in effect, [out_channels, in_channels, size, size]."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel(), self.bias)

    def at(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """`forward(x)` at P positions only: x [B, C, H, W], rows and columns int64 [P] -> [B, out_channels, P, 1]."""
        size, half = self.kernel_size[0], self.kernel_size[0] // 2
        taps = torch.arange(size * size // 2 + 1, device=x.device)  # to the centre, whose weight is 0 under mask A
        i, j = taps // size, taps % size  # each [T]
        seen = F.pad(x, (half, half, half, half))[:, :, rows[:, None] + i, columns[:, None] + j]  # (B, C, P, T)
        out = torch.einsum("bcpt,oct->bop", seen, self.kernel()[:, :, i, j])
        return (out + self.get_parameter("bias")[:, None])[..., None]


class MaskedResidual(nn.Module):
    """x + masked conv(relu(x)), mask B. [B, width, H, W] -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = MaskedConv2d("B", width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x))


class FlowPrior(Prior):
    """p(z) as an affine autoregressive flow of N(0, I): z_i = t_i(z_<i) + exp(s_i(z_<i)) eps_i.

    i runs over the positions in raster order; all channels of a position move at once. s and t come from a shallow
    PixelCNN: one 3x3 convolution with mask A, three residual layers with mask B, and a 1x1 layer that starts at zero,
    so that the flow starts as the identity. Chen et al. 2017 (arXiv:1611.02731), equations 12 to 14.
    """

    def __init__(self, latent_shape: tuple[int, ...], width: int = 128):
        super().__init__(latent_shape)
        channels = latent_shape[0]
        self.net = nn.Sequential(
            MaskedConv2d("A", channels, width, 3), *[MaskedResidual(width) for _ in range(3)], nn.ReLU(),
            nn.Conv2d(width, 2 * channels, 1),
        )  # fmt: skip
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def mean_and_log_std(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """t and s at every position, from the positions before it. z [B, C, H, W] -> two of [B, C, H, W]."""
        t, raw = at_least_fp32(self.net(z)).chunk(2, 1)
        return t, bounded_log_std(raw)

    def z_to_eps(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """eps = (z - t(z)) exp(-s(z)), all positions in one pass, and its log |det d eps / d z| = -sum s.

        z [B, C, H, W] -> eps [B, C, H, W], log_det [B], nats. The Jacobian is triangular in raster order.
        """
        t, s = self.mean_and_log_std(z)
        return (z - t) * torch.exp(-s), -sum_dims(s)

    @torch.no_grad()
    def eps_to_z(self, eps: Tensor, slope: int | None = None) -> Tensor:
        """The inverse of `z_to_eps`, position by position. eps [B, C, H, W] -> z of that shape.

        Raster order would take one step per position; positions that cannot see each other are drawn together (see
        `wavefronts`). A layer runs at the new positions only, and its input is kept for the later ones: the whole costs
        about one pass. In float64, so that the order of summation hardly matters.
        """
        first, *residuals, relu, last = float64_copy(self.net)
        eps64 = eps.to(first.weight.device).double()  # moved before it is widened: mps has no float64
        z = torch.zeros_like(eps64)
        inputs = [z.new_zeros(len(z), first.out_channels, *z.shape[2:]) for _ in residuals]
        for i, j in wavefronts(z.shape[2], z.shape[3], slope or wavefront_slope(self.net), z.device):
            h = first.at(z, i, j)  # (B, width, P, 1)
            for layer, x in zip(residuals, inputs, strict=True):
                x[:, :, i, j] = F.relu(h[..., 0])
                h = h + layer.conv.at(x, i, j)
            t, raw = last(relu(h))[..., 0].chunk(2, 1)  # each (B, C, P)
            z[:, :, i, j] = t + torch.exp(bounded_log_std(raw)) * eps64[:, :, i, j]
        return z.to(eps.dtype).to(eps.device)


def wavefront_slope(net: nn.Module) -> int:
    """A slope k with j + k i smaller at every position that (i, j) sees through net's masked layers.

    The tap that asks for most is one row up and half a kernel to the right: half - k < 0. The offsets of stacked layers
    add up, so what holds for each layer holds for the net.
    """
    return 1 + max(m.kernel_size[0] // 2 for m in net.modules() if isinstance(m, MaskedConv2d))


def wavefronts(height: int, width: int, slope: int, device: Any = "cpu") -> list[tuple[Tensor, ...]]:
    """The positions of a grid in groups of equal j + slope i, in that order: rows and columns, each int64 [P].

    With the slope of `wavefront_slope`, no position of a group sees another, so a group is sampled at once: 22 groups
    in place of 64 steps on 8 x 8. With slope = width every group is one position: raster order.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for i, j in itertools.product(range(height), range(width)):
        groups.setdefault(j + slope * i, []).append((i, j))
    return [torch.tensor(groups[k], device=device).unbind(1) for k in sorted(groups)]


def float64_copy(net: Any) -> Any:
    """A copy of a network in float64; on the CPU if the device has no float64 (mps)."""
    net = copy.deepcopy(net)
    tensors = itertools.chain(net.parameters(), net.buffers())
    return (net.cpu() if any(x.device.type == "mps" for x in tensors) else net).double()


def check_prior(prior: Prior) -> float:
    """How far a prior is from what its definition says, at one z that it draws; 0 up to rounding.

    The larger of |z_to_eps(eps_to_z(eps)) - eps| and of log_prob's distance, in nats, from what torch.distributions and
    autograd's Jacobian give in float64: log N(eps; 0, I) + log |det d eps / d z|. A log-determinant that was dropped, a
    prior of the wrong variance, or samples of another density cannot pass.
    """
    prior = float64_copy(prior)
    eps = noise(torch.randn, (1, *prior.latent_shape), prior.zeros.device, fixed_noise("check")).to(prior.zeros)
    z = prior.eps_to_z(eps)
    jacobian = torch.func.jacrev(lambda z: prior.z_to_eps(z)[0], chunk_size=256)(z).view(z.numel(), z.numel())
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum() + torch.linalg.slogdet(jacobian)[1]
    with torch.no_grad():
        inverse = (prior.z_to_eps(z)[0] - eps).abs().max()
        return torch.maximum(inverse, (prior.log_prob(z) - expected).abs().max()).item()


# ----------------------------------------------------------------------------------------------------------- data

SPLITS = ("train", "valid", "test")
SVHN_SIZES = (65_931, 7_326, 26_032)


class Data(NamedTuple):
    """A data set: its name, as every report gives it, and its splits train, valid and test, each [N, ...]."""

    name: str
    splits: dict[str, Tensor]

    def describe(self) -> dict[str, Any]:
        """Name, sizes and hash, for metrics.json."""
        return {"name": self.name, **{k: len(x) for k, x in self.splits.items()}, "sha256": sha256_of(self.splits)}


def sha256_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the bytes of the tensors, in their order."""
    digest = hashlib.sha256()
    for x in tensors.values():
        digest.update(x.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def split_points(name: str, points: np.ndarray) -> Data:
    """Points [N, 2]: first 80 % train, the last tenth of it kept for validation; last 20 % test."""
    x = torch.from_numpy(points).float()
    before_test = int(0.8 * len(x))
    return Data(name, dict(zip(SPLITS, x.tensor_split([before_test * 9 // 10, before_test]), strict=True)))


def load_images(args: argparse.Namespace) -> Data:
    """The images that --data names, as splits uint8 [N, 3, 32, 32]; under --limit N, N, N/10 and N/10 of them."""
    limited = (args.limit, args.limit // 10, args.limit // 10) if args.limit else None
    if args.data == "svhn":
        name, arrays = "SVHN", load_svhn(Path(args.data_root))
    elif args.data == "synthetic":
        name, arrays = "synthetic (a stand-in for SVHN)", make_synthetic(limited or SVHN_SIZES)
    else:
        name, arrays = load_own(Path(args.data), args.seed, only_test=args.evaluate is not None)
    if limited:
        arrays = [x[:n] for x, n in zip(arrays, limited, strict=True)]
        name += f", at most {args.limit} training images"
    splits = {k: torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for k, x in zip(SPLITS, arrays, strict=True)}
    print(f"data: {name}: " + ", ".join(f"{len(x):,} {k}" for k, x in splits.items()), flush=True)
    return Data(name, splits)


def load_svhn(root: Path) -> list[np.ndarray]:
    """SVHN's cropped digits (Netzer et al. 2011), three uint8 [N, 32, 32, 3], downloaded and checked by torchvision.

    The official train file is split 65,931 / 7,326 by a fixed permutation, so that validation is not the file's end.
    """
    rank, world = rank_and_world()
    if rank:  # rank 0 downloads for all
        dist.barrier()
    try:
        from torchvision.datasets import SVHN  # here, as it takes two seconds, which other data can do without

        train, test = (SVHN(str(root), split, download=True).data.transpose(0, 2, 3, 1) for split in ("train", "test"))
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # URLError is an OSError
        fail(
            f"no usable SVHN in {root} ({error}): put the official train_32x32.mat and test_32x32.mat there, or delete "
            "broken copies and go online; --data synthetic needs no download"
        )
    if rank == 0 and world > 1:
        dist.barrier()
    order = np.random.RandomState(0).permutation(len(train))
    train, valid = np.split(train[order], [len(train) - round(len(train) / 10)])
    return [train, valid, test]


def load_own(path: Path, seed: int, only_test: bool = False) -> tuple[str, list[np.ndarray]]:
    """A user's images: the data's name, which says what was done to them, and three uint8 [N, 32, 32, 3].

    An npz's arrays, or a folder's subfolders, that are named for train and test (and valid) are the splits; without
    valid, a tenth of train is. A single array, or a folder of images, is split 80/10/10. The seed decides which images.
    only_test: test alone will do; the other splits are then empty.
    """
    print(f"reading {path}", flush=True)
    found, done = read_folder(path) if path.is_dir() else (read_npz(path), [])
    keys = {split_of(key): key for key in found}
    kinds = set(keys) if len(keys) == len(found) else set()  # none, if two sets are of one split
    allowed = [{""}, {"train", "test"}, set(SPLITS)] + [{"test"}] * only_test
    if kinds not in allowed:
        has = ", ".join(f"{key} {list(x.shape)}" for key, x in found.items()) or "no images"
        need = "one set of images, or sets named train and test (and valid)"
        fail(f"--data {path}: needs {need}; found {has}; np.savez('images.npz', train=x, test=y) makes such a file")
    splits = {split: to_images(found[key], f"--data {path}: {key}", done) for split, key in keys.items()}
    random = np.random.RandomState(seed)
    if kinds == {""}:
        x = random.permutation(splits[""])  # along the first axis
        splits = dict(zip(SPLITS, np.split(x, [len(x) * 8 // 10, len(x) * 9 // 10]), strict=True))
        done.append("split 80/10/10")
    elif kinds == {"train", "test"}:
        x = random.permutation(splits["train"])
        splits["train"], splits["valid"] = np.split(x, [len(x) * 9 // 10])
        done.append("a tenth of train kept for validation")
    elif kinds == {"test"}:
        splits |= {"train": splits["test"][:0], "valid": splits["test"][:0]}
    for key in SPLITS:
        if len(splits[key]) < 2 and (key == "test" or not only_test):
            fail(f"--data {path}: the {key} split holds {len(splits[key])} images; it needs two or more")
    return ", ".join([path.resolve().name, *dict.fromkeys(done)]), [splits[key] for key in SPLITS]


def split_of(key: str) -> str:
    """The split that an array's or a folder's name tells, such as x_train or Validation; "" if none."""
    names = {"train": "train", "training": "train", "test": "test", "testing": "test"}
    names |= {"valid": "valid", "val": "valid", "validation": "valid"}
    return next((names[word] for word in re.split("[^a-z]+", key.lower()) if word in names), "")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz (or npy) file that may be images; labels, which have fewer dimensions, are left out."""
    hints = {
        ".mat": f"for SVHN's own files: --data svhn --data-root {path.parent}",
        **dict.fromkeys((".png", ".jpg", ".jpeg"), f"for a folder of images: --data {path.parent}"),
    }
    hint = hints.get(path.suffix.lower(), "np.savez('images.npz', images=x) makes one, x uint8 [N, height, width, 3]")
    try:
        if path.suffix.lower() not in (".npz", ".npy"):
            raise ValueError(f"a {path.suffix} file" if path.exists() else "there is no such file")
        file = np.load(path, allow_pickle=False)
        arrays = {"images": file} if isinstance(file, np.ndarray) else {key: file[key] for key in file.files}
    except Exception as error:  # numpy, zipfile and zlib each have their own for a file that is no npz
        reason = getattr(error, "strerror", None) or error
        fail(f"--data {path}: not svhn, synthetic, a folder of images or a readable npz file ({reason}); {hint}")
    return {key: x for key, x in arrays.items() if x.ndim > 2 or (x.ndim == 2 and x.shape[1] == 3072)}


def read_folder(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The PNG and JPEG files below a folder, resized to 32 x 32: uint8 [N, 32, 32, 3] for each subfolder train, ...

    Also what was done to them, for the data's name.
    """
    images: dict[str, list[np.ndarray]] = {}
    sizes, modes = set(), set()
    files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    for file in progress_bar(files, desc=f"reading {path}"):
        top, *below = file.relative_to(path).parts
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError("its levels have more than 8 bits")
                upright = ImageOps.exif_transpose(image)  # turned as the camera was
                sizes.add(upright.size)
                modes.add(image.mode)
                x = np.asarray(upright.convert("RGB").resize((32, 32)))
        except Exception as error:  # Pillow's are many
            fail(f"--data {path}: {file.name} is no readable 8-bit image ({error}); convert or remove it")
        split = split_of(top) if below else ""
        images.setdefault(split or "others", []).append(x)
    done = [f"a folder of {len(files):,} images"]
    if modes - {"RGB"}:
        done.append("all made RGB")
    if others := sizes - {(32, 32)}:
        w, h = max(others)
        done.append(f"resized to 32 x 32 from {w} x {h}{' and other sizes' * (len(others) > 1)}")
    return {name: np.stack(some) for name, some in images.items()}, done


def to_images(x: np.ndarray, where: str, done: list[str]) -> np.ndarray:
    """uint8 [N, 32, 32, 3] from 8-bit colour images of any size, channels anywhere; appends to `done` what it did."""
    channels = [axis for axis in (3, 1, 2) if x.ndim == 4 and x.shape[axis] == 3]  # SVHN's own files: [H, W, 3, N]
    if x.dtype != np.uint8 or not channels:
        fail(f"{where} is {x.dtype} {list(x.shape)}, not uint8 [N, height, width, 3]; make it so: {recipe(x)}")
    if channels[0] != 3:
        x = x.transpose((0, 2, 3, 1) if channels[0] == 1 else (3, 0, 1, 2))
        done.append("channels moved last")
    if x.shape[1:3] != (32, 32):
        done.append(f"resized to 32 x 32 from {x.shape[2]} x {x.shape[1]}")
        resized = [Image.fromarray(image).resize((32, 32)) for image in progress_bar(x, desc="resizing", delay=2)]
        x = np.stack([np.asarray(image) for image in resized])
    return np.ascontiguousarray(x)


def recipe(x: np.ndarray) -> str:
    """The numpy that makes 8-bit colour images of an array x that holds images of another kind."""
    steps = []
    if x.ndim == 2:
        steps.append("x = x.reshape(-1, 3, 32, 32)")
    elif x.ndim == 3:
        steps.append("x = np.repeat(x[..., None], 3, axis=3)")
    elif x.ndim == 4 and 1 in (x.shape[1], x.shape[3]):
        steps.append(f"x = np.repeat(x, 3, axis={1 if x.shape[1] == 1 else 3})")
    elif x.ndim == 4 and 4 in (x.shape[1], x.shape[3]):
        steps.append("x = x[..., :3]" if x.shape[3] == 4 else "x = x[:, :3]")
    if x.dtype == bool:
        steps.append("x = 255 * x.astype(np.uint8)")
    elif x.dtype != np.uint8 and x.size and np.issubdtype(x.dtype, np.number):
        low, high = float(x.min()), float(x.max())
        scaled = "255 * (x - x.min()) / (x.max() - x.min())"  # such as 16-bit levels, or normalised floats
        if low >= -1 and high <= 255:
            scaled = "x" if high > 1 else "255 * x" if low >= 0 else "127.5 * (x + 1)"
        steps.append(f"x = np.clip(np.round({scaled}), 0, 255).astype(np.uint8)")
    return "; ".join([*steps, "np.savez('images.npz', images=x)"])


CODECS = ("PNG", "WebP")


def codec_bits_per_dim(images: Tensor, codec: str, **options: Any) -> float:
    """What a lossless codec of Pillow's makes of uint8 [N, 3, 32, 32]: the mean file, headers and all, bits/dim."""
    num_bytes = 0
    for x in images.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(x).save(file, codec, lossless=True, optimize=True, **options)
        num_bytes += len(file.getvalue())
        if not np.array_equal(np.asarray(Image.open(file).convert("RGB")), x):
            raise ValueError(f"{codec} did not give back the image")
    return 8 * num_bytes / images.numel()


# Synthetic images: a stand-in for SVHN that needs no download, drawn by a known law: scene (font, digits, pose,
# colours, light, blur, amount of noise), picture, noise, rounding. Given the scene, log P(levels) is known.

SYNTHETIC_BATCH = 1024  # images of the stream that are drawn together: part of what a seed means


def make_synthetic(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Synthetic splits of these sizes, uint8 [N, 32, 32, 3] each, in the order of the stream with seed 0."""
    print(f"drawing {sum(sizes):,} synthetic images", flush=True)
    images = np.concatenate([images for images, _, _ in synthetic_batches(0, sum(sizes))])
    return np.split(images, np.cumsum(sizes)[:-1])


def synthetic_batches(start: int, stop: int, seed: int = 0) -> Iterator[tuple[np.ndarray, Tensor, dict[str, Tensor]]]:
    """Images start..stop-1 of the stream that belongs to the seed, in batches: images, their pictures, their scenes.

    images uint8 [n, 32, 32, 3]; pictures, before the noise, [n, 3, 32, 32] in grey levels. What comes before `start` is
    drawn, not rendered.
    """
    generator, atlas = torch.Generator().manual_seed(seed), digit_atlas()
    for first in range(0, stop, SYNTHETIC_BATCH):
        wanted = slice(max(0, start - first), stop - first)
        scenes = {name: numbers[wanted] for name, numbers in draw_scenes(SYNTHETIC_BATCH, generator).items()}
        common, own = (torch.randn(SYNTHETIC_BATCH, c, 32, 32, generator=generator)[wanted] for c in (1, 3))
        if len(common):
            pictures = render(scenes, atlas)
            # Most of the noise is common to the three colours, a little is each colour's own.
            x = pictures + noise_amount(scenes)[:, None, None, None] * (common + 0.25 * own)
            yield x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(), pictures, scenes


def draw_scenes(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The random numbers behind n scenes, each [n] or [n, k]: u_* from U[0, 1), z_* from N(0, 1), all independent."""
    kinds = {"u": torch.rand, "z": torch.randn}
    shapes: dict[str, tuple[int, ...]] = {  # in this order: it is part of what a seed means
        "u_font": (), "u_digits": (3,), "u_scale": (), "u_aspect": (), "z_slant": (), "z_tilt": (), "z_centre": (2,),
        "u_step": (), "u_left": (), "u_right": (), "z_wall": (1,), "z_wall_tint": (3,), "z_sign": (1,),
        "u_contrast": (1,), "z_ink_tint": (3,), "z_light_x": (), "z_light_y": (), "u_blur": (1,), "z_amount": (),
    }  # fmt: skip
    return {name: kinds[name[0]](n, *shape, generator=generator) for name, shape in shapes.items()}


def noise_amount(scenes: dict[str, Tensor]) -> Tensor:
    """a, the standard deviation of the noise that a pixel's three colours share, [n], grey levels."""
    return torch.exp(math.log(1.8) + 0.5 * scenes["z_amount"])


def digit_atlas() -> Tensor:
    """Coverage masks of the ten digits in each of matplotlib's text fonts, [fonts, 10, 64, 64] in [0, 1]."""
    folder, atlas = Path(matplotlib.get_data_path()) / "fonts" / "ttf", []
    for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold",
                 "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta"):  # fmt: skip
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 64)
        for digit in "0123456789":
            image = Image.new("L", (64, 64))
            ImageDraw.Draw(image).text((32, 32), digit, fill=255, font=font, anchor="mm")
            atlas.append(np.asarray(image, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(atlas)).reshape(-1, 10, 64, 64)


def render(scenes: dict[str, Tensor], atlas: Tensor) -> Tensor:
    """The picture before its noise, [n, 3, 32, 32], grey levels, not clamped: a digit and parts of its neighbours."""
    n = len(scenes["u_font"])

    def between(low: float, high: float, name: str) -> Tensor:
        return low + (high - low) * scenes[name]

    # Place: a digit k steps to the right is the same affine picture, moved; all digits of a number share font and pose.
    font, digits = between(0, len(atlas), "u_font").long(), between(0, 10, "u_digits").long()
    scale, aspect = between(0.8, 1.35, "u_scale"), between(0.75, 1.3, "u_aspect")
    slant, tilt, centre = 0.12 * scenes["z_slant"], 0.08 * scenes["z_tilt"], 0.06 * scenes["z_centre"]
    step = between(0.95, 1.5, "u_step") * scale * aspect * 0.62
    present = {-1: scenes["u_left"] < 0.75, 0: torch.ones(n, dtype=torch.bool), 1: scenes["u_right"] < 0.75}
    cover = torch.zeros(n, 1, 32, 32)
    for k in (-1, 0, 1):
        x_row = torch.stack([1 / (scale * aspect), slant, -(centre[:, 0] + k * step) / (scale * aspect)], 1)
        y_row = torch.stack([tilt, 1 / scale, -(centre[:, 1] - k * step * tilt) / scale], 1)
        grid = F.affine_grid(torch.stack([x_row, y_row], 1), [n, 1, 32, 32], align_corners=False)
        glyph = F.grid_sample(atlas[font, digits[:, k + 1]][:, None], grid, align_corners=False)
        cover = torch.maximum(cover, glyph * present[k][:, None, None, None])
    # Colour and light: two nearly grey colours, and a linear gradient over the wall.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    wall = (116 + 35 * scenes["z_wall"]).clamp(15, 240) + 8 * scenes["z_wall_tint"] + torch.tensor([-1.0, 0.0, 7.0])
    ink = wall + torch.sign(scenes["z_sign"]) * between(20, 130, "u_contrast") + 8 * scenes["z_ink_tint"]
    light_x, light_y = (scenes[name][:, None, None] for name in ("z_light_x", "z_light_y"))
    light = 1 + 0.12 * (light_x * x + light_y * y)[:, None]
    image = torch.lerp(wall[:, :, None, None], ink[:, :, None, None], cover) * light  # (n, 3, 32, 32)
    # Blur: a Gaussian of its own width for each image, as a grouped separable convolution.
    taps = torch.exp(-0.5 * (torch.arange(-4, 5) / between(0.5, 1.5, "u_blur")) ** 2)
    kernel = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]  # (3n, 1, 9)
    image = F.pad(image, (4, 4, 4, 4), mode="replicate").reshape(1, 3 * n, 40, 40)
    image = F.conv2d(F.conv2d(image, kernel[:, :, None], groups=3 * n), kernel[..., None], groups=3 * n)
    return image.reshape(n, 3, 32, 32)


def log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    """log P(low < X < high), X ~ N(0, 1), low < high, elementwise, nats; exact to either side, however far out.

    By symmetry both ends are taken to the left, where log_ndtr keeps its digits; then the log of a difference.
    """
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_high = torch.special.log_ndtr(high)
    return log_high + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - log_high))


def scene_log_prob(levels: Tensor, mean: Tensor, amount: Tensor, apart: bool = False, step: float = 0.125) -> Tensor:
    """log P(levels | scene) of synthetic images, [B], nats. No model's log P(levels) is higher on average.

    levels [B, 3, H, W], integers; mean, the same shape, as of `render`; amount a [B], as of `noise_amount`. Given the
    scene, pixels are independent. A pixel's colours share a n, n ~ N(0, 1); given n they are independent,
    N(mean + a n, (a / 4)^2), rounded and clamped to 0..255. So P(pixel) = integral N(n; 0, 1) prod_c P(level_c | n) dn:
    a sum over points `step` apart, 7 to both sides of about the integrand's peak. The integrand is smooth on a scale of
    1/7, whatever a is, so half the step changes the result by less than 1e-9 nats.

    apart: each colour coded by itself, N(mean, (17/16) a^2): what a model pays that does not see what colours share.
    """
    a = amount.double()[:, None, None, None]
    low = (torch.where(levels == 0, -math.inf, levels - 0.5) - mean.double()) / a
    high = (torch.where(levels == 255, math.inf, levels + 0.5) - mean.double()) / a
    if apart:
        return sum_dims(log_normal_mass(low / math.sqrt(17 / 16), high / math.sqrt(17 / 16)))
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


SCENE_COST_BPD = 0.0463  # what the scene itself costs, at most: tests/tools/floor.py, results/published/floor.json


def synthetic_floor(splits: dict[str, Tensor], neg_elbo: Tensor) -> dict[str, Any]:
    """The floor of the first 1,000 synthetic test images, and how far neg_elbo [N], nats, is above it; bits/dim.

    scene_known: the mean of -log P(levels | scene), the lower side; the upper side is SCENE_COST_BPD above it.
    colours_apart: the same if each pixel's colours were coded apart. excess: of neg_elbo over scene_known, by image.
    """
    levels, start = splits["test"][:1000].cpu(), len(splits["train"]) + len(splits["valid"])
    _, pictures, scenes = zip(*synthetic_batches(start, start + len(levels)), strict=True)
    mean, amount = torch.cat(pictures), torch.cat([noise_amount(batch) for batch in scenes])
    known, apart = (-scene_log_prob(levels, mean, amount, apart=apart) for apart in (False, True))
    bits_known, bits_apart = bits_per_dim(known, levels[0].numel()), bits_per_dim(apart, levels[0].numel())
    excess = bits_per_dim(neg_elbo[: len(levels)], levels[0].numel()) - bits_known
    return {
        "images": len(levels),
        "scene_known_bpd": bits_known.mean().item(), "scene_known_se_bpd": standard_error(bits_known),
        "colours_apart_bpd": bits_apart.mean().item(),
        "excess_bpd": excess.mean().item(), "excess_se_bpd": standard_error(excess),
    }  # fmt: skip


def check_above(excess: float, error: float) -> None:
    """Raise ValueError if a bound is more than four standard errors below its floor: that is a defect of the code."""
    if excess < -4 * error:
        raise ValueError(f"a bound {-excess:.4f} ± {error:.4f} bits/dim below its floor: a defect, not a discovery")


# ------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, seed: int = 0) -> Terms:
    """Both terms for every example of x, once each, in fp32 on fixed noise. x [N, ...] -> Terms of float64 [N], nats.

    Batches have a size of their own, and batch k draws its noise from a generator that belongs to (seed, k): the same
    on every device and for any number of processes, each of which takes whole batches. The seed belongs to the
    evaluation, not to the run, so that two models are compared on the same noise.
    """
    rank, world = rank_and_world()
    batches = evaluation_batches(x)
    recon, kl = torch.zeros(2, len(x), device=x.device)
    for k in progress_bar(range(rank, len(batches), world), desc="evaluating", delay=2):
        recon[batches[k]], kl[batches[k]] = model(x[batches[k]], fixed_noise("evaluation", seed, k))
    recon, kl = (sum_over_processes(term).cpu().double() for term in (recon, kl))
    return Terms(recon, kl)


def error_of_one_draw(model: nn.Module, x: Tensor, neg_elbo: Tensor) -> float:
    """The standard error that one draw of u and z per example leaves in the mean of neg_elbo [N], nats; in bits/dim.

    From a second draw for the first 1,000 examples: half the variance of the difference is that of one draw. It is a
    part of the standard error over examples, not on top of it: each example has noise of its own.
    """
    difference = evaluate(model, x[:1000], seed=1).neg_elbo - neg_elbo[:1000]
    return bits_per_dim(difference.std().item() / math.sqrt(2 * len(x)), x[0].numel())


def evaluation_batches(x: Tensor) -> list[slice]:
    """The places in x [N, ...] of the batches of an evaluation: about a million numbers each."""
    size = max(1, 2**20 // x[0].numel())
    return [slice(start, start + size) for start in range(0, len(x), size)]


def evaluate_splits(model: nn.Module, splits: dict[str, Tensor]) -> dict[str, Terms]:
    """`evaluate` every split: all of validation and test, and of train as many examples as validation has."""
    cut = splits | {"train": splits["train"][: len(splits["valid"])]}
    return {name: evaluate(model, x) for name, x in cut.items() if len(x)}


@torch.no_grad()
def evaluate_points(model: VAE, x: Tensor) -> tuple[Terms, float]:
    """Both terms for points x [N, 2] under the prior N(0, I), almost without Monte Carlo noise: Terms of [N], nats.

    The KL is in closed form, sum (mu^2 + sigma^2 - 1) / 2 - log sigma; recon is the mean over 64 draws of z per point.
    Also the standard error, nats, that these draws leave in the mean over points: sqrt(sum_n s_n^2 / 64) / N.
    """
    draws = 64
    kl, recon, variances = [], [], []
    for k, some in enumerate(x.split(1000)):
        mu, log_std = model.encoder(some)  # each (B, 2)
        eps = noise(torch.randn, (draws, 1000, 2), x.device, fixed_noise("draws", k))[:, : len(some)]
        z = mu + torch.exp(log_std) * eps  # (draws, B, 2)
        log_p = model.log_p_x(some.repeat(draws, 1), z.flatten(0, 1)).cpu().double().view(draws, -1)  # (draws, B)
        kl.append(sum_dims((mu**2 + torch.exp(2 * log_std) - 1) / 2 - log_std).cpu().double())
        recon.append(-log_p.mean(0))
        variances.append(log_p.var(0))
    error = (torch.cat(variances).sum() / draws).sqrt().item() / len(x)
    return Terms(torch.cat(recon), torch.cat(kl)), error


@torch.no_grad()
def posteriors(model: Any, data: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """x, z ~ q(z|x), mu and log std, an evaluation's batch at a time, on the noise of `evaluate` with seed 0."""
    for k, places in enumerate(evaluation_batches(data)):
        generator = fixed_noise("evaluation", 0, k)
        x = model.to_x(data[places], generator)
        yield (x, *model.posterior(x, generator))


@torch.no_grad()
def kl_per_position(model: Any, levels: Tensor) -> Tensor:
    """What each position of z costs: the mean over images of log q(z_i|x) - log p(z_i|z_<i), [H, W], bits.

    Summed over positions it is the KL term, up to rounding. levels uint8 [N, 3, 32, 32].
    """
    summed = torch.zeros(model.prior.latent_shape[1:], dtype=torch.float64, device="cpu")
    for _, z, mu, log_std in posteriors(model, levels):
        kl = normal_log_density(z, mu, log_std) - normal_log_density(z, *model.prior.mean_and_log_std(z))
        summed += kl.sum((0, 1)).cpu().double()
    return bits_per_dim(summed / len(levels), 1)


SCHEDULES: dict[str, Callable[[float], float]] = {  # learning rate over its peak, from the fraction of training done
    "constant": lambda done: 1.0,
    "one-cycle": lambda done: done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)),
    "trapezoid": lambda done: min(1.0, done / 0.05, (1 - done) / 0.7),
}


def orthogonalise(x: Tensor) -> Tensor:
    """Wide matrices with their singular values moved towards 1 and their singular vectors kept. [n, a, b >= a] -> same.

    Five steps of Newton-Schulz, x <- (3.4445 - 4.7750 g + 2.0315 g^2) x with g = x x^T, from x / |x|. Each factor is a
    polynomial of g, so the loop works on the small g alone; q collects the factors and meets x once, at the end.
    """
    g = x @ x.mT  # (n, a, a)
    norm = g.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30).sqrt()[:, None, None]
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    g, q = g / norm**2, identity / norm
    for _ in range(5):
        factor = 3.4445 * identity - 4.7750 * g + 2.0315 * g @ g
        g, q = factor @ g @ factor, factor @ q
    return q @ x


class Muon(torch.optim.Optimizer):
    """w <- w - lr sqrt(max(1, a / b)) orthogonalise(m) for w [a, b] or [a, b, h, w], with m its Nesterov momentum.

    Adam moves a kernel mostly along the few directions that its gradients share; here every direction of the update
    counts alike. K. Jordan et al. 2024 (kellerjordan.github.io/posts/muon). As a matrix, a kernel keeps the smaller of
    a and b as one side and has all else on the other; a and b are the tensor's, also for a transposed convolution.
    Kernels of equal shape go through one batched product.
    """

    def __init__(self, kernels: Iterable[Tensor], lr: float):
        super().__init__(kernels, dict(lr=lr, momentum=0.95))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for kernel in group["params"]:
            by_shape.setdefault(kernel.shape, []).append(kernel)
        for (a, b, *_), kernels in by_shape.items():
            updates = []
            for kernel in kernels:
                state, gradient = self.state[kernel], cast(Tensor, kernel.grad)
                if not state:
                    state["momentum"] = torch.zeros_like(kernel)
                m = state["momentum"]
                m.lerp_(gradient, 1 - group["momentum"])
                updates.append(gradient.lerp(m, group["momentum"]).movedim(1, -1))  # no copy if channels are last
            update = torch.stack(updates)  # (n, a, h, w, b)
            wide = update.flatten(2) if a <= b else update.flatten(1, -2).mT
            wide = orthogonalise(wide)
            update = (wide if a <= b else wide.mT).reshape(update.shape).movedim(-1, 2)
            for kernel, change in zip(kernels, update, strict=True):
                kernel.sub_(change, alpha=group["lr"] * max(1, a / b) ** 0.5)


def make_optimisers(model: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Adam; and, if muon_lr is not 0, Muon for matrices and kernels larger than 1x1 from and to 16 channels or more.

    Adam keeps what touches pixels, the 1x1 heads and the biases, as Muon's authors advise.
    """

    def for_muon(p: Tensor) -> bool:
        return muon_lr > 0 and p.ndim > 1 and min(p.shape[:2]) >= 16 and p.shape[2:] != (1, 1)

    learned = [p for p in model.parameters() if p.requires_grad]
    hidden, others = [p for p in learned if for_muon(p)], [p for p in learned if not for_muon(p)]
    adam = torch.optim.Adam(others, lr=lr, fused=others[0].device.type in ("cpu", "cuda"))
    return [adam, Muon(hidden, lr=muon_lr)] if hidden else [adam]


CURVE_KEYS = ("neg_elbo_bpd", "kl_bpd", "recon_bpd")  # what a curve holds for each split


def no_curves() -> dict[str, Any]:
    """Curves before the first look."""
    return {"step": [], "epoch": [], **{split: {key: [] for key in CURVE_KEYS} for split in SPLITS}}


@dataclass
class Progress:
    """Where a training stands: with weights and optimiser, all that `fit` needs to go on."""

    step: int = 0
    seconds: float = 0.0
    curves: dict[str, Any] = field(default_factory=no_curves)
    best_bound: float = math.inf  # -ELBO on validation, bits/dim
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    skipped: int | Tensor = 0  # steps without a finite gradient, counted on the device
    skipped_in_a_row: int | Tensor = 0


KEEP_SECONDS = 60  # between checkpoints within an epoch
MOST_SKIPPED = 10  # steps in a row without a finite gradient, before training stops


def fit(
    model: Any, splits: dict[str, Tensor], *, epochs: int, batch_size: int, lr: float, path: Path, run: dict[str, Any],
    muon_lr: float = 0.0, schedule: str = "one-cycle", kl_warmup: float | None = None, seed: int = 0,
    precision: str = "fp32", resume: bool = False, name: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Minimise model.loss on splits["train"]; leave the best weights in the model, return the curves.

    lr and muon_lr: the schedule's peaks for Adam and for Muon (`make_optimisers`). kl_warmup: over this fraction of
    training the KL's weight rises from 0 to 1. At up to 21 steps the first examples of every split are evaluated
    (`num_looked_at`, `steps_to_look`); the best weights are those with the lowest -ELBO on validation's. path: the
    checkpoint, written after each epoch and every minute. With resume, training goes on from it, on a CPU to the same
    bits: order and noise of a step are functions of the seed and the step alone. run: script and arguments, for the
    checkpoint. name: of the model, in what is printed.
    """
    train, device, (rank, world) = splits["train"], splits["train"].device, rank_and_world()
    steps_per_epoch = whole_batches(len(train), batch_size)
    steps = epochs * steps_per_epoch
    optimisers = make_optimisers(model, lr, muon_lr)
    must_match = what_must_match(run, model, splits)
    now, order = Progress(), None
    make_folder(path.parent)
    if resume and path.exists():
        now = load_progress(path, must_match, model, optimisers, steps)
    examples = now.curves.setdefault("examples", num_looked_at(splits, epochs))  # the same for the whole curve
    looked_at = {split: x[:examples] for split, x in splits.items()}
    started, saved_at = time.monotonic() - now.seconds, time.monotonic()
    with progress_bar(total=steps, initial=now.step, desc=name or "training") as bar:
        while True:
            now.seconds = round(time.monotonic() - started, 1)
            if now.step in steps_to_look(steps) and now.step not in now.curves["step"]:
                bar.clear()
                look(now, model, looked_at, now.step / steps_per_epoch, name)
                write_curves(path, now.curves)
            if now.step % steps_per_epoch == 0 or time.monotonic() - saved_at > KEEP_SECONDS:
                weights, states = model.state_dict(), [optimiser.state_dict() for optimiser in optimisers]
                contents = {
                    **run, "state": now.best_weights, "curves": now.curves, "finished": now.step == steps,
                    "must_match": must_match, "progress": {**vars(now), "weights": weights, "optimisers": states},
                }  # fmt: skip
                save_checkpoint(path, contents)
                saved_at = time.monotonic()
            if now.step == steps:
                break
            epoch, place = divmod(now.step, steps_per_epoch)
            if place == 0 or order is None:
                order = torch.randperm(len(train), generator=fixed_noise("order", seed, epoch), device="cpu").to(device)
            batch = order[place * batch_size : (place + 1) * batch_size][rank::world]
            done = now.step / steps
            kl_weight = min(1.0, done / kl_warmup) if kl_warmup else 1.0
            for optimiser, peak in zip(optimisers, (lr, muon_lr), strict=False):
                optimiser.param_groups[0]["lr"] = peak * SCHEDULES[schedule](done)
            torch.manual_seed(seed_of("step", seed, now.step))
            finite = train_step(model, optimisers, train[batch], precision, kl_weight, done)
            now.step += 1
            now.skipped = now.skipped + ~finite
            now.skipped_in_a_row = (now.skipped_in_a_row + 1) * ~finite
            if now.step % 10 == 0 and now.skipped_in_a_row >= MOST_SKIPPED:  # rarely, as it waits for the device
                why = f"{MOST_SKIPPED} steps in a row without a finite gradient, the last of them step {now.step}"
                fail(f"{why}: try a lower --lr or --precision fp32", status=1)
            bar.update(1)
    model.load_state_dict(now.best_weights)
    return now.curves


def whole_batches(examples: int, batch_size: int) -> int:
    """Whole batches in so many examples: an epoch leaves out the remainder of its own random order."""
    if batch_size > examples:
        fail(f"--batch-size {batch_size} is more than the {examples} training examples; choose a smaller one")
    if batch_size % rank_and_world()[1]:
        fail(f"--batch-size {batch_size} cannot be shared evenly by {rank_and_world()[1]} processes")
    return examples // batch_size


def num_looked_at(splits: dict[str, Tensor], epochs: int) -> int:
    """How many examples of each split a look evaluates: so few that looking costs about a tenth of training.

    An example's evaluation takes about .6 of its training step; 21 looks at three splits are then a tenth of the
    training's time if each takes 1/360 of the examples that are trained on. At least 32; no more than validation has.
    """
    return min(len(splits["valid"]), max(32, epochs * len(splits["train"]) // 360))


def steps_to_look(steps: int) -> set[int]:
    """Before the first step, after the last, and nineteen times between them, denser early: steps (k / 20)^2."""
    return {round(steps * (k / 20) ** 2) for k in range(21)}


def train_step(
    model: Any, optimisers: list[Any], x: Tensor, precision: str, kl_weight: float = 1.0, done: float = 0.0
) -> Tensor:
    """One step of the optimisers on this process's share x of a batch. Gradients are clipped to norm 1.

    If loss or gradients are not finite, the gradients are set to 0, so that nothing of this batch reaches the weights.
    Returns whether they were finite, [], on the device, so that nothing here waits for it.
    """
    with torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        loss = model.loss(x, kl_weight, done)
    model.zero_grad()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    average_over_processes(gradients)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    finite = torch.isfinite(norm + sum_over_processes(loss))
    if x.device.type != "cpu" or not finite:  # on a GPU at every step: to ask would be to wait
        for gradient in gradients:
            gradient.masked_fill_(~finite, 0)
    for optimiser in optimisers:
        optimiser.step()
    return finite


def look(now: Progress, model: Any, splits: dict[str, Tensor], epoch: float, name: str) -> None:
    """Evaluate the splits, print a line, enter it into the curves; keep the weights if validation is at its best."""
    bounds = {split: in_bits(evaluate(model, x), x[0].numel()) for split, x in splits.items()}
    values = "  ".join(f"{split} {bound['neg_elbo_bpd']:7.4f}" for split, bound in bounds.items())
    terms = f"(valid: KL {bounds['valid']['kl_bpd']:.4f} + decoder {bounds['valid']['recon_bpd']:.4f})"
    skipped = f"  {int(now.skipped)} steps skipped so far" if now.skipped else ""
    print(f"{name}  " if name else "", f"epoch {epoch:5.2f}  step {now.step:5d}  -ELBO bits/dim: {values}  {terms}  ",
          f"{now.seconds:6.0f} s{skipped}", sep="", flush=True)  # fmt: skip
    if not all(math.isfinite(bound["neg_elbo_bpd"]) for bound in bounds.values()):
        fail(f"training diverged by step {now.step}: the bound is not a number; try a lower --lr", status=1)
    now.curves["step"].append(now.step)
    now.curves["epoch"].append(round(epoch, 4))
    now.curves |= {"skipped_steps": int(now.skipped), "seconds": now.seconds}
    for split, key in itertools.product(SPLITS, CURVE_KEYS):
        now.curves[split][key].append(bounds[split][key])
    if bounds["valid"]["neg_elbo_bpd"] < now.best_bound:
        now.best_bound, now.best_weights = bounds["valid"]["neg_elbo_bpd"], copy.deepcopy(model.state_dict())
        now.curves |= {"best_step": now.step, "best_epoch": round(epoch, 4)}


def write_curves(path: Path, curves: dict[str, Any]) -> None:
    """The curves as a table beside the checkpoint: a row per look, added as it happens."""
    if rank_and_world()[0]:
        return
    table = path.with_name("curves.csv" if path.name == "checkpoint.pt" else f"{path.stem}_curves.csv")
    columns = {"step": curves["step"], "epoch": curves["epoch"]}
    columns |= {f"{split}_{key}": curves[split][key] for split, key in itertools.product(SPLITS, CURVE_KEYS)}
    *earlier, row = [",".join(map(str, row)) + "\n" for row in (columns, *zip(*columns.values(), strict=True))]
    with attempt(f"a new row of {table}", {}):
        if not table.exists() or table.read_text() != "".join(earlier):  # the first look, or the first after --resume
            write_whole(table, lambda file: file.write("".join(earlier).encode()))
        with open(table, "a") as file:  # so that `tail -f` can follow it
            file.write(row)


class LogFile:
    """What tqdm writes into in a log: each state of a bar becomes a line."""

    def write(self, text: str) -> None:
        if text.strip():  # not what moves a cursor or blanks a bar
            print(text.strip(), flush=True)


def progress_bar(*args: Any, **options: Any) -> Any:
    """tqdm's bar in a notebook and on a terminal, in a log a line per minute; one for all processes."""
    if not IN_KERNEL and not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt} after {elapsed}"
        options |= dict(file=LogFile(), bar_format=line, position=0, delay=60, mininterval=60, miniters=1)
    return tqdm.auto.tqdm(*args, leave=False, disable=rank_and_world()[0] > 0, **options)


# Several processes: torchrun starts the same program, with the same random numbers. In training each process takes
# every world-th example of a batch, and gradients are averaged; in an evaluation every world-th batch. Rank 0 alone
# writes and prints. With one process these functions change nothing.


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes: 0 of 1, unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of x over processes, without a gradient."""
    x = x.detach().clone()
    if rank_and_world()[1] > 1:
        dist.all_reduce(x)
    return x


def average_over_processes(tensors: list[Tensor]) -> None:
    """Set each tensor to its mean over processes, in one exchange."""
    world = rank_and_world()[1]
    if world > 1:
        means = sum_over_processes(torch.cat([x.flatten() for x in tensors])) / world
        for x, mean in zip(tensors, means.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view(x.shape))


# Checkpoints: one file per training, always whole. It holds what the script hands to `fit` (its name, its arguments),
# the best weights so far as `state`, the curves, whether training is finished, and what --resume needs.

FREE_ARGS = {"epochs", "out", "data", "data_root", "evaluate", "samples", "seeds", "device"}  # may differ on --resume


def what_must_match(run: dict[str, Any], model: Any, splits: dict[str, Tensor]) -> dict[str, Any]:
    """What has to be the same for a training to go on: arguments but FREE_ARGS, data, the network's shapes."""
    flags = {f"--{k.replace('_', '-')}": v for k, v in run.get("args", {}).items() if k not in FREE_ARGS}
    shapes = str({k: list(v.shape) for k, v in model.state_dict().items()})
    return {**flags, "the data": sha256_of(splits), "the network": shapes}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """In what two `what_must_match` differ; of an argument, both values."""
    differing = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    return [f"{k} ({theirs.get(k)}, now {ours.get(k)})" if k.startswith("--") else k for k in differing]


def load_progress(path: Path, must_match: dict[str, Any], model: Any, optimisers: list[Any], steps: int) -> Progress:
    """Set weights and optimisers to what the checkpoint holds, and return where it stands."""
    saved = read_checkpoint(path, ("progress", "must_match"))
    if differing := differences(saved["must_match"], must_match):
        fail(f"--resume: {path} is of a run that differs in {', '.join(differing)}; leave --resume out or mend it")
    state = saved["progress"]
    if state["step"] > steps:
        fail(f"--resume: {path} has {state['step']} steps behind it, more than the {steps} of --epochs; raise --epochs")
    model.load_state_dict(state.pop("weights"))
    for optimiser, saved_state in zip(optimisers, state.pop("optimisers"), strict=True):
        optimiser.load_state_dict(saved_state)
    print(f"going on from {path}, step {state['step']} of {steps}", flush=True)
    return Progress(**state)


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """torch.save. On a full disk a line says so, the checkpoint before stays, and the run goes on."""
    buffer = io.BytesIO()  # in memory first, as torch.save has errors of its own kinds for a full disk
    torch.save(contents, buffer)
    with attempt(f"a new {path} (the one before is kept)", {}):
        write_whole(path, lambda file: file.write(buffer.getbuffer()))


# What --evaluate takes from its own command line; all other arguments are those that trained the checkpoint.
EVALUATION_ARGS = {"evaluate", "samples", "data", "data_root", "limit", "device", "precision", "out", "smoke"}


def load_trained(args: argparse.Namespace, script: str) -> dict[str, Any]:
    """The checkpoint that --evaluate names: curves, weights (state), finished. Its arguments go into args; printed."""
    saved = read_checkpoint(Path(args.evaluate), ("args", "state", "curves", "finished"), script)
    vars(args).update({k: v for k, v in saved["args"].items() if k not in EVALUATION_ARGS})
    print_settings(script, args)
    return saved


def to_device(model: Any, args: argparse.Namespace, trained: dict[str, Any] | None = None) -> Any:
    """The model on --device, with the weights of --evaluate if they are given.

    channels_last is faster on CPUs and for bf16 on GPUs; in fp32, older GPUs are slower with it.
    """
    if trained:
        try:
            model.load_state_dict(trained["state"])
        except RuntimeError:
            fail(f"--evaluate {args.evaluate}: its weights do not fit this model")
    last = args.device == "cpu" or args.precision == "bf16"
    return model.to(args.device, memory_format=torch.channels_last if last else torch.contiguous_format)


def read_checkpoint(path: Path, keys: tuple[str, ...], script: str = "") -> dict[str, Any]:
    """What `save_checkpoint` wrote, with these keys, and of this script; no code in it is ever run (`weights_only`)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange files: the error says enough
            saved = torch.load(path, map_location="cpu", weights_only=True)
        wanted = (*keys, "script") if script else keys
        saved = {key: saved[key] for key in wanted}
    except Exception as error:  # of the file system, zip, pickle or torch, each with its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"{path}: not a readable checkpoint ({reason})")
    if script and saved["script"] != script:
        fail(f"{path}: a checkpoint of {saved['script']}, not of {script}")
    return saved


# ---------------------------------------------------------------------------------------------- figures and files


@contextmanager
def attempt(what: str, failed: dict[str, str]) -> Iterator[None]:
    """A step that a run can do without: if it fails, print a line and note the reason in `failed`, and go on."""
    try:
        yield
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = (str(error).splitlines() or [""])[0]
        failed[what] = f"{type(error).__name__}: {reason} ({Path(place.filename).name}, line {place.lineno})"
        if isinstance(error, SystemExit):  # a further training that has ended by `fail`
            failed[what] = str(error.__cause__)
        plt.close("all")
        print(f"warning: {what} is missing: {failed[what]}", file=sys.stderr, flush=True)


def prepare(out: Path, args: argparse.Namespace, examples: int) -> None:
    """In the first second, make sure of what a run needs later: whole batches, a folder of its own, and figures."""
    if not getattr(args, "evaluate", None):
        whole_batches(examples, args.batch_size)
    if not claim(out, args.resume) and args.resume:
        print(f"--resume: there is no earlier run in {out}; this one starts from the beginning")
    with attempt("a trial figure", {}):
        plt.figure().savefig(io.BytesIO())
        plt.close()


LOCKED: dict[Path, int] = {}  # folders that this process writes into, each with its descriptor


def claim(out: Path, resume: bool) -> bool:
    """Make the folder this run's own, and return whether an earlier run was there. Ends if another run is alive there.

    Results of an earlier run are moved, whole, to a folder with a number: OUT/q2b to OUT/q2b.1; with resume they stay.
    """
    if rank_and_world()[0]:  # rank 0 writes for all
        return True
    lock(make_folder(out))
    earlier_run = any((out / name).exists() for name in ("metrics.json", "checkpoint.pt", "progress"))
    if not resume and earlier_run:
        if (out / "evaluate").exists():  # another process may be writing there
            lock(out / "evaluate")
        numbered = (out.with_name(f"{out.name}.{k}") for k in itertools.count(1))
        earlier = next(path for path in numbered if not path.exists())
        out.rename(earlier)
        if out in LOCKED:  # the moved folder stays locked too, for a process that has opened it by its old name
            LOCKED[earlier] = LOCKED.pop(out)
        print(f"earlier results in {out} are now in {earlier}; to go on with an earlier run: --resume")
        lock(make_folder(out))
    return earlier_run


def lock(folder: Path) -> None:
    """A lock on the folder until main or this process ends; nothing where there are no locks, as on Windows."""
    if os.name != "posix" or folder in LOCKED:
        return
    import fcntl  # of Unix alone

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run, or a notebook's, is writing into {folder}: wait for its end, or choose another --out")
    except OSError:  # a network file system without locks
        pass
    LOCKED[folder] = descriptor


@contextmanager
def gives_folders_back() -> Iterator[None]:
    """On every main: after it nothing is locked, whatever ended it. A notebook's process goes on."""
    try:
        yield
    finally:
        while LOCKED:
            os.close(LOCKED.popitem()[1])


def make_folder(path: Path) -> Path:
    """The folder, made if it is missing; a clear message if it cannot be made or written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / ".writable", lambda file: None)
        (path / ".writable").unlink(missing_ok=True)
    except OSError as error:
        fail(f"cannot write into the folder {path}: {error.strerror}; choose another with --out or --data-root")
    return path


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Let `write` fill a file, so that path holds all of it or what it held before: a temporary file, then a rename."""
    if rank_and_world()[0]:  # rank 0 writes for all
        return
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.errno and not error.filename:  # a disk that is full does not name it
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_metrics(out: Path, args: argparse.Namespace, metrics: dict[str, Any]) -> None:
    """metrics.json, with the seconds since this process read its arguments. NaN and infinity are errors."""
    metrics["seconds"] = round(time.monotonic() - args.started, 1)
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    write_whole(out / "metrics.json", lambda file: file.write(text.encode()))


def write_report(out: Path, report: str, failed: dict[str, str], last: bool = True) -> None:
    """report.md, which names below its title what is missing; the last report then ends the program with status 1."""
    missing = "".join(f"**Missing: {what}.** {reason}\n\n" for what, reason in failed.items())
    title, rest = report.split("\n\n", 1)
    write_whole(out / "report.md", lambda file: file.write(f"{title}\n\n{missing}{rest}".encode()))
    print(f"wrote {out / 'report.md'}, its figures and metrics.json")
    if failed and last:
        fail(
            f"missing: {', '.join(failed)}; once mended, the same command with --resume adds it; no training is lost", 1
        )


def describe_run(script: str, args: argparse.Namespace, data: dict[str, Any], *models: nn.Module) -> dict[str, Any]:
    """The head of metrics.json: what ran, with what, on which data and machine."""
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    env = {
        "torch": torch.__version__, "python": platform.python_version(), "system": platform.system(),
        "device": f"{device.type} ({name})", "threads": torch.get_num_threads(),
    }  # fmt: skip
    params = sum(p.numel() for model in models for p in model.parameters())
    return {"script": script, "args": settings(args), "data": data, "env": env, "params": params}


def settings(args: argparse.Namespace, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments that say what a run is: all but --resume, the time of its start, and those in `but`."""
    return {k: v for k, v in vars(args).items() if k not in ("resume", "started", *but)}


def cpu_name() -> str:
    """The processor's name, and how many of its cores there are."""
    info = Path("/proc/cpuinfo")  # of Linux
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


DPI = 130  # of every figure


def save_figure(fig: Any, path: Path) -> None:
    """Write the figure as a PNG without transparency and close it; in a notebook, show it too."""
    if fig.get_layout_engine():
        fig.draw_without_rendering()  # a first layout: its axes' ticks ask for more or less room than was guessed
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=DPI)
    write_whole(path, lambda file: Image.open(drawn).convert("RGB").save(file, "PNG"))
    plt.close(fig)
    if IN_KERNEL:
        from IPython.display import display  # as plt.show leaves out figures without axes

        display(Image.open(drawn))


def draw_curves(axes: Any, curves: dict[str, Any], floors: dict[str, tuple[float, float]] | None = None) -> None:
    """-ELBO, KL and decoder term against the step, on three axes, bits/dim: train thin, validation and test bold.

    floors: {label: (lower, upper side)} of what -ELBO is held against. Of the first half of the looks, the highest may
    lie above the axes: they would flatten the rest.
    """
    thin, bold, dashed = dict(lw=1, color="0.35"), dict(lw=2, color="C0"), dict(lw=2, color="C1", ls="--")
    steps = np.array(curves["step"])
    late = steps >= steps[-1] / 100
    for ax, key, title in zip(axes, CURVE_KEYS, ("−ELBO", "KL term", "decoder term"), strict=True):
        for split, style in zip(SPLITS, (thin, bold, dashed), strict=True):
            ax.plot(steps[late], np.array(curves[split][key])[late], label=split, marker=".", **style)
        drawn = floors if floors and ax is axes[0] else {}
        for k, (label, (low, high)) in enumerate(drawn.items()):
            ax.axhspan(low, high, color=("k", "0.6")[k], lw=0, alpha=0.5)
            ax.axhline(low, color=("k", "0.6")[k], lw=1.2, ls=":", label=label)
        values = np.array([curves[split][key] for split in SPLITS])
        low = min([values.min(), *(low for low, _ in drawn.values())])
        high = max(np.quantile(values, 0.8), values[:, len(steps) // 2 :].max())
        margin = 0.06 * (high - low) + 1e-3
        ax.set(title=title, xlabel="training step", ylabel="bits/dim", ylim=(low - margin, high + margin))
        ax.set_xscale("log" if steps[-1] else "linear")
    axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)


def plot_curves(curves: dict[str, Any], title: str, path: Path, floor: dict[str, Any] | None = None) -> None:
    """One model's curves, as `draw_curves` draws them, with a `synthetic_floor`."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    floors = {}
    if floor:
        known, apart = floor["scene_known_bpd"], floor["colours_apart_bpd"]
        floors = {"entropy": (known, known + SCENE_COST_BPD), "scene known, colours apart": (apart, apart)}
    draw_curves(axes, curves, floors)
    fig.suptitle(title, wrap=True)
    save_figure(fig, path)


def plot_images(panels: dict[str, Tensor], columns: int, title: str, path: Path, stacked: bool = False) -> None:
    """Panels of images, {panel's title: uint8 [N, 3, 32, 32]}, side by side or stacked; two screen pixels per pixel."""
    grids = {name: tiled(images.cpu(), columns).repeat(2, 0).repeat(2, 1) for name, images in panels.items()}
    h, w = (max(grid.shape[k] for grid in grids.values()) for k in (0, 1))
    down, across = (len(grids), 1) if stacked else (1, len(grids))
    width = across * (w + 20) + 20
    title = "\n".join(textwrap.fill(line, int(width / 10)) for line in title.splitlines())  # pixels per letter
    height = down * (h + 35) + 20 + 22 * (title.count("\n") + 1)
    fig = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for k, (name, grid) in enumerate(grids.items()):
        row, column = (k, 0) if stacked else (0, k)
        x, y = 20 + column * (w + 20), 15 + (down - 1 - row) * (h + 35)
        fig.figimage(grid, x, y + h - grid.shape[0], origin="upper")
        fig.text(x / width, (y + h + 6) / height, name, fontsize=9)
    fig.suptitle(title, fontsize=10, y=1 - 8 / height)
    save_figure(fig, path)


def tiled(images: Tensor, columns: int) -> np.ndarray:
    """Images uint8 [N, 3, H, W] in rows, with white lines around them. -> uint8 [height, width, 3]."""
    rows = -(-len(images) // columns)
    x = F.pad(images, (0, 1, 0, 1), value=255)  # a white line to the right of each image, and one below
    x = torch.cat([x, x.new_full((rows * columns - len(x), *x.shape[1:]), 255)]).unflatten(0, (rows, columns))
    x = x.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (3, rows (H + 1), columns (W + 1))
    return F.pad(x, (1, 0, 1, 0), value=255).permute(1, 2, 0).numpy()


def straight_lines(ends: Tensor, steps: int) -> Tensor:
    """Between the codes of each pair of images, 0 and 1, 2 and 3, ...: [2 P, C, 8, 8] -> [P * steps, C, 8, 8]."""
    a, b = ends.unflatten(0, (-1, 1, 2)).unbind(2)  # each (P, 1, C, 8, 8)
    return torch.lerp(a, b, torch.linspace(0, 1, steps, device=ends.device)[:, None, None, None]).flatten(0, 1)


def between_ends(images: Tensor, decoded: Tensor) -> Tensor:
    """Rows of an interpolation, true pairs around decoded steps: [2 P, ...], [P * n, ...] -> [P * (n + 2), ...]."""
    pairs = images.unflatten(0, (-1, 2))
    return torch.cat([pairs[:, :1], decoded.unflatten(0, (len(pairs), -1)), pairs[:, 1:]], 1).flatten(0, 1)


def evenly_spaced(x: Tensor, n: int) -> Tensor:
    """At most n examples, an even number, at equal distances in x: neighbours may look alike. [N, ...] -> [n, ...]."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x)) // 2 * 2).long().to(x.device)]


def write_images(images: Tensor, folder: Path, first: int) -> None:
    """Single images, uint8 [N, 3, 32, 32], as PNG files 0000.png, 0001.png, ... from number `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        write_whole(folder / f"{first + k:04d}.png", partial(Image.fromarray(image).save, format="PNG"))


def bounds_text(metrics: dict[str, Any], colours_apart: bool) -> str:
    """A report's answer to what an image costs: beside lossless codecs, on each split, in training, above the floor.

    colours_apart: whether the decoder knows nothing of a pixel's neighbours and colours, as that of 2a and 2b.
    """
    final, curves, codecs = metrics["final"], metrics["curves"], metrics.get("test_codecs_bpd", {})
    bound, gap = final["test"]["neg_elbo_bpd"], metrics.get("check_prior_nats", math.nan)
    listed = ", ".join(f"{codec} {bits:.3f}" for codec, bits in codecs.items())
    cheaper = " and ".join(codec for codec, bits in codecs.items() if bits < bound)
    why = ""
    if bound > 8:
        why = " A uniform guess costs 8: this model has learned too little to be of use."
    elif cheaper and colours_apart:
        why = f""" The model is worse than {cheaper}: codecs predict
a pixel from its neighbours, WebP also one colour from another. This decoder, once it has z, codes every pixel and every
colour apart: what neighbours share has to be in z, or is paid for again at each pixel."""
    rows = "\n".join(
        f"| {name} | {f['neg_elbo_bpd']:.4f} ± {f['neg_elbo_se_bpd']:.4f} | {f['kl_bpd']:.4f} | {f['recon_bpd']:.4f} |"
        for name, f in final.items()
    )
    few = f"the first {curves['examples']:,} images" if "examples" in curves else "the first images"
    verdict = " **CHECK FAILED: trust no KL here.**" if gap > 1e-6 else ""
    return f"""**A test image costs at most {bound:.3f} bits/dim, on average.** Lossless files of the first test images
(1,000 at most), headers and all, in bits/dim: {listed or "missing"}.{why}

| split | −ELBO, bits/dim | KL term | decoder term |
|---|---|---|---|
{rows}

Upper bounds on the mean code length of the 8-bit images, in fp32 on fixed noise; −ELBO is the sum of the two terms.
± is one standard error over images. The part of it that is due to the noise, drawn once per image, is
{metrics.get("test_draw_se_bpd", math.nan):.4f} on test. "train": its first images, as many as validation has.
Check of the prior (0 up to rounding): at a z that it draws, log p(z) differs by {gap:.1g} nats from what autograd's
Jacobian gives.{verdict}

![curves](curves.png)

The curves show the training of these weights, on {few} of each split of its own data. The weights kept are
those of epoch {curves["best_epoch"]:g}, the best on validation. Training steps that were skipped, as loss or gradients
were not finite: {curves["skipped_steps"]}.
{floor_text(metrics.get("floor"), colours_apart)}"""


def floor_text(floor: dict[str, Any] | None, colours_apart: bool) -> str:
    """A report's section on the distance from the floor, for synthetic images; else nothing."""
    if not floor:
        return ""
    known, apart = floor["scene_known_bpd"], floor["colours_apart_bpd"]
    colours = f"""Its decoder codes a pixel's colours together: coded apart they
would cost at least {apart - known:.2f} more, even with a perfect code."""
    if colours_apart:
        colours = f"""Of this, {apart - known:.2f} is the
price of coding the colours apart, even with a perfect code (unless the code carries the noise)."""
    return f"""
## How far from the floor

| on the first {floor["images"]:,} test images | bits/dim |
|---|---|
| entropy, at least: −log P(image given its scene) | {known:.4f} ± {floor["scene_known_se_bpd"]:.4f} |
| entropy, at most: the scene paid for too | {known + SCENE_COST_BPD:.4f} |
| scene known, but each pixel's three colours coded apart | {apart:.4f} |
| this model's −ELBO | {known + floor["excess_bpd"]:.4f} |

No model's mean is below the first row. This model's is {floor["excess_bpd"]:.4f} ± {floor["excess_se_bpd"]:.4f} above
it (paired by image). {colours} The rest: the code's price, what the code leaves out, training that could go on.
"""


def training_text(metrics: dict[str, Any]) -> str:
    """A report's lines on the data, the model and its training."""
    args, data, curves = metrics["args"], metrics["data"], metrics["curves"]
    sizes = f"{data['train']:,} training, {data['valid']:,} validation and {data['test']:,} test images"
    seconds = f"{curves['seconds']:,.0f} s"
    if args["evaluate"]:
        earlier = "an earlier run" if metrics["finished"] else "a run that **was not finished**"
        trained = f"by {earlier}, in {seconds}; bounds and figures here are of the data above"
    else:
        trained = f"in {seconds} on {metrics['env']['device']}, {args['precision']} training steps"
    smoke = "**A --smoke run on tiny sizes: it tests the path, and its numbers tell nothing.**\n\n" * args["smoke"]
    return f"""{smoke}Data: {data["name"]}: {sizes}.
{metrics["params"]:,} parameters, z of {args["latents"]} x 8 x 8; trained to epoch {curves["epoch"][-1]:g} {trained}.
Batches of {args["batch_size"]}; peak rates {args["lr"]:g} (Adam) and {args["muon_lr"]:g} (Muon), {args["schedule"]}."""


def seeds_table(seeds: dict[int, Any], values: Callable[[dict[str, Any]], dict[str, float]]) -> str:
    """A report's section: mean ± standard deviation over seeds of `values`, for each model of a run's "final"."""
    if len(seeds) < 2:
        return ""
    rows = []
    for name in next(iter(seeds.values())):
        columns = [list(values(final[name]).values()) for final in seeds.values()]
        cells = [f"{np.mean(c):.4f} ± {np.std(c, ddof=1):.4f}" for c in zip(*columns, strict=True)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    heads = list(values(next(iter(next(iter(seeds.values())).values()))))
    table = "\n".join([f"| model | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *rows])
    return f"""
## {len(seeds)} seeds

{table}

Mean ± standard deviation over seeds {", ".join(map(str, seeds))}, bits/dim, test. All of the above is of the first;
each other has its own report in a folder beside this one.
"""


# --------------------------------------------------------------------------------------------------- command line


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program, or the step within `attempt`, with one line: status 2 for bad input, 1 for a run that failed."""
    if not rank_and_world()[0]:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status) from RuntimeError(message)


def launch(main: Callable[[], None]) -> None:
    """main(), as a script: what interrupts it, and what the machine runs out of, in one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a log shows each line at once; a console without a letter shows a ?
            stream.reconfigure(line_buffering=True, errors="replace")
    before: dict[int, Any] = {}

    def interrupt(number: int, frame: Any) -> None:
        try:
            fail("interrupted; the same command with --resume goes on from the last checkpoint, if any")
        finally:  # not by an exception, which Python may drop here; nothing is lost, as files are whole at any moment
            os._exit(128 + number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has the first two; nohup ignores SIGHUP
        if not IN_KERNEL and hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            before[getattr(signal, name)] = signal.signal(getattr(signal, name), interrupt)
    try:
        main()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        fail("out of memory: lower --batch-size, --latents or --limit")
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror}; what was there before is kept; --resume goes on", 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if rank_and_world()[1] > 1:
            dist.destroy_process_group()


def pasted_into_cell() -> bool:
    """Whether this code is a cell of a Jupyter or Colab kernel, whose command line is the kernel's, not the user's."""
    return os.path.basename(sys.argv[0]) in ("ipykernel_launcher.py", "colab_kernel_launcher.py")


def number(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse: an int or a float, from low to high."""

    def parse(text: str) -> Any:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


class Parser(argparse.ArgumentParser):
    """argparse, strict about abbreviations, with its errors in one line, and with the flags that all scripts have."""

    def __init__(self, script: str):
        show_defaults = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog=f"{script}.py", allow_abbrev=False, formatter_class=show_defaults)
        add = self.add_argument
        add("--epochs", type=number(int, 0, 10**9), help="passes over the training set")
        add("--batch-size", type=number(int, 1, 10**9), help="examples per step")
        add("--lr", type=number(float, 1e-9, 1), help="peak learning rate of Adam")
        add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, batches, noise; of a file's split")
        add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the fastest present")
        add("--out", default="results", help=f"results go to OUT/{script}")
        add("--resume", action="store_true", help="go on with an interrupted run, or with more epochs")
        add("--smoke", action="store_true", help=f"the whole path on tiny sizes, offline, into OUT/smoke/{script}")

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


class ImageParser(Parser):
    """The parser of question 2 and the bonus."""

    def __init__(self, script: str):
        super().__init__(script)
        add = self.add_argument
        add("--data", help="svhn, synthetic, FILE.npz or a FOLDER of images; with --smoke, synthetic unless given")
        add("--data-root", default="data", help="where SVHN is, or is downloaded to")
        add("--limit", type=number(int, 20, 10**9), help="of training images; of validation and test a tenth as many")
        add("--latents", type=number(int, 1, 256), help="channels of z, 8 x 8 positions")
        add("--muon-lr", type=number(float, 0, 1), help="peak learning rate of Muon, for kernels; 0: Adam alone")
        add("--schedule", choices=tuple(SCHEDULES), help="of both learning rates")
        warm = "the KL's weight in training rises from 0 to 1 over this fraction of it; reported bounds have weight 1"
        add("--kl-warmup", type=number(float, 0, 1), help=warm)
        add("--handout", action="store_true", help="train as the handout recommends: Adam at a constant 2e-4")
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of training; auto: what is fastest")
        add("--evaluate", metavar="CHECKPOINT", help=f"train nothing; all else, into OUT/{script}/evaluate")
        add("--samples", type=number(int, 0, 10**6), default=0, help="so many samples as samples/0000.png, ...")


HANDOUT = dict(batch_size=32, lr=2e-4, muon_lr=0.0, schedule="constant")  # what the handout recommends: --handout
THREADS = torch.get_num_threads()  # as many as the machine has cores, or what OMP_NUM_THREADS says


def parse_args(
    parser: Parser, argv: list[str] | None, defaults: dict[str, Any], smoke: dict[str, Any]
) -> tuple[argparse.Namespace, Path]:
    """The command line -> (arguments, the folder for the results); prints them, but for --evaluate (`load_trained`).

    `smoke` holds the defaults of --smoke; a flag that is given wins over both. Errors: one line, exit status 2.
    """
    if argv is None and pasted_into_cell():
        argv = []
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if getattr(args, "handout", False):
        parser.set_defaults(**HANDOUT)
    if args.smoke:
        parser.set_defaults(**smoke)
    args = parser.parse_args(argv)
    script, images = parser.prog.removesuffix(".py"), isinstance(parser, ImageParser)
    out = Path(args.out) / ("smoke" if args.smoke else "") / script
    args.device = choose_device(args.device)
    join_processes(args.device, alone=not images)
    resumed = out / "checkpoint.pt" if args.resume else None
    args.precision = choose_precision(args.precision, args.device, resumed) if images else "fp32"
    torch.set_num_threads(THREADS if images else 1)  # question 1's networks are too small to share out
    args.started = time.monotonic()
    if getattr(args, "evaluate", None):  # most arguments come from the checkpoint
        return args, out / "evaluate"
    print_settings(script, args)
    return args, out


def print_settings(script: str, args: argparse.Namespace) -> None:
    """Print the script's name and its arguments, device and precision included."""
    print(script, " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings(args).items()), flush=True)


def choose_device(name: str) -> str:
    """--device, with auto resolved to the fastest device present; a clear message if the named one is absent."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    torch.set_float32_matmul_precision("highest")  # fp32 is to mean fp32, not TF32: in matrix products, and
    torch.backends.cudnn.allow_tf32 = False  # in convolutions, where cuDNN's default is TF32
    torch.backends.cudnn.benchmark = True  # shapes are fixed: let cuDNN try its kernels once
    if name == "auto":
        return next(device for device, here in present.items() if here)
    if not present[name]:
        fail(f"--device {name}: this machine or this build of torch has none; use --device auto")
    return name


def join_processes(device: str, alone: bool) -> None:
    """Under torchrun, join the other processes: nccl on GPUs, of which each takes its own; gloo on CPUs.

    alone: for scripts that do not share their work.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or rank_and_world()[1] > 1:
        return
    if alone:
        fail("this script trains in one process: start it with python, not with torchrun")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = io.StringIO()  # rank 0 prints for all


def choose_precision(name: str, device: str, resumed: Path | None = None) -> str:
    """--precision; auto: what the resumed run had, else bf16 if the hardware multiplies it natively, else fp32."""
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:  # torch has no public question for this
        checks = (getattr(torch.cpu, f"_is_{unit}_supported", bool) for unit in ("avx512_bf16", "amx_tile"))
        native = device == "cpu" and any(check() for check in checks)
    if name == "auto" and resumed and resumed.exists():
        return read_checkpoint(resumed, ("args",))["args"]["precision"]
    if name == "bf16" and not native:
        print("warning: this machine does not multiply bf16 but emulates it, slowly; --precision fp32 is faster")
    return name if name != "auto" else "bf16" if native else "fp32"
