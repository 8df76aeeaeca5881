"""The shared core of the laboratory: everything that two questions or more use, in the order of the mathematics.

    conventions -> distributions -> bounds and units -> blocks -> masks and flow -> data -> training -> results and
    plots -> command line

One example is one point [2] or one image [3, 32, 32]; B is the batch. A density, a KL or a log-determinant is [B], in
nats per example, and the mean over examples is taken once, last. `bits_per_dim` is the only conversion of units.
"""

import argparse
import copy
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import time
import urllib.error
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# Read when torch is imported, and so before it: on Apple's mps, an operator that is missing there runs on the CPU, and
# torch says so in a warning.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with matplotlib and torchvision
from torch import Tensor, nn
from tqdm.auto import tqdm

# ---------------------------------------------------------------------------------------------------- conventions

# Bounds of every learned log standard deviation. Reasons: the noise that dequantisation adds to a pixel has, in the
# model's units, log std log(1 / (128 sqrt 12)) = -6.09, so -7 lets a decoder be sharper than the sharpest truth; the
# widest thing to model, the long axis of question 1A, has log 5 = 1.61.
LOG_STD_LOW, LOG_STD_HIGH = -7.0, 3.0
PIXEL_SCALE = 128  # grey levels that one unit of x spans: x = (level + u) / 128 - 1 lies in [-1, 1]
SPLITS = ("train", "valid", "test")
SVHN_SIZES = (65_931, 7_326, 26_032)
IMAGE_DEFAULTS = dict(epochs=20, batch_size=32, lr=1e-3, latents=16, data="svhn")  # of question 2
IMAGE_SMOKE = dict(epochs=1, batch_size=16, lr=2e-4, limit=48, latents=4, data="synthetic")
MODEL_FLAGS = ("latents", "prior", "receptive_field")  # those that shape an image model
FREE_FLAGS = {  # arguments that --resume may change; what --data holds is compared itself
    "epochs", "table_epochs", "resume", "out", "data", "data_root", "compare", "evaluate", "seeds", "device", "compile",
}  # fmt: skip
KEEP_SECONDS = 300  # between checkpoints within an epoch
COMPILE_STEPS = 5000  # a training shorter than that does not win back the minute that compiling takes
MOST_SKIPPED = 10  # steps in a row without a finite gradient, before training stops
DPI = 130  # of every figure
CURVE_KEYS = ("neg_elbo_bpd", "kl_bpd", "recon_bpd")  # what a curve holds for each split


class Terms(NamedTuple):
    """The two terms of the negative ELBO, each [B], in nats: recon = -log p(x|z) and kl = log q(z|x) - log p(z)."""

    recon: Tensor
    kl: Tensor

    @property
    def neg_elbo(self) -> Tensor:
        """-ELBO = recon + kl, [B], nats. Also minus the log importance weight log p(x, z) - log q(z|x)."""
        return self.recon + self.kl


class Noise:
    """Standard noise for a batch, one call a tensor: fresh from torch's generator, or fixed.

    With `examples` (int64 [B], each example's place in its split) the noise is a pure function of seed, place, call and
    element, so that an evaluation does not depend on its batches, and on the device by rounding only. The function is
    the output mixer of SplitMix64 (Steele, Lea & Flood 2014, OOPSLA), applied to a counter.
    """

    def __init__(self, batch: int, device: torch.device, seed: int = 0, examples: Tensor | None = None):
        self.batch, self.device, self.seed, self.examples, self.calls = batch, device, seed, examples, 0

    @classmethod
    def fixed(cls, examples: Tensor, seed: int) -> "Noise":
        """The noise that belongs to these examples of a set, whatever batch they come in."""
        return cls(len(examples), examples.device, seed, examples)

    def uniform(self, *shape: int) -> Tensor:
        """u ~ U[0, 1), [B, *shape]."""
        if self.examples is None:  # of several processes, each draws for all and keeps its own
            rank, world = processes()
            return torch.rand(self.batch * world, *shape, device=self.device)[rank::world]
        return self._bits(shape).float() / 2**24

    def normal(self, *shape: int) -> Tensor:
        """eps ~ N(0, 1), [B, *shape]; where fixed, the inverse normal CDF of a uniform, so at most 5.4 in size."""
        if self.examples is None:
            rank, world = processes()
            return torch.randn(self.batch * world, *shape, device=self.device)[rank::world]
        bits = self._bits(shape)
        bits = bits.cpu() if self.device.type == "mps" else bits  # which has neither float64 nor ndtri
        return torch.special.ndtri((bits.double() + 0.5) / 2**24).float().to(self.device)

    def _bits(self, shape: tuple[int, ...]) -> Tensor:
        """24 random bits an element, int64 [B, *shape]: a hash of seed, then call, then example, then element."""
        assert self.examples is not None
        self.calls += 1
        x = _mix(_mix(_mix(torch.tensor(self.seed, device=self.device)) + self.calls) + self.examples.to(torch.int64))
        x = _mix(x[:, None] + torch.arange(math.prod(shape), device=self.device))  # (B, elements)
        return ((x >> 40) & 0xFFFFFF).reshape(self.batch, *shape)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 (multiplication wraps; the shifts are made logical by a mask)."""
    x = (x + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def processes() -> tuple[int, int]:
    """This process's rank and the number of processes: 0 of 1, unless torchrun started several.

    All run the same program on the same random numbers. In training each takes every world-th example of a batch, in
    an evaluation of the set; and rank 0 alone writes and prints.
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait until all processes are here."""
    if processes()[1] > 1:
        dist.barrier()


def total(x: Tensor) -> Tensor:
    """The sum of x over processes, without a gradient."""
    x = x.detach().clone()
    if processes()[1] > 1:
        dist.all_reduce(x)
    return x


# -------------------------------------------------------------------------------------------------- distributions


def sum_dims(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first: [B, ...] -> [B]."""
    return x.flatten(1).sum(1)


def at_least_fp32(x: Tensor) -> Tensor:
    """x, widened to float32 where autocast left it in a 16-bit type: no density is computed in less."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def bounded_log_std(raw: Tensor) -> Tensor:
    """A smooth, increasing map of the reals onto (-7, 3) with f(0) = 0 and f'(0) = 1; elementwise.

    Each half is a scaled tanh, b tanh(raw / b) with b the bound on its side. (The handout's plain tanh bounds a log
    std by -1 and 1. For pixels in [-1, 1] that is a std of 47 grey levels or more: 6.9 bits/dim with a perfect mean.)
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


class StandardNormal(nn.Module):
    """The prior p(z) = N(0, I) over latents of a given shape, and the base of priors that transport it: z = f(eps)."""

    def __init__(self, latent_shape: tuple[int, ...]):
        super().__init__()
        self.latent_shape = latent_shape

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) = log N(eps; 0, I) + log |det d eps / d z|. z [B, *latent_shape] -> [B], nats."""
        eps, log_det = self.z_to_eps(z)
        return normal_log_prob(eps, torch.zeros_like(eps), torch.zeros_like(eps)) + log_det

    def shift_and_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std of each z_i given the positions before it; here 0 and 0. Two of z's shape."""
        return torch.zeros_like(z), torch.zeros_like(z)

    def z_to_eps(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Here the identity: eps [B, *latent_shape], and its log |det d eps / d z| = 0, [B]."""
        return z, z.new_zeros(len(z))

    def eps_to_z(self, eps: Tensor) -> Tensor:
        """Here the identity. [B, *latent_shape] -> the same."""
        return eps

    def sample(self, noise: Noise) -> Tensor:
        """z ~ p(z), [B, *latent_shape]."""
        return self.eps_to_z(noise.normal(*self.latent_shape))


# ----------------------------------------------------------------------------------------------- bounds and units


def bits_per_dim(nats: Any, num_dims: int) -> Any:
    """nats / (num_dims ln 2): nats per example -> bits per dimension. The laboratory's only conversion of units."""
    return nats / (num_dims * math.log(2))


def iwae(log_w: Tensor) -> Tensor:
    """The importance-weighted bound log (1/K) sum_k w_k on log p(x). log_w [K, B] -> [B], nats.

    log_w = log p(x, z_k) - log q(z_k|x), z_k ~ q(z|x). K = 1 is the ELBO; the bound rises with K in expectation
    (Burda et al. 2016, arXiv:1509.00519, theorem 1).
    """
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def dequantise(levels: Tensor, u: Tensor) -> Tensor:
    """x = (levels + u) / 128 - 1: integers 0..255 and u ~ U[0, 1), same shape, to continuous x in [-1, 1]."""
    return (levels + u) / PIXEL_SCALE - 1


def quantise(x: Tensor) -> Tensor:
    """The grey level in whose bin x lies: inverts `dequantise` for u <= 1 - 2**-16. float [...] -> uint8 [...]."""
    return ((x + 1) * PIXEL_SCALE).floor().clamp(0, 255).to(torch.uint8)


def levels_log_prob(log_p_x: Tensor, num_dims: int) -> Tensor:
    """A density of x, turned into a lower bound on the log-probability of the integer levels. [B], nats -> [B], nats.

    With v = levels + u = 128 (x + 1), p(v) = p(x) / 128 a dimension, so log p(v) = log p(x) - num_dims ln 128; and
    E_u log p(v) <= log P(levels) by Jensen (Theis et al. 2016, arXiv:1511.01844, section 3.1).
    """
    return log_p_x - num_dims * math.log(PIXEL_SCALE)


class VAE(nn.Module):
    """q(z|x) = N(encoder(x)), p(x|z) = N(decoder(z)), and p(z), an object that can be swapped.

    encoder: x -> (mu, log_std) of z; decoder: z -> (mu, log_std) of x; prior: `log_prob` and `sample`.
    Kingma & Welling 2014 (arXiv:1312.6114).
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: StandardNormal):
        super().__init__()
        self.encoder, self.decoder, self.prior = encoder, decoder, prior

    def forward(self, x: Tensor, noise: Noise) -> Terms:
        """One sample of both terms, z = mu + std eps. x [B, ...] -> Terms of [B], nats.

        The KL is log q(z|x) - log p(z) at that same z, for every prior. Where q(z|x) is the true posterior, recon + kl
        is then -log p(x) exactly, whatever the noise; and as log q(z|x) is differentiated through z alone (its other
        derivative has mean zero), the encoder's gradient has no noise there either (Roeder et al. 2017,
        arXiv:1703.09194).
        """
        z, mu, log_std = self.posterior(x, noise)
        kl = normal_log_prob(z, mu.detach(), log_std.detach()) - self.prior.log_prob(z)
        return Terms(recon=-self.log_p_x(x, z), kl=kl)

    def posterior(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """z ~ q(z|x), and q's mean and log std, each [B, *latent_shape]."""
        mu, log_std = self.encoder(x)
        return mu + torch.exp(log_std) * noise.normal(*self.prior.latent_shape), mu, log_std

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), here of a normal. x [B, ...], z [B, *latent_shape] -> [B], nats."""
        return normal_log_prob(x, *self.decoder(z))

    def sample(self, noise: Noise) -> tuple[Tensor, Tensor]:
        """z ~ p(z) -> (x ~ p(x|z), the decoder's mean mu(z)), each [B, ...], from the same z."""
        mu, log_std = self.decoder(self.prior.sample(noise))
        return mu + torch.exp(log_std) * noise.normal(*mu.shape[1:]), mu


class ImageVAE(VAE):
    """The VAE of question 2: 8-bit images in, dequantised with the noise, and a bound on their log-probability out."""

    def __init__(self, latent_channels: int, make_prior: Callable[[tuple[int, ...]], StandardNormal]):
        encoder, decoder = ConvEncoder(latent_channels), ConvDecoder(latent_channels)
        with torch.random.fork_rng(devices=[]):  # whatever the prior draws: the same networks, batches and noise
            prior = make_prior((latent_channels, 8, 8))
        super().__init__(encoder, decoder, prior)

    def forward(self, levels: Tensor, noise: Noise) -> Terms:
        """levels uint8 [B, 3, 32, 32] -> Terms of [B], nats, whose sum bounds -log P(levels) from above."""
        recon, kl = super().forward(self.to_x(levels, noise), noise)
        return Terms(-levels_log_prob(-recon, levels[0].numel()), kl)

    def to_x(self, levels: Tensor, noise: Noise) -> Tensor:
        """What the encoder sees: dequantised pixels. uint8 [B, 3, 32, 32] -> the same in [-1, 1]."""
        return dequantise(levels, noise.uniform(*levels.shape[1:]))

    def to_z(self, levels: Tensor) -> Tensor:
        """The posterior mean mu(x), each pixel at the centre of its bin. uint8 [B, 3, 32, 32] -> [B, C, 8, 8]."""
        return self.encoder(dequantise(levels, torch.full_like(levels, 0.5, dtype=torch.float32)))[0]

    def to_images(self, z: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Pictures of z, [B, C, 8, 8], by title: uint8 [B, 3, 32, 32] each."""
        mu, log_std = self.decoder(z)
        drawn = quantise(mu + torch.exp(log_std) * noise.normal(*mu.shape[1:]))
        return {"µ(z), the decoder's mean": quantise(mu), "x ~ p(x|z) at the same z": drawn}


# --------------------------------------------------------------------------------------------------------- blocks


class GaussianMLP(nn.Module):
    """An MLP from the plane to a normal in the plane: x [B, 2] -> mu [B, 2], bounded log_std [B, 2 or 1]."""

    def __init__(self, hidden: tuple[int, ...], activation: Callable[[], nn.Module], num_log_stds: int = 2):
        super().__init__()
        layers = [m for a, b in itertools.pairwise((2, *hidden)) for m in (nn.Linear(a, b), activation())]
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
    """q(z|x): the handout's convolutions, and a linear 1x1 head, as the stack ends in a relu and a mean has a sign.

    x [B, 3, 32, 32] -> mu, log_std, each [B, C, 8, 8]. Log stds start near -2: a code that can be heard from the first
    step on teaches the decoder sooner than one that starts as the prior's noise.
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
    mask, centre = torch.zeros(size, size), size // 2
    mask[:centre] = 1
    mask[centre, : centre + (mask_type == "B")] = 1
    return mask


class MaskedConv2d(nn.Conv2d):
    """A 'same' convolution of odd size that sees only earlier positions; every input channel of a position alike.

    differences: each channel's taps are made to sum to 0, so that only differences between positions are seen.
    """

    mask: Tensor

    def __init__(self, mask_type: str, in_channels: int, out_channels: int, size: int, differences: bool = False):
        super().__init__(in_channels, out_channels, size, padding=size // 2)
        self.register_buffer("mask", causal_mask(mask_type, size))
        self.differences = differences

    def kernel(self) -> Tensor:
        """The weights in effect, [out_channels, in_channels, size, size]."""
        kernel = self.weight * self.mask
        return kernel - self.mask * (kernel.sum((2, 3), keepdim=True) / self.mask.sum()) if self.differences else kernel

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel(), self.bias)

    def at(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """`forward(x)` at P positions only: x [B, C, H, W], rows and columns int64 [P] -> [B, out_channels, P, 1]."""
        half = self.mask.shape[0] // 2
        i, j = self.mask.nonzero().T  # the T taps that the mask lets through
        seen = F.pad(x, (half, half, half, half))[:, :, rows[:, None] + i, columns[:, None] + j]  # (B, C, P, T)
        out = torch.einsum("bcpt,oct->bop", seen, self.kernel()[:, :, i, j])
        return (out if self.bias is None else out + self.bias[:, None])[..., None]


def wavefront_slope(net: nn.Module) -> int:
    """The least integer k such that j + k i is smaller at every position that (i, j) sees through net's masked layers.

    A tap d rows up and e columns to the right asks for e - k d < 0. Taps to the left in the same row ask for nothing;
    and the offsets of stacked layers add up, so what holds for each layer holds for the net.
    """
    masks = [m.mask for m in net.modules() if isinstance(m, MaskedConv2d)]
    taps = [(mask.nonzero() - mask.shape[0] // 2).tolist() for mask in masks]
    return max([1, *(e // -d + 1 for layer in taps for d, e in layer if d < 0)])


def wavefronts(height: int, width: int, slope: int) -> list[tuple[Tensor, Tensor]]:
    """The positions of a grid in groups of equal j + slope i, in that order: rows and columns, each int64 [P].

    With the slope of `wavefront_slope`, no position of a group sees another, so a group is sampled at once: 22 groups
    in place of 64 steps on 8 x 8. With slope = width every group is one position: raster order.
    """
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    order = (j + slope * i).flatten()
    groups = [(order == k).nonzero()[:, 0] for k in order.unique()]
    return [(group // width, group % width) for group in groups]


class MaskedResidual(nn.Module):
    """x + masked conv(relu(x)), mask B. [B, width, H, W] -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = MaskedConv2d("B", width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x))


class FlowPrior(StandardNormal):
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

    def shift_and_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """t and s at every position, from the positions before it. z [B, C, H, W] -> two of [B, C, H, W]."""
        t, raw = at_least_fp32(self.net(z)).chunk(2, 1)
        return t, bounded_log_std(raw)

    def z_to_eps(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """eps = (z - t(z)) exp(-s(z)), all positions in one pass, and its log |det d eps / d z| = -sum s.

        z [B, C, H, W] -> eps [B, C, H, W], log_det [B], nats. The Jacobian is triangular in raster order.
        """
        t, s = self.shift_and_scale(z)
        return (z - t) * torch.exp(-s), -sum_dims(s)

    @torch.no_grad()
    def eps_to_z(self, eps: Tensor, slope: int | None = None) -> Tensor:
        """The inverse of `z_to_eps`, one anti-diagonal after the other (see `wavefronts`). [B, C, H, W] -> the same.

        Each layer runs at the new positions only and keeps its input for the next ones, so that the whole costs about
        one pass. In float64, so that the order of the sums cannot be seen: any valid slope gives the same z.
        """
        first, *residuals, relu, last = exact(self.net)
        z = torch.zeros_like(eps, dtype=torch.float64, device=first.weight.device)
        inputs = [z.new_zeros(len(z), first.out_channels, *z.shape[2:]) for _ in residuals]
        for i, j in wavefronts(z.shape[2], z.shape[3], slope or wavefront_slope(self.net)):
            h = first.at(z, i, j)  # (B, width, P, 1)
            for layer, x in zip(residuals, inputs, strict=True):
                x[:, :, i, j] = F.relu(h[..., 0])
                h = h + layer.conv.at(x, i, j)
            t, raw = last(relu(h))[..., 0].chunk(2, 1)  # each (B, C, P)
            z[:, :, i, j] = t + torch.exp(bounded_log_std(raw)) * eps.to(z)[:, :, i, j]
        return z.to(eps)


def exact(net: Any) -> Any:
    """A copy of a network in float64; on the CPU where the device has no float64."""
    net = copy.deepcopy(net)
    return (net.cpu() if any(p.device.type == "mps" for p in net.parameters()) else net).double()


# ----------------------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """A data set: its name, as every report gives it, and its splits train, valid and test, each [N, ...]."""

    name: str
    splits: dict[str, Tensor]

    def describe(self) -> dict[str, Any]:
        """Name, sizes and a SHA-256 over the bytes of the three splits, for metrics.json."""
        digest = hashlib.sha256()
        for x in self.splits.values():
            digest.update(x.contiguous().numpy().tobytes())
        return {"name": self.name, **{k: len(x) for k, x in self.splits.items()}, "sha256": digest.hexdigest()}


def split_points(name: str, points: np.ndarray) -> Data:
    """Points [N, 2]: first 80 % train, the last tenth of it kept for validation; last 20 % test."""
    x = torch.from_numpy(points).float()
    num_train, num_test = int(0.8 * len(x)) * 9 // 10, int(0.8 * len(x))
    return Data(name, dict(zip(SPLITS, x.tensor_split([num_train, num_test]), strict=True)))


def load_images(args: argparse.Namespace) -> Data:
    """The images that --data names, as splits uint8 [N, 3, 32, 32]; under --limit N, N, N/10 and N/10 of them."""
    limited = args.limit and (args.limit, max(1, args.limit // 10), max(1, args.limit // 10))
    if args.data == "svhn":
        name, arrays = "SVHN", load_svhn(Path(args.data_root))
    elif args.data == "synthetic":
        sizes = limited or SVHN_SIZES
        arrays = load_synthetic(Path(args.data_root), sizes, cache=args.limit is None)
        name = "synthetic (a stand-in for SVHN)"
    else:
        name, arrays = Path(args.data).name, load_npz(Path(args.data), args.seed, only_test=args.evaluate is not None)
    if limited:
        arrays = [x[:n] for x, n in zip(arrays, limited, strict=True)]
        name += f", at most {args.limit} training images"
    splits = {k: torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for k, x in zip(SPLITS, arrays, strict=True)}
    return Data(name, splits)


def load_svhn(root: Path) -> list[np.ndarray]:
    """SVHN's cropped digits (Netzer et al. 2011), three uint8 [N, 32, 32, 3], downloaded and checked by torchvision.

    The official train file is split 65,931 / 7,326 by a fixed permutation, so that validation is not the file's end.
    """
    from torchvision.datasets import SVHN  # here, as torchvision takes two seconds, which question 1 can do without

    if processes()[0]:  # rank 0 downloads for all
        barrier()
    try:
        train, test = (SVHN(str(root), split, download=True).data.transpose(0, 2, 3, 1) for split in ("train", "test"))
    except (OSError, RuntimeError, ValueError, urllib.error.URLError) as error:
        fail(
            f"no usable SVHN in {root} ({error}): put the official train_32x32.mat and test_32x32.mat there, or delete "
            "broken copies and go online; --data synthetic needs no download"
        )
    if not processes()[0]:
        barrier()
    order = np.random.RandomState(0).permutation(len(train))
    train, valid = np.split(train[order], [len(train) - round(len(train) / 10)])
    return [train, valid, test]


def load_npz(path: Path, seed: int, only_test: bool = False) -> list[np.ndarray]:
    """uint8 [N, 32, 32, 3] from keys train, valid, test, or from one key `images`, split 80/10/10 by the seed.

    only_test: the key test alone will do; the other splits are then empty.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files if k in (*SPLITS, "images")}
    except Exception as error:  # numpy, zipfile and zlib each have their own for a file that is no npz
        fail(f"--data {path}: not svhn, synthetic or a readable npz file ({error})")
    if only_test and set(arrays) == {"test"}:
        arrays |= {"train": arrays["test"][:0], "valid": arrays["test"][:0]}
    if set(arrays) not in ({"images"}, set(SPLITS)):
        fail(f"--data {path}: needs the keys train, valid and test, or the one key images; found {sorted(arrays)}")
    for key, x in arrays.items():
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3):
            fail(f"--data {path}: {key} must be uint8 [N, 32, 32, 3], not {x.dtype} {list(x.shape)}")
    if "images" in arrays:
        images = arrays["images"][np.random.RandomState(seed).permutation(len(arrays["images"]))]
        splits = np.split(images, [len(images) * 8 // 10, len(images) * 9 // 10])
    else:
        splits = [arrays[k] for k in SPLITS]
    for key, x in zip(SPLITS, splits, strict=True):
        if len(x) < 2 and (key == "test" or not only_test):
            fail(f"--data {path}: the {key} split holds {len(x)} images; it needs two or more")
    return splits


def load_synthetic(root: Path, sizes: tuple[int, ...], cache: bool = True) -> list[np.ndarray]:
    """The synthetic stand-in for SVHN, three uint8 [N, 32, 32, 3]; with `cache`, made once and kept under root."""
    path = root / "synthetic_v1.npz"
    if cache and path.exists():
        return load_npz(path, 0)
    print(f"making {sum(sizes):,} synthetic images" + (f", kept in {path}" if cache else ""), flush=True)
    splits = np.split(synthetic_images(sum(sizes)), np.cumsum(sizes)[:-1])
    if cache:
        make_folder(root)
        write_whole(path, lambda file: np.savez(file, train=splits[0], valid=splits[1], test=splits[2]))
    return splits


def codec_bits_per_dim(images: Tensor, codec: str, **options: Any) -> float:
    """What a lossless codec of Pillow's ("PNG", "WebP") makes of images, uint8 [N, 3, 32, 32]: the mean file, bits/dim.

    A yardstick for bounds on the same images, headers and all; and lossless, or an error.
    """
    num_bytes = 0
    for x in images.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(x).save(file, codec, lossless=True, optimize=True, **options)
        num_bytes += len(file.getvalue())
        if not np.array_equal(np.asarray(Image.open(file).convert("RGB")), x):
            raise ValueError(f"{codec} did not give back the image")
    return 8 * num_bytes / images.numel()


def digit_atlas(size: int = 64) -> Tensor:
    """Coverage masks of the ten digits in each of matplotlib's text fonts, [fonts, 10, size, size] in [0, 1]."""
    folder, atlas = Path(matplotlib.get_data_path()) / "fonts" / "ttf", []
    for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold",
                 "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta"):  # fmt: skip
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), size)
        for digit in "0123456789":
            image = Image.new("L", (size, size))
            ImageDraw.Draw(image).text((size / 2, size / 2), digit, fill=255, font=font, anchor="mm")
            atlas.append(np.asarray(image, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(atlas)).reshape(-1, 10, size, size)


def synthetic_images(n: int, seed: int = 0) -> np.ndarray:
    """The first n of a stream of synthetic house-number crops, uint8 [n, 32, 32, 3], set by the seed."""
    generator, atlas = torch.Generator().manual_seed(seed), digit_atlas()
    return np.concatenate([_synthetic_batch(1024, atlas, generator) for _ in range(0, n, 1024)])[:n]


def _synthetic_batch(n: int, atlas: Tensor, generator: torch.Generator) -> np.ndarray:
    """A centre digit and parts of its neighbours: placed, coloured, lit, blurred, and with a camera's noise."""

    def rand(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def randn(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    # Place: a digit k steps to the right is the same affine picture, moved; all digits of a number share font and pose.
    font, digits = rand(0, len(atlas)).long(), rand(0, 10, 3).long()
    scale, aspect, slant, tilt = rand(0.8, 1.35), rand(0.75, 1.3), 0.12 * randn(), 0.08 * randn()
    centre, step = 0.06 * randn(2), rand(0.95, 1.5) * scale * aspect * 0.62
    cover = torch.zeros(n, 1, 32, 32)
    for k in (-1, 0, 1):
        x_row = torch.stack([1 / (scale * aspect), slant, -(centre[:, 0] + k * step) / (scale * aspect)], 1)
        y_row = torch.stack([tilt, 1 / scale, -(centre[:, 1] - k * step * tilt) / scale], 1)
        grid = F.affine_grid(torch.stack([x_row, y_row], 1), [n, 1, 32, 32], align_corners=False)
        glyph = F.grid_sample(atlas[font, digits[:, k + 1]][:, None], grid, align_corners=False)
        present = (rand(0, 1) < 0.75) if k else torch.ones(n, dtype=torch.bool)
        cover = torch.maximum(cover, glyph * present[:, None, None, None])
    # Colour and light: two nearly grey colours, and a linear gradient over the wall.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    wall = (116 + 35 * randn(1)).clamp(15, 240) + 8 * randn(3) + torch.tensor([-1.0, 0.0, 7.0])
    ink = wall + torch.sign(randn(1)) * rand(20, 130, 1) + 8 * randn(3)
    light = 1 + 0.12 * (randn(1, 1) * x + randn(1, 1) * y)[:, None]
    image = torch.lerp(wall[:, :, None, None], ink[:, :, None, None], cover) * light  # (n, 3, 32, 32)
    # Blur: a Gaussian of its own width for each image, as a grouped separable convolution.
    taps = torch.exp(-0.5 * (torch.arange(-4, 5) / rand(0.5, 1.5, 1)) ** 2)
    kernel = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]  # (3n, 1, 9)
    image = F.pad(image, (4, 4, 4, 4), mode="replicate").reshape(1, 3 * n, 40, 40)
    image = F.conv2d(F.conv2d(image, kernel[:, :, None], groups=3 * n), kernel[..., None], groups=3 * n)
    # Noise: most of it common to the three colours, a little of each colour's own.
    amount = torch.exp(math.log(1.8) + 0.5 * randn(1, 1, 1))
    image = image.reshape(n, 3, 32, 32) + amount * (randn(1, 32, 32) + 0.25 * randn(3, 32, 32))
    return image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def evaluate(
    model: nn.Module, x: Tensor, batch_size: int | None = None, seed: int = 0, places: Tensor | None = None
) -> Terms:
    """Both terms for every example of x, once each, in fp32 on fixed noise. x [N, ...] -> Terms of float64 [N], nats.

    The seed belongs to the evaluation, not to the run, so that two models are compared on the same noise. The result
    depends on batch_size by rounding only; the default takes about a million numbers at a time. places, int64 [N]: each
    example's place in its set, to which its noise belongs; 0, 1, 2, ... by default.
    """
    was_training = model.training
    model.eval()
    batch_size = batch_size or max(1, 2**20 // x[0].numel())
    places = torch.arange(len(x), device=x.device) if places is None else places
    rank, world = processes()
    batches = zip(x[rank::world].split(batch_size), places[rank::world].split(batch_size), strict=True)
    terms = [model(some, Noise.fixed(where, seed)) for some, where in batches]
    model.train(was_training)
    mine = torch.stack([torch.cat(t) for t in zip(*terms, strict=True)])  # (2, this process's examples)
    whole = mine.new_zeros(2, len(x))
    whole[:, rank::world] = mine
    return Terms(*total(whole).cpu().double())


def in_bits(terms: Terms, num_dims: int) -> dict[str, float]:
    """Means over examples, in bits/dim, and the standard errors of the first two: neg_elbo, its kl, its recon term."""
    neg_elbo, kl = bits_per_dim(terms.neg_elbo, num_dims), bits_per_dim(terms.kl, num_dims)
    return {
        "neg_elbo_bpd": neg_elbo.mean().item(),
        "neg_elbo_se_bpd": standard_error(neg_elbo),
        "kl_bpd": kl.mean().item(),
        "kl_se_bpd": standard_error(kl),
        "recon_bpd": bits_per_dim(terms.recon.mean().item(), num_dims),
    }


def standard_error(x: Tensor) -> float:
    """Of the mean of x [N], N independent values."""
    return x.std().item() / math.sqrt(len(x))


@torch.no_grad()
def kl_per_position(model: Any, levels: Tensor) -> list[list[float]]:
    """What each position of z costs: the mean over images of log q(z_i|x) - log p(z_i|z_<i), bits, H rows of W.

    Summed over positions it is the KL term, up to the noise of one sample an image. levels uint8 [N, 3, 32, 32].
    """
    summed = torch.zeros(model.prior.latent_shape[1:], dtype=torch.float64)
    for _, z, mu, log_std in posteriors(model, levels):
        kl = normal_log_density(z, mu, log_std) - normal_log_density(z, *model.prior.shift_and_scale(z))
        summed += kl.sum((0, 1)).cpu().double()
    return bits_per_dim(summed / len(levels), 1).tolist()


@torch.no_grad()
def posteriors(model: Any, levels: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """x as the encoder sees it, z ~ q(z|x), mu and log std, of 256 images at a time, on the noise of `evaluate`."""
    for i in torch.arange(len(levels), device=levels.device).split(256):
        noise = Noise.fixed(i, 0)
        x = model.to_x(levels[i], noise)
        yield (x, *model.posterior(x, noise))


def information_bounds(z: Tensor, mu: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds on I(x; z), what z tells about x, from M examples and one z ~ q(z|x) each; [M], nats.

    log q(z_m|x_m) - log q(z_m), with q(z_m) estimated by the mean of q(z_m|x_j) over all j (in expectation a lower
    bound, never above log M) or over all j but m (an upper bound): Poole et al. 2019, arXiv:1905.06922, section 2.
    KL = I(x; z) + KL(q(z) || p(z)) (Hoffman & Johnson 2016), so KL minus these bounds the aggregated posterior's
    distance from the prior. z, mu, log_std: [M, ...].
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


def check_prior(prior: StandardNormal) -> float:
    """How far log_prob is from log N(eps; 0, I) + log |det d eps / d z| at a z that the prior drew; nats, about 0.

    Computed by other means: torch.distributions and autograd's Jacobian, in float64. A log-determinant that was
    dropped, or a prior of the wrong variance, cannot pass.
    """
    prior = exact(prior)
    device = next((p.device for p in prior.parameters()), torch.device("cpu"))
    z = prior.sample(Noise.fixed(torch.arange(1, device=device), seed=4)).double()
    if not z.numel():
        return 0.0
    jacobian = torch.func.jacrev(lambda z: prior.z_to_eps(z)[0], chunk_size=256)(z).reshape(z.numel(), z.numel())
    eps = prior.z_to_eps(z)[0]
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum() + torch.linalg.slogdet(jacobian)[1]
    return (prior.log_prob(z) - expected).abs().item()


def one_cycle(done: float) -> float:
    """Learning rate as a fraction of its peak: a linear rise over the first tenth, then half a cosine down to 0.

    done: the fraction of training that lies behind.
    """
    return done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


def kl_weight(done: float, warmup: float) -> float:
    """The KL's weight in training: from 0 to 1 over the fraction `warmup` of training, then 1. No warm-up: always 1."""
    return min(1.0, done / warmup) if warmup else 1.0


def fit(
    model: nn.Module, splits: dict[str, Tensor], args: argparse.Namespace, keep: Path | None = None,
    warmup: float = 0.0, free_bits: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Minimise the mean negative ELBO in bits/dim on splits["train"] with Adam; return curves, leave the best weights.

    args: epochs, batch_size, lr (the peak of `one_cycle`), precision, clock. keep: the checkpoint, written after each
    epoch and every five minutes; with args.resume training goes on from it. warmup: the fraction of training over which
    the KL's weight rises from 0 to 1, in training only. free_bits: bits/dim of a batch's KL that training does not
    charge for (Kingma et al. 2016, arXiv:1606.04934). Gradients are clipped to norm 1. Before the first epoch and after
    each, every split is evaluated, train and test on their first examples, no more than validation has. The weights
    kept are those of the epoch with the lowest negative ELBO on all of validation: curves["best_epoch"].
    """
    train, all_steps = splits["train"], max(1, args.epochs * steps_per_epoch(args, len(splits["train"])))
    optimiser = torch.optim.Adam(model.parameters(), lr=args.lr, fused=train.device.type in ("cpu", "cuda"))
    at, kept = before_training(model, train.device), Checkpoint(keep, model, optimiser, args, splits)
    if getattr(args, "resume", False):
        kept.load(at)
    else:
        kept.set_aside()
    net: Any = nn.parallel.DistributedDataParallel(model) if processes()[1] > 1 else model
    net = torch.compile(net) if pays_to_compile(args, all_steps) else net
    with catch_signals() as signals:
        while at["epoch"] <= args.epochs:
            for batch in rest_of_epoch(at, args, train):
                done = at["all_steps"] / all_steps
                for group in optimiser.param_groups:
                    group["lr"] = args.lr * one_cycle(done)
                skipped = train_step(net, optimiser, train[batch], args.precision, kl_weight(done, warmup), free_bits)
                after_step(at, kept, signals, skipped)
            note_epoch(at, evaluate_splits(model, splits, watched=True), model, args)
            kept.save(at)
            if stop := highest(signals):
                leave(stop, kept)
    model.load_state_dict(at["best_state"])
    return at["curves"] | {"skipped_steps": int(at["skipped"][2])}


def steps_per_epoch(args: argparse.Namespace, examples: int) -> int:
    """Whole batches in so many examples: an epoch leaves out the remainder of its own random order."""
    if args.batch_size > examples:
        fail(f"--batch-size {args.batch_size} is more than the {examples} training examples; choose a smaller one")
    if args.batch_size % processes()[1]:
        fail(f"--batch-size {args.batch_size} cannot be shared evenly by {processes()[1]} processes")
    return examples // args.batch_size


def before_training(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Where a training stands, in what a checkpoint can hold, before its first step. Epoch 0 only evaluates."""
    return {
        "epoch": 0, "step": 0, "all_steps": 0, "order": torch.empty(0), "best": math.inf,
        "best_state": copy.deepcopy(model.state_dict()),
        "curves": {"epoch": [], **{name: {k: [] for k in CURVE_KEYS} for name in SPLITS}},
        "skipped": torch.zeros(3, device=device),  # steps: in a row now, most in a row, all
    }  # fmt: skip


def rest_of_epoch(at: dict[str, Any], args: argparse.Namespace, train: Tensor) -> Iterable[Tensor]:
    """The batches of the epoch that `at` is in, from its step on, with a progress bar: this process's share of each."""
    if at["epoch"] == 0:
        return []
    (rank, world), steps = processes(), steps_per_epoch(args, len(train))
    if at["step"] == 0:
        at["order"] = torch.randperm(len(train), device=train.device)[: steps * args.batch_size]
    batches = [batch[rank::world] for batch in at["order"].split(args.batch_size)[at["step"] :]]
    hidden = True if rank else None if not in_kernel() else False  # None: hidden where nobody watches a terminal
    return tqdm(batches, f"epoch {at['epoch']}/{args.epochs}", steps, initial=at["step"], leave=False, disable=hidden)


def after_step(at: dict[str, Any], kept: "Checkpoint", signals: list[int], skipped: Tensor) -> None:
    """Count the step; stop where ten in a row were skipped; checkpoint where one is due; obey a signal."""
    in_a_row, most, all_ = at["skipped"]
    in_a_row = (in_a_row + 1) * skipped
    at["skipped"] = torch.stack([in_a_row, torch.maximum(most, in_a_row), all_ + skipped])
    at["step"], at["all_steps"] = at["step"] + 1, at["all_steps"] + 1
    look = at["all_steps"] % 10 == 0  # rarely, as it waits for the device and for the other processes
    if look and at["skipped"][1] >= MOST_SKIPPED:
        fail(
            f"{MOST_SKIPPED} steps in a row without a finite gradient, epoch {at['epoch']}, by step {at['step']}: "
            f"try a lower --lr or --precision fp32{kept.hint(' (the last checkpoint: {})')}", 1
        )  # fmt: skip
    stop = (look or processes()[1] == 1) and highest(signals)
    if stop or time.monotonic() - kept.written > KEEP_SECONDS:
        kept.save(at)
    if stop:
        leave(stop, kept)


def train_step(
    net: nn.Module, optimiser: Any, x: Tensor, precision: str, kl_weight: Any = 1.0, free_bits: float = 0.0
) -> Tensor:
    """One step of Adam on this process's share x of a batch; 1 where no gradient was finite and it was skipped, else 0.

    The answer is [], on the device, so that nothing here waits for it.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        recon, kl = (bits_per_dim(term.mean(), x[0].numel()) for term in net(x, Noise(len(x), x.device)))
        if free_bits:  # a batch's KL under them is not charged for
            kl_weight = kl_weight * (total(kl) > free_bits * processes()[1])
        loss = recon + kl_weight * kl
    optimiser.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    bad = 1 - torch.isfinite(norm + total(loss)).float()
    fused = optimiser.defaults["fused"]
    if fused:  # such a step leaves weights and moments alone where found_inf is 1, without a word to the host
        vars(optimiser)["found_inf"] = bad
    if fused or not bad:
        optimiser.step()
    return bad


def note_epoch(
    at: dict[str, Any], bounds: dict[str, dict[str, float]], model: nn.Module, args: argparse.Namespace
) -> None:
    """Print an epoch's bounds, enter them into the curves, keep its weights if they are the best; turn to the next."""
    print_epoch(at, bounds, args)
    if not all(math.isfinite(bound["neg_elbo_bpd"]) for bound in bounds.values()):
        fail(f"training diverged in epoch {at['epoch']}: the bound is not a number; try a lower --lr", status=1)
    at["curves"]["epoch"].append(at["epoch"])
    for name, key in itertools.product(SPLITS, CURVE_KEYS):
        at["curves"][name][key].append(bounds[name][key])
    if bounds["valid"]["neg_elbo_bpd"] < at["best"]:
        at["best"], at["best_state"] = bounds["valid"]["neg_elbo_bpd"], copy.deepcopy(model.state_dict())
        at["curves"]["best_epoch"] = at["epoch"]
    at["epoch"], at["step"] = at["epoch"] + 1, 0


def print_epoch(at: dict[str, Any], bounds: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """One line an epoch, in fixed columns; the seconds are of the whole run."""
    values = "  ".join(f"{name} {bounds[name]['neg_elbo_bpd']:7.4f}" for name in SPLITS)
    terms = f"(valid: KL {bounds['valid']['kl_bpd']:.4f} + decoder {bounds['valid']['recon_bpd']:.4f})"
    skipped = f"  {int(at['skipped'][2])} steps skipped so far" if at["skipped"][2] else ""
    head = f"epoch {at['epoch']:3d}/{args.epochs}  -ELBO bits/dim: {values}  {terms}"
    print(f"{head}  {args.clock.seconds():6.0f} s{skipped}", flush=True)


class Checkpoint:
    """All that `fit` needs to go on as if it had never stopped, in one file, always whole; or nowhere, without a path.

    Weights, optimiser, random states, place in the epoch and its order of examples, curves, best weights; and what
    must be the same for a run to go on: the arguments but those in FREE_FLAGS, the data, the network's shapes.
    """

    def __init__(
        self, path: Path | None, model: nn.Module, optimiser: Any, args: argparse.Namespace, splits: dict[str, Tensor]
    ):
        self.path, self.model, self.optimiser, self.args = path, model, optimiser, args
        self.written = time.monotonic()
        if path:
            self.must_match = {f"--{k.replace('_', '-')}": v for k, v in settings(args).items() if k not in FREE_FLAGS}
            make_folder(path.parent)
            self.must_match["the data"] = Data("", {k: x.cpu() for k, x in splits.items()}).describe()["sha256"]
            self.must_match["the network"] = str({k: list(v.shape) for k, v in model.state_dict().items()})

    def save(self, at: dict[str, Any]) -> None:
        """Write the file anew. A disk that is full costs no more than this checkpoint, and a line that says so."""
        self.written = time.monotonic()
        if not self.path:
            return
        states = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "random": random_states()}
        buffer = io.BytesIO()  # in memory first: then a file system that fails does so in one place, below
        at = at | {"seconds": self.args.clock.seconds()}
        torch.save({"at": at, "must_match": self.must_match, **states}, buffer)
        try:
            write_whole(self.path, lambda file: file.write(buffer.getbuffer()))
        except OSError as error:
            why = f"({error.strerror}); the one before is kept, training goes on"
            print(f"warning: no new checkpoint in {self.path} {why}", file=sys.stderr)

    def load(self, at: dict[str, Any]) -> None:
        """Set `at`, weights, optimiser and random states to what the file holds; leave them where there is none."""
        if not self.path or not self.path.exists():
            return
        saved = read_checkpoint(self.path, ("at", "must_match", "model", "optimiser", "random"))
        differing = [k for k, v in (self.must_match | saved["must_match"]).items() if self.must_match.get(k) != v]
        differing += [k for k in self.must_match if k not in saved["must_match"]]
        if differing:
            fail(
                f"--resume: {self.path} is of a run with another {', '.join(differing)}; leave --resume out or mend it"
            )
        if saved["at"]["epoch"] > self.args.epochs + 1:
            fail(f"--resume --epochs {self.args.epochs}: {self.path} has {saved['at']['epoch'] - 1} epochs behind it")
        device = at["skipped"].device
        at.update(saved["at"] | {k: saved["at"][k].to(device) for k in ("order", "skipped")})
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        random_states(saved["random"])
        self.args.clock.go_on_from(at.pop("seconds"))
        print(f"going on from {self.path}: epoch {at['epoch']}, step {at['step']}")

    def set_aside(self) -> None:
        """Rename the file of an earlier run, which this one would write over: it may have been unfinished."""
        if self.path and self.path.exists() and not processes()[0]:
            old = self.path.with_suffix(".old.pt")
            os.replace(self.path, old)
            print(f"an earlier run's checkpoint is now {old}; --resume would have gone on from it")

    def hint(self, text: str) -> str:
        """text with the checkpoint's path in it; nothing where there is none."""
        return text.format(self.path) if self.path and self.path.exists() else ""


def random_states(states: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The states of torch's random generators, after they were set to `states`."""
    here = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}
    here = {k: v for k, v in here.items() if k == "cpu" or (k == "cuda" and torch.cuda.is_available())
            or (k == "mps" and torch.backends.mps.is_available())}  # fmt: skip
    for name, state in (states or {}).items():
        if name in here:
            here[name].set_rng_state(state)  # type: ignore[attr-defined]
    return {name: module.get_rng_state() for name, module in here.items()}  # type: ignore[attr-defined]


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list into which the first Ctrl-C or SIGTERM goes, to be obeyed after the step; the second one ends at once."""
    signals: list[int] = []

    def note(number: int, frame: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        print("finishing this step; once more to stop at once", file=sys.stderr)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs it there deals with signals
        before = {}
    try:
        yield signals
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def highest(signals: list[int]) -> int:
    """The highest signal that any process has caught, 0 for none."""
    if processes()[1] == 1:
        return max(signals, default=0)
    number = torch.tensor(max(signals, default=0), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def pays_to_compile(args: argparse.Namespace, steps: int) -> bool:
    """--compile: on, off, or auto, which is on where kernels are built for a GPU and the steps win back the time."""
    choice = getattr(args, "compile", "off")
    if choice == "off":
        return False
    builder = "triton" if args.device.startswith("cuda") else "a C++ compiler"
    found = importlib.util.find_spec("triton") if builder == "triton" else shutil.which(os.environ.get("CXX", "g++"))
    if choice == "on" and not found:
        fail(f"--compile on: torch.compile needs {builder}, which is not here; use --compile off")
    if not found or (choice == "auto" and (builder != "triton" or steps < COMPILE_STEPS)):
        return False
    from torch._inductor import config

    config.fallback_random = True  # the same random numbers as without
    return True


def leave(number: int, kept: Checkpoint) -> NoReturn:
    """Stop because of a signal, and say how to go on; in a notebook as an interrupted cell, so its kernel lives."""
    if in_kernel():
        raise KeyboardInterrupt(kept.hint("go on with --resume, from {}"))
    fail("interrupted" + kept.hint("; go on with the same command and --resume (from {})"), 128 + number)


def evaluate_splits(model: nn.Module, splits: dict[str, Tensor], watched: bool = False) -> dict[str, dict[str, float]]:
    """`in_bits` of every split: all of validation and test, and of train as many examples as validation has.

    watched: of test too, which is what the curves show, epoch after epoch.
    """
    few = ("train", "test") if watched else ("train",)
    cut = {name: x[: len(splits["valid"])] if name in few else x for name, x in splits.items()}
    return {name: in_bits(evaluate(model, x), x[0].numel()) for name, x in cut.items()}


# ---------------------------------------------------------------------------------------------- results and plots


def make_folder(path: Path) -> Path:
    """The folder, made where it is missing; a clear message where it cannot be made or written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / ".writable", lambda file: None)
        (path / ".writable").unlink(missing_ok=True)
    except OSError as error:
        fail(f"cannot write into the folder {path}: {error.strerror}; choose another with --out or --data-root")
    return path


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Let `write` fill a file, so that path holds all of it or what it held before: a temporary file, then a rename."""
    if processes()[0]:  # rank 0 writes for all
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


def write_text(path: Path, text: str) -> None:
    """Text as UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, metrics: dict[str, Any]) -> None:
    """Metrics as JSON; NaN and infinity are errors."""
    write_text(path, json.dumps(metrics, indent=1, allow_nan=False) + "\n")


def read_checkpoint(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The dictionary that torch.save wrote, with these keys; no code in it is ever run (`weights_only`)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange files: the error says enough
            saved = torch.load(path, map_location="cpu", weights_only=True)
        return {k: saved[k] for k in keys}
    except Exception as error:  # of the file system, zip, pickle or torch, each with its own
        reason = str(error).splitlines()[:1] or [type(error).__name__]
        fail(f"{path}: not a readable checkpoint ({reason[0]})")


def load_checkpoint(path: Path, script: str) -> dict[str, Any]:
    """The final checkpoint of this script: {"script", "args", "state"}."""
    saved = read_checkpoint(path, ("script", "args", "state"))
    if saved["script"] != script:
        fail(f"{path}: a checkpoint of {saved['script']}, not of {script}")
    return saved


def write_results(out: Path, metrics: dict[str, Any], report: str, state: dict[str, Any]) -> None:
    """metrics.json, report.md and checkpoint.pt (weights and arguments, for torch.load(..., weights_only=True))."""
    checkpoint = {"script": metrics["script"], "args": metrics["args"], "state": state}
    write_whole(out / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    write_text(out / "report.md", report)
    write_json(out / "metrics.json", metrics)
    barrier()
    print(f"wrote {out / 'report.md'}, its figures, metrics.json and checkpoint.pt")


def run_seeds(
    run: Callable[..., dict[str, Any]], report: Callable[..., str], args: argparse.Namespace, out: Path
) -> None:
    """run(args, out) -> metrics for args.seeds seeds from args.seed on: the first into out, the others into out/seed_K.

    Several run at once, in a process each. report(metrics) is then written anew for the first, whose metrics["seeds"]
    hold "final" of every seed. All on one thread: these networks are too small for more, and so a seed's numbers are
    the same, bit for bit, alone or beside others.
    """
    jobs = []
    for seed in range(args.seed, args.seed + args.seeds):
        folder = out if seed == args.seed else out / f"seed_{seed}"
        jobs.append((run, argparse.Namespace(**{**vars(args), "seed": seed, "seeds": 1}), folder))
    if args.seeds == 1 or in_kernel():  # what was pasted into a cell cannot be sent to another process
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            done = []
            for run, one, folder in jobs:
                one.clock = Clock()
                done.append(run(one, folder))
        finally:
            torch.set_num_threads(threads)
    else:
        with ProcessPoolExecutor(min(args.seeds, os.cpu_count() or 1), get_context("spawn")) as pool:
            done = list(pool.map(_run_alone, *zip(*jobs, strict=True)))
    if args.seeds > 1:
        metrics = done[0] | {
            "args": settings(args),
            "seconds": args.clock.seconds(),
            "seeds": {m["args"]["seed"]: m["final"] for m in done},
        }
        write_text(out / "report.md", report(metrics))
        write_json(out / "metrics.json", metrics)


def _run_alone(run: Callable[..., dict[str, Any]], args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """run(args, out) on one thread, what it prints in out/log.txt, and one line when it is done."""
    torch.set_num_threads(1)
    path, args.clock = make_folder(out) / "log.txt", Clock()
    try:
        with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            metrics = run(args, out)
    except BaseException:
        print(f"seed {args.seed} failed: see {path}", file=sys.stderr, flush=True)
        raise
    print(f"seed {args.seed}: {args.clock.seconds():.0f} s, {out / 'report.md'}", flush=True)
    return metrics


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


class Clock:
    """The seconds of a run, those before an interruption included."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 1)

    def go_on_from(self, seconds: float) -> None:
        """So many seconds of the run, or more, have passed by now."""
        self.start = min(self.start, time.perf_counter() - seconds)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that say what a run is: all but how often it was interrupted, and its clock."""
    return {k: v for k, v in vars(args).items() if k not in ("resume", "clock")}


def describe_run(script: str, args: argparse.Namespace, data: Any, params: int) -> dict[str, Any]:
    """The head of metrics.json: what ran, with what, on which data and machine, for how long."""
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    env = {
        "torch": torch.__version__, "python": platform.python_version(), "system": platform.system(),
        "device": f"{device.type} ({name})", "threads": torch.get_num_threads(),
    }  # fmt: skip
    head = {"script": script, "args": settings(args), "data": data, "env": env, "params": params}
    return {**head, "seconds": args.clock.seconds()}


def cpu_name() -> str:
    """The processor's name, and how many of its cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def save_figure(fig: Any, path: Path) -> None:
    """Write the figure as a PNG without transparency and close it; in a notebook, show it too."""
    if fig.axes[0].get_subplotspec():  # not for axes that were placed by hand
        fig.tight_layout()
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
    write_whole(path, lambda file: Image.open(drawn).convert("RGB").save(file, "PNG"))
    if in_kernel():
        plt.show()
    plt.close(fig)


def draw_curves(axes: Any, curves: dict[str, Any], floor: float | None = None) -> None:
    """-ELBO, KL and decoder term against the epoch, on three axes, bits/dim: train thin, validation and test bold."""
    thin, bold, dashed = dict(lw=1, color="0.35"), dict(lw=2, color="C0"), dict(lw=2, color="C1", ls="--")
    styles = dict(zip(SPLITS, (thin, bold, dashed), strict=True))
    for ax, key, title in zip(axes, CURVE_KEYS, ("−ELBO", "KL term", "decoder term"), strict=True):
        for split, style in styles.items():
            marker = "." if len(curves["epoch"]) < 5 else ""
            ax.plot(curves["epoch"], curves[split][key], label=split, marker=marker, **style)
        values = np.array([curves[split][key] for split in styles])
        if values.shape[1] > 2:  # the first epochs would flatten the rest
            late = values[:, max(1, values.shape[1] // 10) :]
            late = np.append(late, floor) if floor is not None and key == "neg_elbo_bpd" else late
            margin = 0.08 * (late.max() - late.min()) + 1e-3
            ax.set_ylim(late.min() - margin, late.max() + margin)
        if floor is not None and key == "neg_elbo_bpd":
            ax.axhline(floor, color="k", ls=":", lw=1, label="true density, test")
        ax.set(title=title, xlabel="epoch", ylabel="bits/dim")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=8)


def plot_curves(curves: dict[str, Any], title: str, path: Path) -> None:
    """One model's curves, as `draw_curves` draws them."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    draw_curves(axes, curves)
    fig.suptitle("\n".join(wrapped(title, 100)))
    save_figure(fig, path)


def wrapped(text: str, width: int) -> list[str]:
    """The text's lines, those longer than width letters broken between words."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width, break_on_hyphens=False)]


def plot_tiles(panels: dict[str, Tensor], columns: int, title: str, path: Path, stacked: bool = False) -> None:
    """Panels of images, {panel's title: uint8 [N, 3, 32, 32]}, side by side or stacked.

    Two screen pixels a pixel; one in grids of more than 60 images, whose noise makes large files.
    """
    from torchvision.utils import make_grid

    grids = {name: make_grid(x.cpu(), columns, padding=2, pad_value=255) for name, x in panels.items()}
    scale = 2 if max(len(x) for x in panels.values()) <= 60 else 1
    h, w = (scale * n for n in next(iter(grids.values())).shape[1:])
    down, across = (len(grids), 1) if stacked else (1, len(grids))
    width = across * (w + 20) + 20
    lines = wrapped(title, width // 10)  # 10 pixels a letter
    height = down * (h + 35) + 30 + 22 * len(lines)
    fig = plt.figure(figsize=(width / DPI, height / DPI))
    for i, (name, grid) in enumerate(grids.items()):
        row, column = (i, 0) if stacked else (0, i)
        corner = (20 + column * (w + 20)) / width, (20 + (down - 1 - row) * (h + 35)) / height
        ax = fig.add_axes((*corner, w / width, h / height))
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    fig.suptitle("\n".join(lines), fontsize=10, y=1 - 8 / height)
    save_figure(fig, path)


@torch.no_grad()
def interpolate(model: Any, pairs: Tensor, in_eps: bool) -> Tensor:
    """Ten steps between the two images of each pair, the images themselves at the ends.

    Straight in z between the posterior means, or, where in_eps, straight in the prior's noise eps; where the decoder
    draws, it draws with the same noise at every step. uint8 [P, 2, 3, 32, 32] -> uint8 [P * 12, 3, 32, 32].
    """
    ends = model.to_z(pairs.flatten(0, 1))  # (2P, C, 8, 8)
    if in_eps:
        ends = model.prior.z_to_eps(ends)[0]
    a, b = ends.unflatten(0, (-1, 2))[:, None].unbind(2)  # each (P, 1, C, 8, 8)
    path = torch.lerp(a, b, torch.linspace(0, 1, 10, device=ends.device)[:, None, None, None]).flatten(0, 1)
    same = Noise.fixed(torch.zeros(len(path), dtype=torch.int64, device=ends.device), seed=3)
    steps = next(iter(model.to_images(model.prior.eps_to_z(path) if in_eps else path, same).values()))
    return torch.cat([pairs[:, :1], steps.unflatten(0, (-1, 10)), pairs[:, 1:]], 1).flatten(0, 1)


@torch.no_grad()
def plot_image_model(model: Any, test: Tensor, title: str, out: Path) -> None:
    """samples.png, reconstructions.png and interpolations.png of an image VAE: fixed noise, fixed test images."""
    if processes()[0]:  # rank 0 draws for all
        return
    model.eval()
    few = torch.arange(100, device=test.device)
    noise = Noise.fixed(few, seed=1)
    panels = model.to_images(model.prior.sample(noise), noise)
    plot_tiles(panels, 10, f"{title}\n100 samples, z ~ p(z)", out / "samples.png")
    shown = spread(test, 10)
    panels = {"test images": shown, **model.to_images(model.to_z(shown), Noise.fixed(few[: len(shown)], seed=2))}
    title += "\n"
    plot_tiles(panels, len(shown), f"{title}decoded from the posterior mean", out / "reconstructions.png", stacked=True)
    pairs = shown[: len(shown) // 2 * 2].unflatten(0, (-1, 2))
    panels = {"straight in z": interpolate(model, pairs, in_eps=False)}
    if isinstance(model.prior, FlowPrior):
        panels["straight in ε, the flow's noise"] = interpolate(model, pairs, in_eps=True)
    title += "interpolations, true test images at the ends"
    plot_tiles(panels, 12, title, out / "interpolations.png", stacked=True)


def spread(x: Tensor, n: int) -> Tensor:
    """At most n examples at equal distances in x: neighbours may look alike. [N, ...] -> [min(n, N), ...]."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).long()]


def run_images(
    script: str, args: argparse.Namespace, out: Path, make_model: Callable[[argparse.Namespace], Any], heading: str,
    finish: Callable[..., str] = lambda *_: "",
) -> None:  # fmt: skip
    """What question 2 and the bonus do alike: data, model, training, bounds, figures, report; or --evaluate alone.

    make_model: arguments -> the model. finish: (model, splits, metrics, out) -> the end of the report, more figures.
    """
    saved = load_checkpoint(Path(args.evaluate), script) if args.evaluate else None
    if saved:
        vars(args).update({k: saved["args"][k] for k in MODEL_FLAGS if k in saved["args"]})
    data = load_images(args)
    splits = {k: x.to(args.device) for k, x in data.splits.items()}
    torch.manual_seed(args.seed)
    model = make_model(args).to(args.device).to(memory_format=torch.channels_last)
    params = sum(p.numel() for p in model.parameters())
    if saved:
        try:
            model.load_state_dict(saved["state"])
        except RuntimeError:
            fail(f"--evaluate {args.evaluate}: its weights do not fit this model")
        final = {"test": in_bits(evaluate(model, splits["test"]), splits["test"][0].numel())}
        metrics = {**describe_run(script, args, data.describe(), params), "final": final}
        path = make_folder(out / "evaluate") / "metrics.json"
        write_json(path, metrics)
        bound = "-ELBO {neg_elbo_bpd:.4f} bits/dim (KL {kl_bpd:.4f} + decoder {recon_bpd:.4f})".format(**final["test"])
        print(f"{len(splits['test'])} test images of {data.name}: {bound}; wrote {path}")
        return
    curves = fit(model, splits, args, out / "progress" / f"{script}.pt", free_bits=getattr(args, "free_bits", 0.0))
    final, kl_map, x = evaluate_splits(model, splits), kl_per_position(model, splits["test"]), splits["test"][:1000]
    metrics = {**describe_run(script, args, data.describe(), params), "curves": curves, "final": final,
               "test_kl_per_position_bits": kl_map, "check_prior_nats": check_prior(model.prior),
               "test_codecs_bpd": {c: codec_bits_per_dim(x, c) for c in ("PNG", "WebP")}}  # fmt: skip
    title = f"{heading}, {data.name}\ntest −ELBO {final['test']['neg_elbo_bpd']:.3f} bits/dim"
    plot_curves(curves, title, out / "curves.png")
    plot_image_model(model, splits["test"], title, out)
    answer = finish(model, splits, metrics, out)
    metrics["seconds"] = args.clock.seconds()
    write_results(out, metrics, image_report(heading, metrics, answer), model.cpu().state_dict())


def skipped_text(curves: Iterable[dict[str, Any]]) -> str:
    """A report's sentence on the training steps that were skipped."""
    skipped = sum(c["skipped_steps"] for c in curves)
    return f"{skipped or 'No'} training steps were skipped for want of a finite gradient."


def prior_check_text(gap: float) -> str:
    """A report's verdict on `check_prior`, nats."""
    if gap > 1e-6:
        return f"**CHECK FAILED: log p(z) is {gap:.3g} nats from what its own samples say; trust no KL here.**"
    return f"log p(z), at a z drawn from p(z), agrees with autograd's Jacobian within {max(gap, 1e-12):.0e} nats."


def image_report(heading: str, metrics: dict[str, Any], answer: str = "") -> str:
    """report.md of question 2, `answer` at its end: the handout's deliverables in order, every number from metrics."""
    args, data, final, curves = (metrics[k] for k in ("args", "data", "final", "curves"))
    rows = "\n".join(
        f"| {name} | {f['neg_elbo_bpd']:.4f} ± {f['neg_elbo_se_bpd']:.4f} | {f['kl_bpd']:.4f} | {f['recon_bpd']:.4f} |"
        for name, f in final.items()
    )
    codecs = ", ".join(f"{codec} {value:.3f}" for codec, value in metrics["test_codecs_bpd"].items())
    return f"""# {heading}

Data: {data["name"]}: {data["train"]:,} training, {data["valid"]:,} validation and {data["test"]:,} test images.
{metrics["params"]:,} parameters, epochs: {args["epochs"]}, {metrics["seconds"]:,.0f} s on {metrics["env"]["device"]},
{args["precision"]} training steps.

## 1. The bound on train, validation and test

![curves](curves.png)

| split | −ELBO, bits/dim | KL term | decoder term |
|---|---|---|---|
{rows}

Upper bounds on the code length of the 8-bit images, in fp32 on fixed noise, one sample an image, ± one standard error
over images. Train is a fixed subset no larger than validation. The curves' test is such a subset too; the table's is
all of it. The first tenth of the epochs lies outside the axes where it would flatten the rest. The weights are those of
epoch {curves["best_epoch"]}, the best on validation. {skipped_text([curves])}

Lossless codecs on {"the same" if data["test"] <= 1000 else "the first 1,000"} test images, whole files: {codecs}
bits/dim.

{prior_check_text(metrics["check_prior_nats"])}

## 2. Samples

![samples](samples.png)

## 3. Interpolations

![interpolations](interpolations.png)

## Reconstructions

![reconstructions](reconstructions.png)
{answer}"""


# --------------------------------------------------------------------------------------------------- command line


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program with one line on standard error: status 2 for bad input, 1 for a run that failed."""
    if not processes()[0]:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


class Parser(argparse.ArgumentParser):
    """argparse, strict about abbreviations, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def launch(main: Callable[[], None]) -> None:
    """main(), as a script: what interrupts it, and what the machine runs out of, in one line on standard error."""
    interrupted = "interrupted; --resume goes on from the last checkpoint of an unfinished training"
    before = signal.signal(signal.SIGTERM, lambda *_: fail(interrupted, 128 + signal.SIGTERM))
    try:
        main()
    except KeyboardInterrupt:
        fail(interrupted, 128 + signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        fail("out of memory: lower --batch-size, --latents or --limit")
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror}; what was there before is kept; --resume goes on", 1)
    finally:
        signal.signal(signal.SIGTERM, before)
        if processes()[1] > 1:
            dist.destroy_process_group()


def in_kernel() -> bool:
    """Whether this process is a Jupyter or Colab kernel, which shows figures and progress bars and has to live on."""
    return "ipykernel" in sys.modules


def in_notebook() -> bool:
    """Whether this is a cell of a Jupyter or Colab kernel, whose command line is the kernel's, not the user's."""
    return os.path.basename(sys.argv[0]) in ("ipykernel_launcher.py", "colab_kernel_launcher.py")


def number(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse: an int or a float, from low to high."""

    def parse(text: str) -> Any:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(
    script: str, argv: list[str] | None, defaults: dict[str, Any], smoke: dict[str, Any], images: bool = False,
    more: Callable[[Any], None] = lambda add: None,
) -> tuple[argparse.Namespace, Path]:  # fmt: skip
    """The command line that every script shares -> (arguments, the folder for its results); prints both and the device.

    `smoke` holds the tiny defaults of --smoke; a flag that is given wins over both. `more` adds a script's own flags.
    Errors: one line, exit status 2.
    """
    parser = Parser(prog=f"{script}.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, count = parser.add_argument, number(int, 1, 10**9)
    add("--epochs", type=number(int, 0, 10**9), help="passes over the training set")
    add("--batch-size", type=count, help="examples a step")
    add("--lr", type=number(float, 1e-9, 1), help="peak learning rate of Adam")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, batches and training noise")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the fastest present")
    add("--out", default="results", help=f"results go to OUT/{script}")
    add("--resume", action="store_true", help="go on with an interrupted run, or with more epochs; otherwise as before")
    add("--smoke", action="store_true", help=f"the whole path on tiny sizes, offline, into OUT/smoke/{script}")
    if not images:
        add("--seeds", type=number(int, 1, 100), default=1, help="runs, from --seed on; several at once")
    else:
        add("--data", help="svhn, synthetic, or FILE.npz; with --smoke, synthetic unless given")
        add("--data-root", default="data", help="where data sets are downloaded or kept")
        limit = "train on the first LIMIT images, validate and test on a tenth as many each"
        add("--limit", type=number(int, 20, 10**9), help=limit)
        add("--latents", type=number(int, 0 if script == "bonus" else 1, 4096), help="channels of z, 8 x 8 positions")
        precision = "of training steps (auto: bf16 where the hardware multiplies it); reported bounds are fp32"
        add("--evaluate", metavar="CHECKPOINT", help="train nothing: bounds of a checkpoint on the data's test split")
        compile_ = "torch.compile of training steps (auto: on a GPU, for long trainings)"
        add("--compile", choices=("auto", "on", "off"), default="auto", help=compile_)
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    more(add)
    if argv is None and in_notebook():
        argv = []
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(**smoke)
        args = parser.parse_args(argv)
    args.device = join_processes(choose_device(args.device), alone=not images)
    args.precision = choose_precision(args.precision, args.device) if images else "fp32"
    print(script, " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(args).items()))
    args.clock = Clock()
    return args, Path(args.out) / ("smoke" if args.smoke else "") / script


def choose_device(name: str) -> str:
    """--device, with auto resolved to the fastest device present; a clear message where the named one is absent."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean fp32: cuDNN's default for convolutions is TF32
    if name == "auto":
        return next(device for device, here in present.items() if here)
    if not present[name]:
        fail(f"--device {name}: this machine or this build of torch has none; use --device auto")
    return name


def join_processes(device: str, alone: bool) -> str:
    """Under torchrun, join the other processes (nccl on GPUs, gloo on CPUs); this one's device.

    Each takes a GPU of its own. alone: for scripts that do not share their work.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or processes()[1] > 1:
        return device
    if alone:
        fail("this script trains in one process: start it with python, not with torchrun")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = io.StringIO()  # rank 0 prints for all
    return device


def choose_precision(name: str, device: str) -> str:
    """--precision, with auto resolved to bf16 where the hardware multiplies bf16 natively, to fp32 elsewhere."""
    if name != "auto":
        return name
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:  # torch has no public question for this
        checks = (getattr(torch.cpu, f"_is_{unit}_supported", bool) for unit in ("avx512_bf16", "amx_tile"))
        native = device == "cpu" and any(check() for check in checks)
    return "bf16" if native else "fp32"
