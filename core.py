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
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import filelock
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm.auto
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError  # Pillow comes with matplotlib
from torch import Tensor, nn

IN_KERNEL = "ipykernel" in sys.modules  # Jupyter's or Colab's, which shows figures
if not IN_KERNEL:
    plt.switch_backend("agg")  # figures go to files alone, whatever the environment says

# --- conventions


class Terms(NamedTuple):
    """Both terms of the negative ELBO, each [B], nats: recon = -log p(data|z) and kl = log q(z|x) - log p(z).
    In 2a and 2b recon is of levels + u, 3072 ln 128 included; only recon + kl is a bound for levels."""

    recon: Tensor
    kl: Tensor

    @property
    def neg_elbo(self) -> Tensor:
        """-ELBO, [B], nats; of one z, minus the log importance weight log p(x, z) - log q(z|x)."""
        return self.recon + self.kl


def noise(kind: Callable, shape: tuple[int, ...], device: Any, generator: torch.Generator | None = None) -> Tensor:
    """kind: torch.randn or .rand; from a (CPU) generator, the same on every device."""
    return kind(shape, generator=generator, device="cpu" if generator else device).to(device)


def seed_of(*key: str | int) -> int:
    """A 32-bit seed from words and numbers, such as ("evaluation", seed, batch)."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


def fixed_noise(*key: str | int) -> torch.Generator:
    """A CPU generator for the noise that belongs to the key, the same in every run."""
    return torch.Generator().manual_seed(seed_of(*key))


# --- distributions

# Bounds of every learned log std. In the model's units dequantisation's noise has log(1 / (128 sqrt 12)) = -6.09: -7
# lets a decoder be sharper than the sharpest truth. The widest truth, 1A's long axis, has log 5 = 1.61.
LOG_STD_LOW, LOG_STD_HIGH = -7.0, 3.0


def sum_dims(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first: [B, ...] -> [B]."""
    return x.flatten(1).sum(1)


def at_least_fp32(x: Tensor) -> Tensor:
    """x, in float32 if autocast left it in 16 bits: no density is computed in less."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def bounded_log_std(raw: Tensor) -> Tensor:
    """A smooth, increasing map onto (-7, 3): b tanh(raw / b), b = 3 for raw > 0, else -7; elementwise. (With the
    handout's plain tanh a pixel's std is at least 47 grey levels: 6.88 bits/dim with a perfect mean.)"""
    high, low = LOG_STD_HIGH * torch.tanh(raw / LOG_STD_HIGH), LOG_STD_LOW * torch.tanh(raw / LOG_STD_LOW)
    return torch.where(raw > 0, high, low)


def normal_log_prob(x: Tensor, mu: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mu, diag exp(log_std)^2). mu, log_std broadcast to x [B, ...] -> [B], nats; in float32 or wider.
    Kingma & Welling 2014 (arXiv:1312.6114), appendix C.2."""
    x, mu, log_std = at_least_fp32(x), at_least_fp32(mu), at_least_fp32(log_std)
    return sum_dims(-0.5 * ((x - mu) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi))


class StandardNormal(nn.Module):
    """The prior p(z) = N(0, I). A subclass is the prior of z = f(eps), eps ~ N(0, I); here f is the identity."""

    zeros: Tensor

    def __init__(self, latent_shape: tuple[int, ...]):
        super().__init__()
        self.latent_shape = latent_shape
        self.register_buffer("zeros", torch.zeros(latent_shape), persistent=False)  # mean and log std of eps

    def eps_to_z(self, eps: Tensor) -> Tensor:
        """f, invertible. eps [B, *latent_shape] -> z of that shape."""
        return eps

    def z_to_eps(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of f, and log |det d eps / d z| [B], nats."""
        return z, z.new_zeros(len(z))

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) = log N(eps; 0, I) + log |det d eps / d z|. z [B, *latent_shape] -> [B], nats."""
        eps, log_det = self.z_to_eps(z)
        return normal_log_prob(eps, self.zeros, self.zeros) + log_det

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """z ~ p(z), [n, *latent_shape]."""
        return self.eps_to_z(noise(torch.randn, (n, *self.latent_shape), self.zeros.device, generator))


# --- bounds and units

PIXEL_SCALE = 128  # grey levels that one unit of x spans: x = (level + u) / 128 - 1 lies in [-1, 1]


def bits_per_dim(nats: Any, num_dims: int) -> Any:
    """nats / (num_dims ln 2): nats per example -> bits per dimension. The only conversion of units."""
    return nats / (num_dims * math.log(2))


def dequantise(levels: Tensor, u: Tensor | float) -> Tensor:
    """x = (levels + u) / 128 - 1: integers 0..255 and u ~ U[0, 1), same shape, to continuous x in [-1, 1]."""
    return (levels + u) / PIXEL_SCALE - 1


def bin_centres(levels: Tensor) -> Tensor:
    """`dequantise` with u = 1/2."""
    return dequantise(levels.float(), 0.5)


def quantise(x: Tensor) -> Tensor:
    """The level in whose bin x lies: inverts `dequantise` for u <= 1 - 2**-16. float [...] -> uint8 [...]."""
    return ((x + 1) * PIXEL_SCALE).floor().clamp(0, 255).to(torch.uint8)


def density_to_levels(log_p_x: Tensor, num_dims: int) -> Tensor:
    """log p(x) -> log p(v), v = levels + u = 128 (x + 1): log p(x) - num_dims ln 128. [B] -> [B], nats.
    Its mean over u is at most log P(levels), by Jensen (Theis et al. 2016, arXiv:1511.01844, section 3.1)."""
    return log_p_x - num_dims * math.log(PIXEL_SCALE)


def in_bits(terms: Terms, num_dims: int) -> dict[str, float]:
    """Means over examples, bits/dim, of -ELBO, KL and decoder term; standard errors of the first two."""
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


# --- VAE


class VAE(nn.Module):
    """q(z|x) = N(encoder(x)), p(x|z) = N(decoder(z)), and p(z), a prior that can be swapped.
    encoder: x -> (mu, log_std) of z; decoder: z -> (mu, log_std) of x. A subclass may replace `to_x` and `log_p_x`."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: StandardNormal):
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
        mu, log_std are detached: log q's gradient at fixed z is noise of mean zero. Without it the encoder's has none
        where q(z|x) is the posterior (Roeder et al. 2017, arXiv:1703.09194)."""
        return normal_log_prob(z, mu.detach(), log_std.detach()) - self.prior.log_prob(z)

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), here of a normal. x [B, ...], z [B, *latent_shape] -> [B], nats."""
        return normal_log_prob(x, *self.decoder(z))

    def loss(self, data: Tensor, kl_weight: float = 1.0, done: float = 0.0) -> Tensor:
        """For training: mean of recon + kl_weight kl, bits/dim, []. done: the fraction of training so far."""
        recon, kl = self(data)
        return bits_per_dim((recon + kl_weight * kl).mean(), data[0].numel())

    @torch.no_grad()
    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x ~ p(x|z) and the decoder's mean mu(z), each [B, ...]."""
        mu, log_std = self.decoder(z)
        return mu + torch.exp(log_std) * noise(torch.randn, tuple(mu.shape), mu.device, generator), mu

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """z ~ p(z), decoded: x ~ p(x|z) and mu(z) at the same z, each [n, ...]."""
        return self.decode(self.prior.sample(n, generator), generator)


class ImageVAE(VAE):
    """The VAE of question 2: 8-bit images, dequantised; recon + kl bounds -log P(levels) from above.
    levels uint8 [B, 3, 32, 32]; z [B, C, 8, 8]. The prior is made last: 2a and 2b start from the same networks."""

    def __init__(self, latent_channels: int, prior: type[StandardNormal]):
        encoder, decoder = ConvEncoder(latent_channels), ConvDecoder(latent_channels)
        super().__init__(encoder, decoder, prior((latent_channels, 8, 8)))

    def to_x(self, levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x = (levels + u) / 128 - 1 with u ~ U[0, 1). uint8 [B, 3, 32, 32] -> float of that shape."""
        return dequantise(levels, noise(torch.rand, tuple(levels.shape), levels.device, generator))

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """The normal's log density, taken to levels + u (`density_to_levels`). -> [B], nats."""
        return density_to_levels(super().log_p_x(x, z), x[0].numel())


# --- blocks


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
    A gated linear unit (Dauphin et al. 2017, arXiv:1612.08083) as residual branch. The handout's 64 * 2 filters do not
    fit its stream of 256 channels: the second convolution has 2 x 256. [B, width, H, W] -> the same."""

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
    """q(z|x): the handout's convolutions, and a linear 1x1 head, as a mean has a sign and the stack ends in a relu.
    x [B, 3, 32, 32] -> mu, log_std, each [B, C, 8, 8]. Log stds start near -2: so z is used early."""

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
    z [B, C, 8, 8] -> mu, log_std, each [B, 3, 32, 32]; `net` alone gives out_channels features for each pixel."""

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


# --- masks and flow


def causal_mask(mask_type: str, size: int) -> Tensor:
    """PixelCNN's mask (van den Oord et al. 2016, arXiv:1601.06759), [size, size]: 1 where a weight may stay.
    In raster order a position sees the rows above and what is to its left; "B" sees itself too."""
    mask = torch.zeros(size * size)
    mask[: size * size // 2 + (mask_type == "B")] = 1
    return mask.view(size, size)


class MaskedConv2d(nn.Conv2d):
    """A 'same' convolution of odd size under `causal_mask`, the same for all pairs of channels."""

    mask: Tensor

    def __init__(self, mask_type: str, in_channels: int, out_channels: int, size: int):
        super().__init__(in_channels, out_channels, size, padding=size // 2)
        self.register_buffer("mask", causal_mask(mask_type, size))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class MaskedResidual(nn.Module):
    """x + masked conv(relu(x)), mask B. [B, width, H, W] -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = MaskedConv2d("B", width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x))


class FlowPrior(StandardNormal):
    """p(z) as an affine autoregressive flow of N(0, I): z_i = t_i(z_<i) + exp(s_i(z_<i)) eps_i.
    i: positions in raster order, all channels at once. s and t come from a PixelCNN: a 3x3 convolution with mask A,
    three residual layers with mask B, and a 1x1 layer that starts at zero: the flow starts as the identity. Chen et
    al. 2017 (arXiv:1611.02731), equations 12 to 14."""

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
        """eps = (z - t(z)) exp(-s(z)), in one pass, and log |det d eps / d z| = -sum s: the Jacobian is triangular.
        z [B, C, H, W] -> eps [B, C, H, W], log_det [B], nats."""
        t, s = self.mean_and_log_std(z)
        return (z - t) * torch.exp(-s), -sum_dims(s)

    @torch.no_grad()
    def eps_to_z(self, eps: Tensor) -> Tensor:
        """The inverse of `z_to_eps`: z <- t(z) + exp(s(z)) eps until nothing changes. [B, C, H, W] -> the same.
        t and s depend on earlier positions alone, so each pass makes more positions exact: on 8 x 8 all after 22, the
        longest chain of positions that see each other (Song et al. 2021, arXiv:2002.03629)."""
        z = eps
        for _ in range(eps[0, 0].numel() + 1):
            t, s = self.mean_and_log_std(z)
            before, z = z, t + torch.exp(s) * eps
            if torch.equal(z, before):
                break
        return z


def check_prior(prior: StandardNormal) -> float:
    """How far a prior is from its definition, at one z that it draws; 0 up to rounding. In float64, on the CPU.
    The larger of |z_to_eps(eps_to_z(eps)) - eps| and of log_prob's distance, nats, from log N(eps; 0, I) by
    torch.distributions + log |det d eps / d z| by autograd."""
    prior = copy.deepcopy(prior).cpu().double()
    eps = torch.randn(1, *prior.latent_shape, generator=fixed_noise("check"), device="cpu").double()
    z = prior.eps_to_z(eps)
    jacobian = torch.func.jacrev(lambda z: prior.z_to_eps(z)[0], chunk_size=256)(z).view(z.numel(), z.numel())
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum() + torch.linalg.slogdet(jacobian)[1]
    with torch.no_grad():
        inverse = (prior.z_to_eps(z)[0] - eps).abs().max()
        return torch.maximum(inverse, (prior.log_prob(z) - expected).abs().max()).item()


# --- data

SPLITS = ("train", "valid", "test")
SVHN_SIZES = (65_931, 7_326, 26_032)
SPLIT_NAMES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


class Data(NamedTuple):
    """A data set: its name in reports; and train, valid and test, each [N, ...]."""

    name: str
    splits: dict[str, Tensor]

    def describe(self) -> dict:
        """For metrics.json."""
        return {"name": self.name, **{k: len(x) for k, x in self.splits.items()}, "sha256": sha256_of(self.splits)}


def sha256_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the bytes of the tensors, in their order."""
    digest = hashlib.sha256()
    for x in tensors.values():
        digest.update(x.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def split_points(name: str, points: np.ndarray, batch_size: int) -> Data:
    """Points [N, 2]: first 80 % train, of which the last tenth is for validation; last 20 % test."""
    x = torch.from_numpy(points).float()
    before_test = int(0.8 * len(x))
    train, valid, test = x.tensor_split([before_test * 9 // 10, before_test])
    check_batch_size(batch_size, len(train))
    return Data(name, {"train": train, "valid": valid, "test": test})


def check_batch_size(batch_size: int, examples: int) -> None:
    """Refuse a batch that the training set cannot fill, or that the processes cannot share."""
    world = rank_and_world()[1]
    if batch_size > examples or batch_size % world:
        fail(f"--batch-size {batch_size} does not fit {examples} training examples and {world} process(es); change it")


def load_images(data: str, root: str, limit: int | None, seed: int, only_test: bool = False) -> Data:
    """The images that --data names, uint8 [N, 3, 32, 32] each split; under --limit M: M, M/10 and M/10 of them.
    root: SVHN's folder. seed: splits a user's images. only_test: for no training, so a test split is enough."""
    limited = (limit, limit // 10, limit // 10) if limit else None
    if data == "svhn":
        name, arrays = "SVHN", load_svhn(Path(root))
    elif data == "synthetic":
        name, arrays = "synthetic (a stand-in for SVHN)", make_synthetic(limited or SVHN_SIZES)
    else:
        name, arrays = load_own(Path(data), seed, only_test)
    if limited:
        arrays = [x[:n] for x, n in zip(arrays, limited, strict=True)]
        name += f", at most {limit} training images"
    splits = {k: torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for k, x in zip(SPLITS, arrays, strict=True)}
    print(f"data: {name}: " + ", ".join(f"{len(x):,} {k}" for k, x in splits.items()))
    return Data(name, splits)


def load_svhn(root: Path) -> list[np.ndarray]:
    """SVHN's cropped digits (Netzer et al. 2011), three uint8 [N, 32, 32, 3], downloaded and checked by torchvision.
    The official train file is split 65,931 / 7,326 by a fixed permutation."""
    from torchvision.datasets import SVHN  # here, as it is slow

    first_of_machine = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first_of_machine:  # the first process of each machine downloads for the others
        dist.barrier()
    try:
        train, test = (SVHN(str(root), split, download=True).data.transpose(0, 2, 3, 1) for split in ("train", "test"))
    except (OSError, RuntimeError, ValueError) as error:  # URLError is an OSError
        hint = "put the official train_32x32.mat and test_32x32.mat there, or go online"
        fail(f"no usable SVHN in {root} ({error}): {hint}; --data synthetic needs no download")
    if first_of_machine and rank_and_world()[1] > 1:
        dist.barrier()
    order = np.random.RandomState(0).permutation(len(train))
    train, valid = np.split(train[order], [len(train) - round(len(train) / 10)])
    return [train, valid, test]


def load_own(path: Path, seed: int, only_test: bool) -> tuple[str, list[np.ndarray]]:
    """A user's images: the data's name, and train, valid and test, each uint8 [N, 32, 32, 3].
    Sets of these names are the splits; without valid, a tenth of train is. A single set is split 80/10/10."""
    read: dict[str, list[np.ndarray]] = {}
    print(f"reading {path}")
    for split, source, image in own_images(path):
        try:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a level")
            upright = ImageOps.exif_transpose(image)  # as the camera was held
            read.setdefault(split, []).append(np.asarray(upright.convert("RGB").resize((32, 32))))
        except Exception as error:  # each of Pillow's formats has its own
            fail(f"--data {path}: {source} is no readable 8-bit image ({error}); convert or remove it")
    images, random = {split: np.stack(some) for split, some in read.items()}, np.random.RandomState(seed)
    name = f"{path.resolve().name}, made RGB of 32 x 32"
    if only_test and set(images) == {"test"}:
        images |= {"train": images["test"][:0], "valid": images["test"][:0]}
    elif len(images) == 1:
        x = random.permutation(*images.values())  # along the first axis
        images = dict(zip(SPLITS, np.split(x, [len(x) * 8 // 10, len(x) * 9 // 10]), strict=True))
        name += ", split 80/10/10"
    elif set(images) == {"train", "test"}:
        x = random.permutation(images["train"])
        images["train"], images["valid"] = np.split(x, [len(x) * 9 // 10])
        name += ", a tenth of train kept for validation"
    if set(images) != set(SPLITS) or min(len(x) or 2 * only_test for x in images.values()) < 2:
        found = {split: len(some) for split, some in read.items()} or "no images"
        wanted = "sets train and test (and valid), or a single one, with two images or more in each split"
        fail(f"--data {path}: found {found}; wanted: {wanted}; move, rename or add some")
    return name, [images[split] for split in SPLITS]


def own_images(path: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """Of each image below a folder, or in an npz file: its set, where it comes from, and the image.
    The set is the split that its subfolder or array is named for. What is no image is passed over."""
    if path.is_dir():
        formats = Image.registered_extensions()
        for file in sorted(path.rglob("*")):
            top, *below = file.relative_to(path).parts
            if file.is_dir() or any(part.startswith(".") for part in (top, *below)):  # macOS: ._1.png beside 1.png
                continue
            try:
                image = Image.open(file)
            except (OSError, Image.DecompressionBombError) as error:
                if isinstance(error, UnidentifiedImageError) and formats.get(file.suffix.lower()) not in Image.OPEN:
                    continue
                fail(f"--data {path}: {file.name} is no readable image ({error}); remove it")
            yield SPLIT_NAMES.get(top.lower(), "images") if below else "images", file.name, image
        return
    wanted = "wanted: uint8 [N, height, width, 3] in an npz file; or a folder of images; or svhn; or synthetic"
    try:
        arrays = {key: x for key, x in np.load(path, allow_pickle=False).items() if x.ndim > 2}  # not labels
    except Exception as error:  # numpy, zipfile and zlib each have their own
        fail(f"--data {path}: no readable npz file ({getattr(error, 'strerror', None) or error}); {wanted}")
    for key, x in arrays.items():
        if x.ndim == 4 and x.shape[1] == 3 != x.shape[3]:
            x = x.transpose(0, 2, 3, 1)  # PyTorch's order, channels first
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3:
            fail(f"--data {path}: {key} is {x.dtype} {list(x.shape)}; {wanted}")
        for image in x:
            yield SPLIT_NAMES.get(key.lower(), key), key, Image.fromarray(image)


def codec_bits_per_dim(images: Tensor, codec: str, **options: Any) -> float:
    """A lossless Pillow codec's mean file, headers and all, bits/dim. images uint8 [N, 3, 32, 32]."""
    num_bytes = 0
    for x in images.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(x).save(file, codec, lossless=True, optimize=True, **options)
        num_bytes += len(file.getvalue())
        if not np.array_equal(np.asarray(Image.open(file).convert("RGB")), x):
            raise ValueError(f"{codec} did not give back the image")
    return 8 * num_bytes / images.numel()


# Synthetic images: a stand-in for SVHN, drawn by a known law: scene, picture, noise, rounding.
SYNTHETIC_BATCH = 1024  # images that are drawn together: part of what the set is
# Bounds of their entropy, bits/dim: E[-log2 P(image | its scene)], and that plus what the scene costs; measured by
# tests/tools/floor.py (results/published/floor.json); ± .019 over its 1,000 images.
SYNTHETIC_ENTROPY = {"entropy, at least": 1.982, "entropy, at most": 2.029}


def make_synthetic(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Synthetic splits of these sizes, uint8 [N, 32, 32, 3] each: the first images of one endless stream."""
    print(f"drawing {sum(sizes):,} synthetic images")
    batches = itertools.islice(synthetic_batches(), -(-sum(sizes) // SYNTHETIC_BATCH))
    images = np.concatenate([images for images, _, _ in batches])
    return np.split(images, np.cumsum(sizes))[:-1]


def synthetic_batches() -> Iterator[tuple[np.ndarray, Tensor, dict[str, Tensor]]]:
    """The stream: images uint8 [n, 32, 32, 3]; pictures before the noise [n, 3, 32, 32], grey levels; their scenes."""
    generator, atlas, n = torch.Generator().manual_seed(0), digit_atlas(), SYNTHETIC_BATCH
    while True:
        scenes = draw_scenes(n, generator)
        common, own = (torch.randn(n, c, 32, 32, generator=generator) for c in (1, 3))
        pictures = render(scenes, atlas)
        # Most of the noise is common to the three colours, a little is each colour's own.
        x = pictures + noise_amount(scenes)[:, None, None, None] * (common + 0.25 * own)
        yield x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(), pictures, scenes


def draw_scenes(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What n scenes are made of, each [n] or [n, k]: u_* from U[0, 1), z_* from N(0, 1), independent."""
    shapes: dict[str, tuple[int, ...]] = {  # in this order: it is part of what a seed means
        "u_font": (), "u_digits": (3,), "u_scale": (), "u_aspect": (), "z_slant": (), "z_tilt": (), "z_centre": (2,),
        "u_step": (), "u_left": (), "u_right": (), "z_wall": (1,), "z_wall_tint": (3,), "z_sign": (1,),
        "u_contrast": (1,), "z_ink_tint": (3,), "z_light_x": (), "z_light_y": (), "u_blur": (1,), "z_amount": (),
    }  # fmt: skip
    draws = {"u": torch.rand, "z": torch.randn}
    return {name: draws[name[0]](n, *shape, generator=generator) for name, shape in shapes.items()}


def noise_amount(scenes: dict[str, Tensor]) -> Tensor:
    """The standard deviation of the noise that a pixel's three colours share, [n], grey levels."""
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


# --- training

EVALUATION_SIZE = 2**20  # numbers in a batch of an evaluation, 341 images: part of what its noise is


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, seed: int = 0) -> Terms:
    """Both terms for every example of x, once each, in fp32. x [N, ...] -> Terms of float64 [N], nats.
    Batch k's noise belongs to (seed, k), not to the run: two models are compared on the same noise."""
    terms = [model(some, fixed_noise("evaluation", seed, k)) for k, some in enumerate(evaluation_batches(x))]
    recon, kl = (torch.cat(parts).cpu().double() for parts in zip(*terms, strict=True))
    return Terms(recon, kl)


def evaluation_batches(x: Tensor) -> tuple[Tensor, ...]:
    """x [N, ...] in the batches of an evaluation."""
    return x.split(max(1, EVALUATION_SIZE // x[0].numel()))


@torch.no_grad()
def evaluate_points(model: VAE, x: Tensor) -> tuple[Terms, float]:
    """Both terms for points x [N, 2] under the prior N(0, I), with little noise: Terms of [N], nats.
    The KL is in closed form, sum (mu^2 + sigma^2 - 1) / 2 - log sigma; recon is the mean over 64 draws of z. Also the
    standard error, nats, that the draws leave in the mean over points: sqrt(sum_n s_n^2 / 64) / N."""
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


def bounds_of_points(model: VAE, x: Tensor, floor: Tensor) -> dict[str, float]:
    """`evaluate_points`, and how far -ELBO is above floor [N], the true -log p(x), nats; in bits/dim."""
    terms, of_draws = evaluate_points(model, x)
    excess = bits_per_dim(terms.neg_elbo - floor, 2)
    return {
        **in_bits(terms, 2),
        "neg_elbo_mc_se_bpd": bits_per_dim(of_draws, 2),
        "floor_bpd": bits_per_dim(floor.mean().item(), 2),
        "excess_bpd": excess.mean().item(),
        "excess_se_bpd": standard_error(excess),
    }


@torch.no_grad()
def posteriors(model: Any, data: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """x, z ~ q(z|x), mu and log std, batch by batch, on the noise of `evaluate` with seed 0."""
    for k, some in enumerate(evaluation_batches(data)):
        generator = fixed_noise("evaluation", 0, k)
        x = model.to_x(some, generator)
        yield (x, *model.posterior(x, generator))


def measure_images(model: Any, splits: dict[str, Tensor]) -> tuple[Terms, dict]:
    """The terms on test; and for metrics.json, bounds, the check of the prior, and lossless codecs.
    Bounds are of all of validation and test, and of as many images of train as validation has."""
    cut = splits | {"train": splits["train"][: len(splits["valid"])]}
    terms, test = {split: evaluate(model, x) for split, x in cut.items() if len(x)}, splits["test"]
    final = {split: in_bits(of_split, test[0].numel()) for split, of_split in terms.items()}
    print(f"test: -ELBO {with_error(final['test'], 'neg_elbo')} bits/dim, on {len(test):,} images")
    return terms["test"], {
        "final": final,
        "check_prior_nats": check_prior(model.prior),
        "test_codecs_bpd": {codec: codec_bits_per_dim(test[:1000], codec) for codec in ("PNG", "WebP")},
    }


SCHEDULES: dict[str, Callable[[float], float]] = {  # learning rate over its peak, from the fraction of training done
    "constant": lambda done: 1.0,
    "one-cycle": lambda done: done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)),
    "trapezoid": lambda done: min(1.0, done / 0.05, (1 - done) / 0.7),
}


def to_matrix(kernel: Tensor) -> Tensor:
    """A kernel as a wide matrix: [a, b, ...] -> [min(a, b), all else]."""
    a, b = kernel.shape[:2]
    matrix = kernel.movedim(1, -1)  # [a, ..., b]: no copy where channels are last
    return matrix.flatten(1) if a <= b else matrix.flatten(0, -2).mT


def to_kernel(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_matrix`: -> [a, b, ...]."""
    a, b, *size = shape
    return (matrix if a <= b else matrix.mT).reshape(a, *size, b).movedim(-1, 1)


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """Wide matrices with their singular values moved towards 1 and their singular vectors kept. [a, b >= a] each.
    Five steps of Newton-Schulz, x <- f x with f = 3.4445 - 4.7750 g + 2.0315 g^2 and g = x x^T, from x / |x|. f is a
    polynomial of the small g: q, the product of the fs, meets x once. Equal smaller sides share one batched loop."""
    places: dict[torch.Size, list[int]] = {}  # of equal shapes
    for k, x in enumerate(matrices):
        places.setdefault(x.shape, []).append(k)
    results = list(matrices)
    for side in sorted({len(x) for x in matrices}):
        stacks = {shape: torch.stack([matrices[k] for k in ks]) for shape, ks in places.items() if shape[0] == side}
        g = torch.cat([x @ x.mT for x in stacks.values()])  # (n, side, side)
        square = g.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)[:, None, None]  # |x|^2
        g, q = g / square, torch.eye(side, dtype=g.dtype, device=g.device) / square.sqrt()
        for step in range(5):
            p = torch.baddbmm(g, g, g, beta=-4.7750, alpha=2.0315)  # f = 3.4445 + p
            q = torch.baddbmm(q, p, q, beta=3.4445)  # f q
            if step < 4:
                g = torch.baddbmm(g, p, g, beta=3.4445)  # f g
                g = torch.baddbmm(g, g, p, beta=3.4445)  # f g f
        for (shape, x), factors in zip(stacks.items(), q.split([len(x) for x in stacks.values()]), strict=True):
            for k, result in zip(places[shape], factors @ x, strict=True):
                results[k] = result
    return results


class Muon(torch.optim.Optimizer):
    """w <- w - lr sqrt(max(1, a / b)) orthogonalise(m) for w [a, b] or [a, b, h, w], with m its Nesterov momentum.
    Adam moves a kernel along the few directions that its gradients share; here every direction counts alike. Jordan et
    al. 2024 (kellerjordan.github.io/posts/muon)."""

    def __init__(self, kernels: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(kernels, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        kernels, momentum = group["params"], group["momentum"]
        for kernel in kernels:
            if not self.state[kernel]:
                self.state[kernel]["momentum"] = torch.zeros_like(kernel)
        momenta, gradients = [self.state[kernel]["momentum"] for kernel in kernels], [kernel.grad for kernel in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, momenta, momentum)
        matrices = orthogonalise([to_matrix(x) for x in nesterov])
        updates = [to_kernel(x, kernel.shape) for x, kernel in zip(matrices, kernels, strict=True)]
        torch._foreach_mul_(updates, [max(1, kernel.shape[0] / kernel.shape[1]) ** 0.5 for kernel in kernels])
        torch._foreach_add_(kernels, updates, alpha=-group["lr"])


def make_optimisers(model: nn.Module, lr: float, muon_lr: float, momentum: float = 0.95) -> list[torch.optim.Optimizer]:
    """Adam; and unless muon_lr is 0, Muon for matrices and kernels larger than 1x1 with 16 channels or more.
    Adam keeps what touches pixels, 1x1 heads and biases, as Muon's authors advise."""
    learned = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in learned if muon_lr and p.ndim > 1 and min(p.shape[:2]) >= 16 and p.shape[2:] != (1, 1)]
    others = [p for p in learned if not any(p is q for q in hidden)]
    adam = torch.optim.Adam(others, lr=lr, fused=others[0].device.type in ("cpu", "cuda"))
    return [adam, Muon(hidden, muon_lr, momentum)] if hidden else [adam]


@dataclass
class Recipe:
    """How a model is trained. lr, muon_lr: the schedule's peaks for Adam and for Muon."""

    epochs: int
    batch_size: int
    lr: float
    muon_lr: float = 0.0
    schedule: str = "one-cycle"
    kl_warmup: float | None = None  # the fraction of training in which the KL's weight rises from 0 to 1
    seed: int = 0
    precision: str = "fp32"  # of training steps
    momentum: float = 0.95  # of Muon


CURVE_KEYS = ("neg_elbo_bpd", "kl_bpd", "recon_bpd")  # what a curve holds for each split
KEEP_SECONDS = 60  # between checkpoints


def fit(model: Any, splits: dict, recipe: Recipe, path: Path, about: dict, resume: bool = False, name: str = "") -> Any:
    """Minimise model.loss on splits["train"]; leave the weights that were best on validation in the model; -> curves.
    Curves are of the first examples of every split, at up to 21 steps. path: the checkpoint, written every minute and
    at the end, with `about` in it. With resume, training goes on from there, on one machine to the same bits: order and
    noise of a step depend on seed, step and process alone."""
    train, device, (rank, world) = splits["train"], splits["train"].device, rank_and_world()
    steps_per_epoch = len(train) // recipe.batch_size  # an epoch leaves out the rest of its order
    steps = recipe.epochs * steps_per_epoch
    optimisers = make_optimisers(model, recipe.lr, recipe.muon_lr, recipe.momentum)
    about, start, order = about | {"data": sha256_of(splits)}, 0, None
    best: dict[str, Tensor] = {}
    curves: Any = {"step": [], "epoch": [], "seconds": 0.0, **{split: {k: [] for k in CURVE_KEYS} for split in SPLITS}}
    # So few that curves take a tenth of the time: 21 * 3 / 360 of the examples trained on, but forward only.
    curves["examples"] = min(len(splits["valid"]), max(32, recipe.epochs * len(train) // 360))
    if resume and path.exists():
        start, curves, best = load_progress(path, about["data"], model, optimisers, steps)
    few = {split: x[: curves["examples"]] for split, x in splits.items()}
    steps_of_curves = {round(steps * (k / 20) ** 2) for k in range(21)}  # denser early; the last after all steps
    started, saved_at = time.monotonic() - curves["seconds"], -math.inf
    bar = dict(initial=start, total=steps, desc=name or "training", leave=False, disable=True if rank else None)
    for step in tqdm.auto.tqdm(range(start, steps + 1), **bar):
        epoch, place = divmod(step, steps_per_epoch)
        curves["seconds"] = round(time.monotonic() - started, 1)
        if step in steps_of_curves and add_to_curves(curves, model, few, step, step / steps_per_epoch, path, name):
            best = copy.deepcopy(model.state_dict())
        if step == steps or time.monotonic() - saved_at > KEEP_SECONDS:
            save_progress(path, about, step, curves, best, model, optimisers)
            saved_at = time.monotonic()
        if step == steps:
            break
        if place == 0 or order is None:
            generator = fixed_noise("order", recipe.seed, epoch)
            order = torch.randperm(len(train), generator=generator, device="cpu").to(device)
        batch = order[place * recipe.batch_size : (place + 1) * recipe.batch_size][rank::world]
        done = (step + 0.5) / steps
        kl_weight = min(1.0, done / recipe.kl_warmup) if recipe.kl_warmup else 1.0
        for optimiser, peak in zip(optimisers, (recipe.lr, recipe.muon_lr), strict=False):
            optimiser.param_groups[0]["lr"] = peak * SCHEDULES[recipe.schedule](done)
        torch.manual_seed(seed_of("step", recipe.seed, step, rank))
        train_step(model, optimisers, train[batch], recipe.precision, kl_weight, done)
    model.load_state_dict(best)
    return curves


def train_step(model: Any, optimisers: list, x: Tensor, precision: str, kl_weight: float = 1, done: float = 0) -> None:
    """One step on this process's share x of a batch. Gradients are clipped to norm 1."""
    with torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        loss = model.loss(x, kl_weight, done)
    model.zero_grad()
    loss.backward()
    world = rank_and_world()[1]
    if world > 1:  # the mean gradient over processes, in one exchange
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) / world
        dist.all_reduce(flat)
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view(g.shape))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()


def add_to_curves(curves: dict, model: Any, splits: dict, step: int, epoch: float, path: Path, name: str) -> bool:
    """Evaluate, print a line, add to the curves; -> whether this is the best on validation so far."""
    if step in curves["step"]:  # before an interruption
        return False
    bounds = {split: in_bits(evaluate(model, x), x[0].numel()) for split, x in splits.items()}
    values = "  ".join(f"{split} {bound['neg_elbo_bpd']:7.4f}" for split, bound in bounds.items())
    terms = f"(valid: KL {bounds['valid']['kl_bpd']:.4f} + decoder {bounds['valid']['recon_bpd']:.4f})"
    line = f"epoch {epoch:5.2f}  step {step:5d}  -ELBO bits/dim: {values}  {terms}  {curves['seconds']:6.0f} s"
    tqdm.auto.tqdm.write(f"{name}  {line}" if name else line)
    if not all(math.isfinite(bound["neg_elbo_bpd"]) for bound in bounds.values()):
        fail(f"training diverged by step {step}: the bound is not finite; try a lower --lr", status=1)
    curves["step"].append(step)
    curves["epoch"].append(round(epoch, 4))
    for split, key in itertools.product(SPLITS, CURVE_KEYS):
        curves[split][key].append(bounds[split][key])
    columns = [curves["step"], curves["epoch"], *(curves[split][key] for split in SPLITS for key in CURVE_KEYS)]
    names = ["step", "epoch", *(f"{split}_{key}" for split in SPLITS for key in CURVE_KEYS)]
    table = "".join(",".join(map(str, row)) + "\n" for row in (names, *zip(*columns, strict=True)))
    file = "curves.csv" if path.stem == "checkpoint" else f"{path.stem}_curves.csv"
    write_whole(path.with_name(file), table.encode())
    *earlier, bound = curves["valid"]["neg_elbo_bpd"]
    if best := bound < min(earlier, default=math.inf):
        curves |= {"best_step": step, "best_epoch": round(epoch, 4)}
    return best


# Several processes, of torchrun: each takes its part of a batch, with its own noise, and gradients are averaged. Rank
# 0 alone writes and prints.


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes: 0 of 1, unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def join_processes(device: str) -> None:
    """Under torchrun, join the other processes: by nccl on GPUs, one for each process; by gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or rank_and_world()[1] > 1:
        return
    if device == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            fail(f"torchrun: more processes than the {gpus} GPUs here; lower --nproc_per_node")
        torch.cuda.set_device(local_rank)
    hours = timedelta(hours=2)  # one may download SVHN while the others wait
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=hours)
    if dist.get_rank():
        sys.stdout = io.StringIO()  # rank 0 prints for all


def save_progress(path: Path, about: dict, step: int, curves: dict, best: dict, model: Any, optimisers: list) -> None:
    """The checkpoint: `about` (script, arguments, the data's hash), the best weights (`state`), what --resume needs."""
    states = {"weights": model.state_dict(), "optimisers": [optimiser.state_dict() for optimiser in optimisers]}
    buffer = io.BytesIO()
    torch.save({**about, "step": step, "curves": curves, "state": best, **states}, buffer)
    write_whole(path, buffer.getvalue())


def load_progress(path: Path, data: str, model: nn.Module, optimisers: list[Any], steps: int) -> tuple[int, dict, dict]:
    """Give model and optimisers what the checkpoint holds; -> step, curves, best weights. data: the data's hash."""
    saved = read_checkpoint(path)
    if saved["data"] != data:
        fail(f"--resume: {path} was trained on other data")
    if saved["step"] > steps:
        fail(f"--resume: {path} has done {saved['step']} steps, more than {steps}; train longer")
    model.load_state_dict(saved["weights"])
    for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    print(f"going on from {path}, step {saved['step']} of {steps}")
    return saved["step"], saved["curves"], saved["state"]


def read_checkpoint(path: Path, script: str = "") -> dict:
    """What `save_progress` wrote, of this script; no code in it is run (`weights_only`)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange files: the error says enough
            saved = torch.load(path, map_location="cpu", weights_only=True)
        saved = {k: saved[k] for k in ("script", "args", "data", "step", "curves", "state", "weights", "optimisers")}
    except Exception as error:  # of the file system, zip, pickle or torch, each with its own
        fail(f"{path}: not a readable checkpoint ({(str(error).splitlines() or [type(error).__name__])[0]})")
    if script and saved["script"] != script:
        fail(f"{path}: a checkpoint of {saved['script']}, not of {script}")
    return saved


def load_trained(model: nn.Module, path: Path | str) -> dict:
    """Give the model a checkpoint's best weights; return its training's curves."""
    saved = read_checkpoint(Path(path))
    model.load_state_dict(saved["state"])
    return saved["curves"]


# --- figures and files


def claim(out: Path, resume: bool) -> filelock.BaseFileLock:
    """Make the folder this run's own until the lock is released; refused if another run is alive there.
    An earlier run's results are moved from OUT/q2b to OUT/q2b.1, ...; with resume they stay."""
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=0, is_singleton=True)
    if rank_and_world()[0]:
        return lock
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        fail(f"another run is writing into {out}; wait, or choose another --out")
    except OSError as error:
        fail(f"cannot write into {out}: {error.strerror}; choose another --out")
    earlier_run = any(path.suffix in (".json", ".pt") for path in out.iterdir())
    if resume and not earlier_run:
        print(f"nothing to resume in {out}: starting anew")
    elif earlier_run and not resume:
        free = (out.with_name(f"{out.name}.{k}") for k in itertools.count(1))
        earlier = out.rename(next(path for path in free if not path.exists()))
        out.mkdir()
        print(f"earlier results in {out} are now in {earlier}; --resume would have gone on")
    return lock


def write_whole(path: Path, contents: bytes) -> None:
    """A file that is never half written: a temporary one, then a rename. Rank 0 alone writes."""
    if not rank_and_world()[0]:
        part = path.with_name(path.name + ".part")
        part.write_bytes(contents)
        os.replace(part, path)


def write_results(out: Path, metrics: dict, report: str = "") -> None:
    """metrics.json, in which NaN and infinity are errors; and report.md, once there is a report."""
    write_whole(out / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
    if report:
        write_whole(out / "report.md", report.encode())
        print(f"wrote {out / 'report.md'}, its figures and metrics.json")


def describe_run(script: str, args: Any, data: dict, device: str, precision: str, *models: nn.Module) -> dict:
    """The head of metrics.json: what ran, on which data and machine."""
    info = Path("/proc/cpuinfo")  # of Linux
    cpu = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    name = f"{cpu[1] if cpu else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name() if device == "cuda" else name
    env = {
        "torch": torch.__version__, "python": platform.python_version(),
        "device": f"{device} ({name})", "threads": torch.get_num_threads(), "precision": precision,
    }  # fmt: skip
    params = sum(p.numel() for model in models for p in model.parameters())
    return {"script": script, "args": vars(args), "data": data, "env": env, "params": params}


def as_png(save: Callable[..., Any], **options: Any) -> bytes:
    """A figure's or image's save, as PNG bytes."""
    drawn = io.BytesIO()
    save(drawn, format="png", **options)
    return drawn.getvalue()


def save_figure(fig: Any, path: Path) -> None:
    """Write the figure as a PNG and close it; in a notebook, show it too."""
    write_whole(path, as_png(fig.savefig, dpi=130))
    if IN_KERNEL:
        plt.show()
    plt.close(fig)


def plot_curves(curves: dict, floors: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """-ELBO, KL, decoder term, bits/dim, by step, a row for each model; train thin, valid bold, test dashed.
    floors: what a model's -ELBO is held against, dotted, {label: value}. The axis of steps is a square root's,
    as points are denser early. Early points, but of the KL, may lie above the axes."""
    styles = (dict(lw=1, color="0.35"), dict(lw=2, color="C0"), dict(lw=2, color="C1", ls="--"))
    fig, axes = plt.subplots(len(curves), 3, figsize=(11, 3 * len(curves) + 0.8), squeeze=False, layout="constrained")
    for row, (name, curve) in zip(axes, curves.items(), strict=True):
        for ax, key, term in zip(row, CURVE_KEYS, ("−ELBO", "KL term", "decoder term"), strict=True):
            for split, style in zip(SPLITS, styles, strict=True):
                label = f"{split}, last {curve[split][key][-1]:.3f}"
                ax.plot(curve["step"], curve[split][key], label=label, marker=".", **style)
            values = np.array([curve[split][key] for split in SPLITS])
            low, high = values.min(), max(np.quantile(values, 0.8), values[:, values.shape[1] // 2 :].max())
            high = values.max() if ax is row[1] else high
            for label, value in floors.get(name, {}).items() if ax is row[0] else ():
                low = min(low, value)
                ax.axhline(value, ls=":", color="k", label=label)
            margin = 0.06 * (high - low) + 1e-3
            ax.set(xlim=(0, None), ylim=(low - margin, high + margin))  # before the root
            ax.set_xscale("function", functions=(np.sqrt, np.square))
            ax.set(title=f"{name} {term}", xlabel="step (root axis)", ylabel="bits/dim")
            ax.locator_params(axis="x", nbins=4)
            ax.legend(fontsize=7)
    fig.suptitle(title, wrap=True)
    save_figure(fig, path)


def plot_image_curves(metrics: dict, title: str, out: Path) -> None:
    """The curves of an image script; of synthetic data with the bounds of their entropy."""
    args, bound = metrics["args"], metrics["final"]["test"]["neg_elbo_bpd"]
    floor = SYNTHETIC_ENTROPY if args["data"] == "synthetic" and not args["evaluate"] else {}
    title = f"{title}, {metrics['data']['name']}\ntest −ELBO {bound:.3f} bits/dim"
    plot_curves({"": metrics["curves"]}, {"": floor}, title, out / "curves.png")


def save_grid(panels: Iterable[Tensor], columns: int, path: Path, stacked: bool = False) -> None:
    """Panels of images, each uint8 [N, 3, 32, 32], side by side or stacked, as a PNG with 2 x 2 dots for a pixel."""
    from torchvision.utils import make_grid  # here, as it is slow

    grids = [F.pad(make_grid(x.cpu(), columns, padding=1, pad_value=255), (8, 8, 8, 8), value=255) for x in panels]
    picture = torch.cat(grids, 1 if stacked else 2).repeat_interleave(2, 1).repeat_interleave(2, 2).permute(1, 2, 0)
    image = Image.fromarray(picture.numpy())
    write_whole(path, as_png(image.save))
    if IN_KERNEL:
        from IPython.display import display

        display(image)


def draw_interpolations(model: VAE, test: Tensor, decode: Callable, path: Path) -> tuple[Tensor, Tensor]:
    """Between five pairs of test images, ten codes each on a straight line in z and, under a flow, in eps, decoded.
    decode: z [N, C, 8, 8] -> uint8 [N, 3, 32, 32]. -> the images [10, 3, 32, 32] and their posteriors' means."""
    n, t = min(10, len(test)) // 2 * 2, torch.linspace(0, 1, 10, device=test.device).view(10, 1, 1, 1, 1)
    images = test[torch.linspace(0, len(test) - 1, n).long().to(test.device)]  # far apart: neighbours look alike
    with torch.no_grad():
        codes, _ = model.encoder(bin_centres(images))
        eps, _ = model.prior.z_to_eps(codes)
    paths = [torch.lerp(codes[::2], codes[1::2], t).flatten(0, 1)]  # (10 * 5, C, 8, 8)
    if isinstance(model.prior, FlowPrior):
        paths.append(model.prior.eps_to_z(torch.lerp(eps[::2], eps[1::2], t).flatten(0, 1)))
    columns = [torch.cat([images[None, ::2], decode(z).unflatten(0, (10, -1)), images[None, 1::2]]) for z in paths]
    save_grid([x.transpose(0, 1).flatten(0, 1) for x in columns], 12, path, stacked=True)  # x (12, 5, 3, 32, 32)
    return images, codes


def draw_image_figures(model: ImageVAE, test: Tensor, out: Path, samples: int) -> None:
    """For 2a and 2b: 100 samples, interpolations, reconstructions; single samples."""
    x, mu = model.sample(100, fixed_noise("samples"))
    save_grid((quantise(mu), quantise(x)), 10, out / "samples.png")
    images, codes = draw_interpolations(model, test, lambda z: quantise(model.decode(z)[1]), out / "interpolations.png")
    x, mu = model.decode(codes, fixed_noise("reconstructions"))
    save_grid((images, quantise(mu), quantise(x)), 10, out / "reconstructions.png", stacked=True)
    for first in range(0, samples, 100):
        x, _ = model.sample(min(100, samples - first), fixed_noise("single samples", first))
        write_images(quantise(x), out / "samples", first)


def write_images(images: Tensor, folder: Path, first: int) -> None:
    """uint8 [N, 3, 32, 32] as single files 0000.png, 0001.png, ..., from number `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        write_whole(folder / f"{first + k:04d}.png", as_png(Image.fromarray(image).save))


def with_error(found: dict, name: str) -> str:
    """NAME_bpd and NAME_se_bpd, such as "3.4919 ± 0.0034"."""
    return f"{found[name + '_bpd']:.4f} ± {found[name + '_se_bpd']:.4f}"


def bounds_text(metrics: dict) -> str:
    """The first section of an image script's report: what was trained on what, and what an image costs."""
    args, data, curves, env = metrics["args"], metrics["data"], metrics["curves"], metrics["env"]
    smoke = "**A --smoke run on tiny sizes: its numbers tell nothing.**\n\n" * args["smoke"]
    machine = "by an earlier run" if args["evaluate"] else f"on {env['device']}, in {env['precision']}"
    codecs = ", ".join(f"{codec} {bits:.3f}" for codec, bits in metrics["test_codecs_bpd"].items())
    rows = "\n".join(
        f"| {name} | {with_error(f, 'neg_elbo')} | {f['kl_bpd']:.4f} | {f['recon_bpd']:.4f} |"
        for name, f in metrics["final"].items()
    )
    gap = metrics["check_prior_nats"]
    verdict = "" if gap <= 1e-6 else " **CHECK FAILED: trust no KL here.**"
    return f"""{smoke}Data: {data["name"]}: {data["train"]:,} train, {data["valid"]:,} validation, {data["test"]:,} test
images. {metrics["params"]:,} parameters, z of {args["latents"]} x 8 x 8, trained for {curves["epoch"][-1]:g} of
{args["epochs"]} epochs (the KL's weight 1 from epoch {args["kl_warmup"] * args["epochs"]:.3g} on)
in {curves["seconds"]:,.0f} s, {machine}.

## 1. The bound on train, validation and test

**A test image costs at most {metrics["final"]["test"]["neg_elbo_bpd"]:.3f} bits/dim, on average.** A uniform guess
costs 8. Lossless files of up to 1,000 test images, in bits/dim: {codecs}.

| split | −ELBO, bits/dim | KL term | decoder term |
|---|---|---|---|
{rows}

Upper bounds on the code length of the 8-bit images, in fp32. ± is one standard error
over images, one draw of z each. Train: its first images, as many as validation has. Check of the
prior: its log p(z) agrees with the one by autograd's Jacobian within {gap:.1g} nats.{verdict}

![curves](curves.png)

The first {curves["examples"]:,} images of each split during training, KL weight 1; dotted, for synthetic data, its
entropy. The weights kept are the best on validation, of epoch {curves["best_epoch"]:g}."""


# --- command line


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program with one line: status 2 for bad input, 1 for a run that failed."""
    rank, world = rank_and_world()
    print(f"error: {message}" if world == 1 else f"error: process {rank}: {message}", file=sys.stderr)
    raise SystemExit(status)


def launch(main: Callable[[], None]) -> None:
    """main(), as a script: an interruption, or a lack of memory, ends it with one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a log shows each line at once; a console without a letter shows a ?
            stream.reconfigure(line_buffering=True, errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; --resume goes on from the last checkpoint, at most a minute old", 130)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        fail("out of memory: lower --batch-size, --latents or --limit")
    if rank_and_world()[1] > 1:  # not after a failure: the others may still wait in an exchange
        dist.destroy_process_group()


def pasted_into_cell() -> bool:
    """Whether this is a cell of a Jupyter or Colab kernel, whose command line is not the user's."""
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
    """argparse without abbreviations, with errors in one line, and the flags of all scripts or of image scripts."""

    def __init__(self, script: str, images: bool = False):
        show_defaults = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog=f"{script}.py", allow_abbrev=False, formatter_class=show_defaults)
        add, rate = self.add_argument, number(float, 0, 1)
        add("--epochs", type=number(int, 0, 10**9), help="passes over the training set")
        add("--batch-size", type=number(int, 1, 10**9), help="examples per step")
        add("--lr", type=number(float, 1e-9, 1), help="peak learning rate of Adam")
        add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, batches, noise")
        add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the fastest present")
        add("--out", default="results", help=f"results go to OUT/{script}")
        add("--resume", action="store_true", help="go on with the run in OUT; --epochs may grow")
        add("--smoke", action="store_true", help=f"tiny sizes, offline, into OUT/smoke/{script}")
        if not images:
            return
        add("--data", help="svhn, synthetic, FILE.npz or a FOLDER of images")
        add("--data-root", default="data", help="where SVHN is, or is downloaded to")
        add("--limit", type=number(int, 20, 10**9), help="of training images; validation and test: a tenth")
        add("--latents", type=number(int, 1, 256), help="channels of z, 8 x 8 positions")
        add("--muon-lr", type=rate, help="peak learning rate of Muon; 0: Adam alone")
        add("--kl-warmup", type=rate, help="fraction of training in which the KL's weight rises to 1")
        add("--handout", action="store_true", help="the handout's: batches of 32, Adam at 2e-4")
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of training; auto: the fastest")
        add("--evaluate", metavar="RUN", help=f"a checkpoint: no training; into OUT/{script}/evaluate")
        add("--samples", type=number(int, 0, 10**6), default=0, help="so many, as samples/0000.png, ...")

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


HANDOUT = dict(batch_size=32, lr=2e-4, muon_lr=0.0, kl_warmup=0.0)  # what the handout recommends: --handout
OF_ONE_COMMAND = {"out", "resume", "smoke", "evaluate", "samples"}  # not taken from a checkpoint
MAY_DIFFER = {"epochs", "data", "data_root", "device", "precision", "compare", "table_epochs"}  # from it
THREADS = torch.get_num_threads()  # of the machine, or of OMP_NUM_THREADS


def parse_args(parser: Parser, argv: Any, defaults: dict, smoke: dict, file: str = "checkpoint.pt") -> tuple[Any, Path]:
    """The command line -> (arguments, the folder for the results); prints them. Errors: one line, exit status 2.
    What is not typed comes from the run that --resume or --evaluate names, else from --smoke, --handout and `defaults`.
    argv: a list of strings, or None for sys.argv. file: in a run's folder, the checkpoint that holds its arguments."""
    argv = [] if argv is None and pasted_into_cell() else argv
    parser.set_defaults(**defaults)
    values = vars(parser.parse_args(argv))
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(values))))  # without the defaults
    typed = {name: value for name, value in typed.items() if value is not None}
    values |= (HANDOUT if values.get("handout") else {}) | (smoke if values["smoke"] else {}) | typed
    script, evaluate = parser.prog.removesuffix(".py"), values.get("evaluate")
    out = Path(values["out"]) / ("smoke" if values["smoke"] else "") / script
    path, may_differ = out / file, MAY_DIFFER
    if evaluate:
        path, out = Path(evaluate), out / "evaluate"
        path = path / file if path.is_dir() else path
        values["evaluate"] = typed["evaluate"] = str(path)
        may_differ = MAY_DIFFER | {"limit"}
    if evaluate or (values["resume"] and path.exists()):
        saved = {k: v for k, v in read_checkpoint(path, script)["args"].items() if k not in OF_ONE_COMMAND}
        if evaluate and "data" in typed:
            saved.pop("limit")
        if differing := differences(saved, {k: v for k, v in typed.items() if k not in OF_ONE_COMMAND | may_differ}):
            fail(f"{path} is of a run with other arguments: {differing}; leave them out")
        values |= saved | typed
    print(script, " ".join(f"--{k.replace('_', '-')} {v}" for k, v in values.items()))
    return argparse.Namespace(**values), out


def image_recipe(args: argparse.Namespace, examples: int, precision: str) -> tuple[argparse.Namespace, Recipe]:
    """The arguments, completed; and the recipe of a training on so many examples.
    What is neither typed nor a checkpoint's nor a script's default follows the training's length. Batches: 16, doubled
    until there are no more than 25,000 steps. Up to 750 steps: peak rates of 2e-3 (Adam) and .012 (Muon), and a KL
    weight of 1. Beyond, the rates fall with the root of the number of steps; Muon averages gradients over more steps,
    up to 50 for 20; the KL's weight rises from 0 to 1 in all steps but the last 750, so that the code is used early."""
    seen, batch_size = max(1, args.epochs * examples), args.batch_size or 16
    while args.batch_size is None and seen > 25_000 * batch_size:
        batch_size *= 2
    short = min(1.0, 750 * batch_size / seen)  # 750 steps, as a fraction of all
    by_length = {"lr": 2e-3 * math.sqrt(short), "muon_lr": 0.012 * math.sqrt(short), "kl_warmup": 1 - short}
    unset = {k: float(f"{v:.3g}") for k, v in by_length.items() if getattr(args, k) is None}
    args = argparse.Namespace(**vars(args) | unset | {"batch_size": batch_size})
    schedule, momentum = "constant" if args.handout else "trapezoid", min(0.98, 1 - 0.05 * math.sqrt(short))
    settings = (args.epochs, batch_size, args.lr, args.muon_lr, schedule, args.kl_warmup, args.seed)
    recipe = Recipe(*settings, precision, momentum)
    if not args.evaluate:
        check_batch_size(batch_size, examples)
        print(recipe)
    return args, recipe


def differences(theirs: dict, ours: dict) -> str:
    """Which arguments of ours differ from theirs, with both values; "" if none does."""
    both = {k: (theirs.get(k), v) for k, v in ours.items() if theirs.get(k) != v}
    return ", ".join(f"--{k.replace('_', '-')} ({theirs}, now {ours})" for k, (theirs, ours) in both.items())


def choose_machine(device: str, precision: str = "fp32", threads: int = THREADS) -> tuple[str, str]:
    """--device and --precision, with auto resolved to what is fastest here; joins other processes."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, here in present.items() if here)
    elif not present[device]:
        fail(f"--device {device}: torch finds none here; use --device auto")
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean fp32; in matrix products that is torch's default
    join_processes(device)
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:  # private; bool() = False where missing
        checks = (getattr(torch.cpu, f"_is_{unit}_supported", bool) for unit in ("avx512_bf16", "amx_tile"))
        native = any(check() for check in checks)
    if precision == "auto":
        precision = "bf16" if native and device != "mps" else "fp32"
    print(f"on {device}, {torch.get_num_threads()} threads, {precision} training steps")
    return device, precision
