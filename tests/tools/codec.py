"""The trained models as lossless codecs: test images into one file, back from it, and its size beside the bound.

    pip install constriction
    python tests/tools/codec.py results/q2b --data FILE.npz --images 100  ->  results/q2b/codec.json, compressed.bin

Bits-back coding (Townsend et al. 2019, arXiv:1901.04866), chained over the images on one stack of constriction's ANS
coder. To push a symbol adds -log2 P(symbol) bits to the stack; to pop one takes as many away. For each image:

    encoder:  pop z under q(z|x)    push the levels under P(levels|z)    push z under p(z)
    decoder:  pop z under p(z)      pop the levels under P(levels|z)     push z under q(z|x)

    nats per image: log q(z|x) - log p(z) - log P(levels|z), whose mean over z ~ q(z|x) is the negative ELBO

The first z is popped from random words of a fixed seed, the stack's start-up: part of the file, counted apart; they
must come back when all is decoded. The file holds the number of images, then the stack's words, each a little-endian
uint32. Both sides share the weights.

z lies on a grid in [-REACH, REACH], SPACING apart: about the least std that q can have. constriction gives every symbol
2^-24 at least: 0.001 bits/dim under p(z) with 16 channels. q is offered only the grid within WINDOW std of its mean.

2a and 2b learn the density of dequantised levels. Here their normal is integrated over each level's bin, the first and
the last with the tails, and q sees bin centres: fewer bits than the bound by dequantisation.

Both sides must compute the same bits. So they share one walk through p(z) and one through P(levels|z): in float64, an
image at a time, in the same shapes and order, zeros where nothing is decoded yet; with the same torch and machine.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tqdm.auto
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bonus  # noqa: E402
import core  # noqa: E402
from tools.floor import log_normal_mass  # noqa: E402

stream = importlib.import_module("constriction").stream if importlib.util.find_spec("constriction") else None
SPACING, REACH, WINDOW = 2.0**-10, 16, 6
LAST = round(REACH / SPACING)  # z = SPACING k with k = -LAST..LAST
LEVEL_0, LEVEL_STEP = 0.5 / core.PIXEL_SCALE - 1, 1 / core.PIXEL_SCALE  # centre and width of a level's bin
MODELS: dict[str, Callable[[Any], core.VAE]] = {
    "q2a": lambda args: core.ImageVAE(args.latents, core.StandardNormal),
    "q2b": lambda args: core.ImageVAE(args.latents, core.FlowPrior),
    "bonus": lambda args: bonus.LossyVAE(args.latents, args.receptive_field, args.prior),
}

Ask = Callable[..., np.ndarray]  # ask(place, family, *parameters) -> the symbols at a place of a tensor, int32 [n]


class Known:
    """The encoder's `Ask`: answers with the symbols, which it knows, and notes each question until it is pushed."""

    def __init__(self, symbols: Tensor):
        self.symbols = symbols
        self.questions: list[tuple[Any, ...]] = []

    def __call__(self, place: Any, *distributions: Any) -> np.ndarray:
        self.questions.append((self.symbols[place].flatten().numpy(), *distributions))
        return self.questions[-1][0]

    def push(self, coder: Any) -> None:
        for question in reversed(self.questions):  # what is pushed last is popped first
            coder.encode_reverse(*question)


def in_bins(mean: Tensor, log_std: Tensor, centre: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std in numbers of bins from the centre of symbol 0's bin, each [n]: symbol s's is s - 1/2 to s + 1/2."""
    return ((mean - centre) / width).flatten().numpy(), (torch.exp(log_std) / width).flatten().numpy()


def z_under_prior(prior: core.StandardNormal, ask: Ask) -> Tensor:
    """Ask for z under p(z_i|z_<i), one position after the other -> k, int32 [C, 8, 8]."""
    k, family = torch.zeros(prior.latent_shape, dtype=torch.int32), stream.model.QuantizedGaussian(-LAST, LAST)
    params = getattr(prior, "mean_and_log_std", lambda z: (0 * z, 0 * z))  # of all positions
    for i, j in itertools.product(*map(range, k.shape[1:])):
        mean, log_std = (t[0, :, i, j] for t in params(SPACING * k[None].double()))  # by what is known; each (C,)
        k[:, i, j] = torch.from_numpy(ask((slice(None), i, j), family, *in_bins(mean, log_std, 0, SPACING)))
    return k


def z_under_posterior(model: core.VAE, levels: Tensor) -> list[Any]:
    """q(z|x) of each number in z, in the order of k.flatten(). levels int32 [3, 32, 32]."""
    mu, log_std = model.encoder(core.bin_centres(levels[None]).double())
    distributions = []
    for mean, std in zip(*in_bins(mu, log_std, 0, SPACING), strict=True):
        low = max(-LAST, min(LAST - 1, math.floor(mean - WINDOW * std)))
        high = min(LAST, max(1 - LAST, math.ceil(mean + WINDOW * std)))
        distributions.append(stream.model.QuantizedGaussian(low, high, mean, std))
    return distributions


def levels_given_z(model: core.VAE, z: Tensor, ask: Ask) -> Tensor:
    """Ask for the levels under P(levels|z) -> int32 [3, 32, 32]. z float64 [1, C, 8, 8].
    The bonus's wavefronts come one after the other, as in LocalPixelCNN.sample."""
    if not isinstance(model, bonus.LossyVAE):
        bins = in_bins(*model.decoder(z), LEVEL_0, LEVEL_STEP)
        return torch.from_numpy(ask(..., stream.model.QuantizedGaussian(0, 255), *bins)).view(3, 32, 32)
    net, x, levels = model.decoder, z.new_zeros(1, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.int32)
    features = net.features(z)
    for i, j in bonus.wavefronts(net.receptive_field + 1):
        params = net.at(x, features[:, :, i, j], i, j)  # (1, 10 K, P, 1)
        found = colours_of_mixture(params, lambda colour, *d, i=i, j=j: ask((colour, i[:, 0], j[:, 0]), *d))
        levels[:, i[:, 0], j[:, 0]] = found
        x[0, :, i[:, 0], j[:, 0]] = core.bin_centres(found).double()
    return levels


def colours_of_mixture(params: Tensor, ask: Ask) -> Tensor:
    """Ask for R, G and B of P pixels under `bonus.mixture_log_prob`: params [1, 10 K, P, 1] -> int32 [3, P].
    P(R) = sum_k w_k P_k(R); P(G|R) = sum_k w_k(R) P_k(G|R) with w_k(R) = w_k P_k(R) / P(R); B after G likewise."""
    logits, mu, log_scale, c = (t[0, ..., 0] for t in bonus.split_params(params))  # (K, P), then three of (K, 3, P)
    family, edges = stream.model.Categorical(perfect=False), core.dequantise(torch.arange(1, 256).double(), 0)
    log_w, levels = torch.log_softmax(logits, 0), torch.zeros(3, logits.shape[1], dtype=torch.int32)
    r = torch.zeros_like(mu)  # how far the colours that are known lie from their means
    for colour in range(3):
        mean = mu[:, colour] + (0, c[:, 0] * r[:, 0], c[:, 1] * r[:, 0] + c[:, 2] * r[:, 1])[colour]
        cdf = torch.sigmoid((edges[:, None, None] - mean) * torch.exp(-log_scale[:, colour]))  # (255, K, P)
        cdf = F.pad((torch.exp(log_w) * cdf).sum(1).T, (1, 0))  # (P, 256), from 0
        probabilities = torch.diff(F.pad(cdf, (0, 1), value=1.0)).clamp(min=0)  # (P, 256); rounding may be below 0
        levels[colour] = torch.from_numpy(ask(colour, family, probabilities.numpy()))
        r[:, colour] = core.bin_centres(levels[colour]).double() - mu[:, colour]
        log_w = torch.log_softmax(log_w + bonus.logistic_log_prob(levels[colour], mean, log_scale[:, colour]), 0)
    return levels


def first_words(n: int) -> np.ndarray:
    """The n random words that the stack starts with, uint32 [n]; the topmost, at the end, are the same for every n."""
    return np.random.RandomState(0).randint(0, 2**32, n, dtype=np.uint32)[::-1].copy()


@torch.no_grad()
def encode(model: core.VAE, images: Tensor) -> tuple[bytes, int, Tensor]:
    """uint8 [N, 3, 32, 32] -> the file's bytes, how many words the stack started with, and k, int32 [N, C, 8, 8]."""
    enough = math.prod(model.prior.latent_shape) + 2  # words: a number takes at most 24 bits, the coder itself has two
    coder, started_with, codes = stream.stack.AnsCoder(first_words(enough)), 0, []
    for levels in tqdm.auto.tqdm(images.int(), desc="encoding", leave=False, disable=None):
        symbols = [coder.decode(q) for q in z_under_posterior(model, levels)]
        k = torch.tensor(symbols, dtype=torch.int32).view(model.prior.latent_shape)
        if not codes:  # the first z has taken what it needs: words below the coder's own two are left out
            started_with = enough - coder.num_words() + 2
            coder = stream.stack.AnsCoder(coder.get_compressed()[-2:])
        known_levels, known_z = Known(levels), Known(k)
        levels_given_z(model, SPACING * k[None].double(), known_levels)
        z_under_prior(model.prior, known_z)
        known_levels.push(coder)
        known_z.push(coder)
        codes.append(k)
    words = np.append(np.uint32(len(images)), coder.get_compressed())
    return words.astype("<u4").tobytes(), started_with, torch.stack(codes)


@torch.no_grad()
def decode(model: core.VAE, file: bytes) -> Tensor:
    """A file's bytes -> uint8 [N, 3, 32, 32]. ValueError or KeyError if not from `encode` with this model."""
    count, *words = np.frombuffer(file, "<u4").tolist()
    coder, images = stream.stack.AnsCoder(np.array(words, np.uint32)), []
    for _ in tqdm.auto.tqdm(range(count), desc="decoding", leave=False, disable=None):
        k = z_under_prior(model.prior, lambda _, *distributions: coder.decode(*distributions))
        z = SPACING * k[None].double()
        images.append(levels_given_z(model, z, lambda _, *distributions: coder.decode(*distributions)))
        if coder.num_words() < 2:
            raise ValueError("the stack is used up too early")
        for symbol, q in reversed(list(zip(k.flatten().tolist(), z_under_posterior(model, images[-1]), strict=True))):
            coder.encode_reverse(symbol, q)
    if not np.array_equal(coder.get_compressed(), first_words(coder.num_words())):
        raise ValueError("the words that the stack started with do not come back")
    return torch.stack(images[::-1]).to(torch.uint8)


def promise(model: core.VAE, images: Tensor, z: Tensor) -> core.Terms:
    """-log P(levels|z) and log q(z|x) - log p(z) of each image at these z [N, C, 8, 8], by core's densities; nats."""
    x = core.bin_centres(images).double()
    kl = core.normal_log_prob(z, *model.encoder(x)) - model.prior.log_prob(z)
    if isinstance(model, bonus.LossyVAE):
        return core.Terms(-model.log_p_x(x, z), kl)
    mu, log_std = model.decoder(z)
    low = torch.where(images == 0, -math.inf, core.dequantise(images.double(), 0))
    high = torch.where(images == 255, math.inf, core.dequantise(images.double(), 1))
    log_mass = log_normal_mass((low - mu) * torch.exp(-log_std), (high - mu) * torch.exp(-log_std))
    return core.Terms(-core.sum_dims(log_mass), kl)


def load_model(path: Path) -> tuple[core.VAE, argparse.Namespace]:
    """The trained model of a checkpoint, or of the run in a folder, on the CPU; and its arguments."""
    saved = core.read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    args = argparse.Namespace(**saved["args"])
    model = MODELS[saved["script"]](args)
    model.load_state_dict(saved["state"])
    return model, args


@torch.no_grad()
def compare(model: core.VAE, images: Tensor, file: bytes, started_with: int, k: Tensor) -> dict[str, float]:
    """Bits/dim of the file, of what was promised, and of other codecs, by what each number is."""
    in_float64, z = copy.deepcopy(model).double(), SPACING * k.double()
    promised = [promise(in_float64, *batch).neg_elbo for batch in zip(images.split(16), z.split(16), strict=True)]
    promised, bound = (x.mean().item() for x in (torch.cat(promised), core.evaluate(model, images).neg_elbo))
    bits = 8 / images.numel()
    return {
        "file on disk": bits * len(file),
        "start-up of its stack": bits * 4 * started_with,
        "file without the start-up": bits * (len(file) - 4 * started_with),
        "promise, log q(z|x) - log p(z) - log P(x|z) at the file's z": core.bits_per_dim(promised, 3072),
        "bound as in the reports (core.evaluate)": core.bits_per_dim(bound, 3072),
        **{f"{codec}, a file for each image": core.codec_bits_per_dim(images, codec) for codec in ("PNG", "WebP")},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="of q2a.py, q2b.py or bonus.py; or the folder of a run")
    add("--data", default="svhn", help="as in the scripts")
    add("--limit", type=core.number(int, 20, 10**9), help="as in the scripts")
    add("--images", type=core.number(int, 1, 10**6), default=10, help="how many of the first test images")
    args = parser.parse_args(argv)
    if stream is None:
        core.fail("the entropy coder is missing: pip install constriction")
    model, trained = load_model(args.checkpoint)
    data = core.load_images(args.data, "data", args.limit, trained.seed, only_test=True)
    images = data.splits["test"][: args.images]
    in_float64, folder = copy.deepcopy(model).double(), args.checkpoint
    folder = folder if folder.is_dir() else folder.parent
    file, started_with, k = encode(in_float64, images)
    core.write_whole(folder / "compressed.bin", file)
    if not torch.equal(decode(in_float64, (folder / "compressed.bin").read_bytes()), images):
        core.fail("the decoded images differ from those encoded", status=1)
    found = compare(model, images, file, started_with, k)
    print(f"the first {len(images)} test images of {data.name}, {len(file):,} bytes, decoded exactly; in bits/dim:")
    print(*(f"{value:8.4f}  {name}" for name, value in found.items()), sep="\n")
    numbers = {"data": data.name, "images": len(images), "bits_per_dim": found}
    core.write_whole(folder / "codec.json", (json.dumps(numbers, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
