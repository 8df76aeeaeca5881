"""The codec: what it compresses comes back exactly, in as many bits as the bound promises; and nothing else decodes."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import bonus
import core
from tools import codec

stream = pytest.importorskip("constriction").stream
MODELS = {
    "2a": lambda: core.ImageVAE(2, core.StandardNormal), "2b": lambda: core.ImageVAE(2, core.FlowPrior),
    "bonus": lambda: bonus.LossyVAE(2, 2, "flow"),
}  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(core.make_synthetic((2,))[0]).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module", params=MODELS)
def encoded(request, images):
    """A model, none of whose parts is trivial, in float64; and what `codec.encode` makes of the images with it."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for start in model.parameters():
        nn.init.normal_(start, std=0.02) if not start.any() else None
    return model.double(), *codec.encode(model, images)


def cost(family, symbol, *parameters, times=1000):
    """-log2 P(symbol), measured: the bits that the stack grows by."""
    coder = stream.stack.AnsCoder(codec.first_words(10))
    before = coder.num_valid_bits()
    coder.encode_reverse(np.full(times, symbol, np.int32), family, *(np.repeat(p, times, 0) for p in parameters))
    return (coder.num_valid_bits() - before) / times


@pytest.mark.parametrize("std", [0.3, 40.0])  # grey levels
@pytest.mark.parametrize("mean", [0.9, 100.7, 255.2])  # of level + u: level v is from v to v + 1
def test_a_level_has_the_normals_mass_between_its_own_edges(mean, std):
    mu, log_std = torch.full((1, 3, 32, 32), mean / 128 - 1).double(), torch.tensor(std / 128).double().log()
    known = codec.Known(torch.zeros(3, 32, 32, dtype=torch.int32))
    codec.levels_given_z(SimpleNamespace(decoder=lambda z: (mu, log_std.expand_as(mu))), None, known)
    _, family, means, stds = known.questions[0]
    edges = torch.tensor([-torch.inf, *range(1, 256), torch.inf]).double()  # with the tails
    expected = -torch.distributions.Normal(mean, std, validate_args=False).cdf(edges).diff().log2()
    likely = [(v, expected[v].item()) for v in range(256) if expected[v] < 13]  # 2^-13 is well within 24 bits
    likely = likely[:: 1 + len(likely) // 20]
    assert max(abs(cost(family, v, means[:1], stds[:1]) - bits) for v, bits in likely) < 0.01
    for error in (-0.5, 0.5):  # control: half a level to either side is seen
        assert max(abs(cost(family, v, means[:1] + error, stds[:1]) - bits) for v, bits in likely) > 0.02


def test_probabilities_of_the_three_colours_multiply_to_the_mixtures():
    params, levels = torch.randn(1, 100, 7, 1).double(), torch.randint(256, (3, 7), dtype=torch.int32)
    levels[:, 0], levels[:, 1] = 0, 255
    known = codec.Known(levels)
    assert torch.equal(codec.colours_of_mixture(params, known), levels)
    tables = [torch.from_numpy(probabilities) for _, _, probabilities in known.questions]  # each (P, 256)
    assert all(torch.allclose(table.sum(1), torch.ones(7).double(), atol=1e-12) for table in tables)
    chosen = [table[range(7), colour] for table, colour in zip(tables, levels.long(), strict=True)]
    log_p = torch.stack(chosen).log().sum()
    assert log_p.item() == pytest.approx(bonus.mixture_log_prob(levels[None, ..., None], params).item(), abs=1e-6)


def test_images_come_back_exactly_in_as_many_bits_as_promised_and_nothing_else_does(encoded, images):
    model, file, started_with, k = encoded
    assert torch.equal(codec.decode(model, file), images)
    bits = codec.promise(model, images, codec.SPACING * k.double()).neg_elbo.mean().item() / math.log(2)
    assert (8 * len(file) - 32 * started_with) / len(images) == pytest.approx(bits, rel=0.01)
    assert bits < 1.01 * core.evaluate(copy.deepcopy(model).float(), images).neg_elbo.mean().item() / math.log(2)
    for word in (0, 1, -1):  # one bit, in the number of images, in the stack's lowest word, in its topmost
        words = np.frombuffer(file, "<u4").copy()
        words[word] ^= 8
        with pytest.raises((KeyError, ValueError)):
            codec.decode(model, words.tobytes())
    other = copy.deepcopy(model)
    next(other.decoder.parameters()).data.mul_(1.001)
    with pytest.raises((KeyError, ValueError)):
        codec.decode(other, file)
