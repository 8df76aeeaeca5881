"""The codec: what it compresses comes back exactly, in as many bits as the bound promises; and nothing else decodes."""

import argparse
import copy
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bonus
import core
from tools import codec

stream = pytest.importorskip("constriction").stream
IMAGES = ("q2a", "q2b", "bonus")
ERRORS = (KeyError, ValueError)  # what `codec.decode` raises on a file that is not one
DATA = ("--data", "synthetic", "--limit", "80")  # eight test images


@pytest.fixture(scope="module")
def images():
    args = argparse.Namespace(data="synthetic", data_root="", limit=80, seed=0, evaluate=None)
    return core.load_images(args).splits["test"]


@pytest.fixture(scope="module")
def encoded(smoke, images):
    """Of a script, once: its smoke run's model in float64, and what `codec.encode` makes of the images with it."""

    @functools.cache
    def of(script):
        args = argparse.Namespace(evaluate=smoke[0] / script / "checkpoint.pt", device="cpu", precision="fp32")
        model = core.float64_copy(codec.load_model(args))
        return model, *codec.encode(model, images)

    return of


def cost(family, symbol, *parameters, times=1000):
    """-log2 P(symbol), measured: the bits that the stack grows by."""
    coder = stream.stack.AnsCoder(codec.first_words(10))
    before = coder.num_valid_bits()
    coder.encode_reverse(np.full(times, symbol, np.int32), family, *(np.repeat(p, times, 0) for p in parameters))
    return (coder.num_valid_bits() - before) / times


# ------------------------------------------------------------------------------------------------- the distributions


@pytest.mark.parametrize("std", [0.3, 2.0, 40.0])  # grey levels
@pytest.mark.parametrize("mean", [0.9, 100.0, 100.7, 255.2])  # of level + u: level v is from v to v + 1
def test_a_level_has_the_normals_mass_between_its_own_edges(mean, std):
    mu, log_std = torch.full((1, 3, 32, 32), mean / 128 - 1).double(), torch.tensor(std / 128).double().log()
    model = SimpleNamespace(decoder=lambda z: (mu, log_std.expand_as(mu)))
    known = codec.Known(torch.zeros(3, 32, 32, dtype=torch.int32))
    codec.levels_given_z(model, None, known)
    _, family, means, stds = known.questions[0]
    edges = torch.arange(257).double()
    edges[0], edges[-1] = -torch.inf, torch.inf  # the tails
    expected = -torch.distributions.Normal(mean, std, validate_args=False).cdf(edges).diff().log2()
    likely = [(v, expected[v].item()) for v in range(256) if expected[v] < 13]  # 2^-13 is well within 24 bits
    likely = likely[:: 1 + len(likely) // 20]
    assert max(abs(cost(family, v, means[:1], stds[:1]) - bits) for v, bits in likely) < 0.01
    # Control: half a level to either side is seen.
    for error in (-0.5, 0.5):
        assert max(abs(cost(family, v, means[:1] + error, stds[:1]) - bits) for v, bits in likely) > 0.02


def test_what_is_asked_for_z_is_its_density_under_the_flow():
    prior = core.FlowPrior((2, 8, 8), width=8).double()
    torch.nn.init.normal_(prior.net[-1].weight)
    known = codec.Known(torch.randint(-3000, 3000, (2, 8, 8), dtype=torch.int32))
    with torch.no_grad():
        assert torch.equal(codec.z_under_prior(prior, known), known.symbols)
        expected = prior.log_prob(codec.SPACING * known.symbols[None].double()).item()
    k, mean, std = (np.concatenate([question[part] for question in known.questions]) for part in (0, 2, 3))
    assert len(k) == 128 and mean.std() > 10 and std.std() > 10  # control: the flow does something
    log_density = -0.5 * ((k - mean) / std) ** 2 - np.log(std * math.sqrt(2 * math.pi)) - math.log(codec.SPACING)
    assert log_density.sum() == pytest.approx(expected, rel=1e-9)


def test_probabilities_of_the_three_colours_multiply_to_the_mixtures():
    params, levels = torch.randn(1, 100, 7, 1).double(), torch.randint(256, (3, 7), dtype=torch.int32)
    levels[:, 0], levels[:, 1] = 0, 255
    known = codec.Known(levels)
    assert torch.equal(codec.colours_of_mixture(params, known), levels)
    tables = [torch.from_numpy(probabilities) for _, _, probabilities in known.questions]  # each (P, 256)
    assert len(tables) == 3 and all(torch.allclose(t.sum(1), torch.ones(7).double(), atol=1e-12) for t in tables)
    chosen = [table[range(7), colour] for table, colour in zip(tables, levels.long(), strict=True)]
    log_p = torch.stack(chosen).log().sum()
    assert log_p.item() == pytest.approx(bonus.mixture_log_prob(levels[None, ..., None], params).item(), abs=1e-6)
    levels[0] = 255 - levels[0]  # control: the later colours' tables depend on the first colour
    again = codec.Known(levels)
    codec.colours_of_mixture(params, again)
    assert np.array_equal(again.questions[0][2], known.questions[0][2])
    assert not any(np.allclose(again.questions[c][2], known.questions[c][2]) for c in (1, 2))


# ---------------------------------------------------------------------------------------------------------- the codec


@pytest.mark.parametrize("script", IMAGES)
def test_images_come_back_exactly_in_as_many_bits_as_promised(encoded, images, script):
    model, file, started_with, k = encoded(script)
    decoded = codec.decode(model, file)
    assert decoded.dtype == torch.uint8 and torch.equal(decoded, images)
    promised, dequantised = codec.promise(model, images, codec.SPACING * k.double())
    bits = core.bits_per_dim(promised.neg_elbo.mean().item(), 1)
    assert (8 * len(file) - 32 * started_with) / len(images) == pytest.approx(bits, rel=0.02)
    assert (8 * len(file) - 32 * started_with) / len(images) == pytest.approx(bits, abs=0.01 * 3072)
    gain = dequantised.recon - promised.recon  # up to the noise of u
    assert gain.mean() > 0 and gain.min() > -2 if script != "bonus" else not gain.any()
    bound = core.evaluate(copy.deepcopy(model).float(), images).neg_elbo.mean().item()
    assert bits < 1.01 * core.bits_per_dim(bound, 1)


@pytest.mark.parametrize(("script", "word"), [("q2a", 0), ("q2a", 1), ("q2a", -1), ("q2b", -1), ("bonus", -1)])
def test_a_file_with_one_bit_flipped_is_noticed(encoded, script, word):
    """In the number of images, in the stack's lowest word, which is used last, or in its topmost."""
    model, file, _, _ = encoded(script)
    words = np.frombuffer(file, "<u4").copy()
    words[word] ^= 8
    with pytest.raises(ERRORS):
        codec.decode(model, words.tobytes())


@pytest.mark.parametrize("part", ["encoder", "prior", "decoder"])
def test_other_weights_are_noticed(encoded, part):
    model, file, _, _ = encoded("q2b")
    other = core.float64_copy(model)
    with torch.no_grad():
        next(getattr(other, part).parameters()).mul_(1.001)
    with pytest.raises(ERRORS):
        codec.decode(other, file)


NO_FILES = {
    "empty": b"",
    "odd": b"12345",
    "count": b"\1\0\0\0",
    "zeros": b"\1" + bytes(15),
    "any": bytes(range(1, 101)),
}


@pytest.mark.parametrize("file", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_of_the_codec_is_noticed(encoded, file):
    with pytest.raises(ERRORS):
        codec.decode(encoded("q2a")[0], file)


# ------------------------------------------------------------------------------------------------------- command line


def test_the_tool_prints_and_writes_its_numbers(smoke, images, tmp_path, capsys):
    out, numbers = tmp_path / "new" / "images", tmp_path / "numbers.json"
    checkpoint = str(smoke[0] / "q2a" / "checkpoint.pt")
    codec.main([checkpoint, *DATA, "--images", "3", "--out", str(out), "--json", str(numbers)])
    found, printed = json.loads(numbers.read_text("utf-8")), capsys.readouterr().out
    assert found["images"] == 3 and found["bytes"] == out.stat().st_size and found["start_up_bytes"] % 4 == 0
    bits = found["bits_per_dim"]
    assert bits["file on disk"] == pytest.approx(8 * out.stat().st_size / (3 * 3072))
    assert bits["PNG, a file for each image"] == pytest.approx(core.codec_bits_per_dim(images[:3], "PNG"))
    assert "decoded exactly" in printed and all(f"{value:8.4f}  {name}" in printed for name, value in bits.items())


def test_the_tools_errors_are_one_line(smoke, tmp_path, capsys, monkeypatch):
    def fails(script, *flags, status=2):
        with pytest.raises(SystemExit) as ended:
            codec.main([str(smoke[0] / script / "checkpoint.pt"), *flags])
        error = capsys.readouterr().err
        assert ended.value.code == status and error.startswith("error: ") and len(error.splitlines()) == 1
        return error

    assert "a checkpoint of q1a" in fails("q1a", *DATA)
    assert "not a readable checkpoint" in fails("absent", *DATA)
    assert "absent.npz" in fails("q2a", "--data", str(tmp_path / "absent.npz"))
    assert "holds 8" in fails("q2a", *DATA, "--images", "9")
    encode = codec.encode

    def encode_with_a_bit_flipped(model, x):
        file, *rest = encode(model, x)
        return bytes([*file[:-1], file[-1] ^ 1]), *rest

    monkeypatch.setattr(codec, "encode", encode_with_a_bit_flipped)
    assert "cannot be decoded" in fails("q2a", *DATA, "--images", "2", status=1)
    monkeypatch.setattr(codec, "encode", lambda model, x: encode(model, x.flip(0)))
    assert "differ" in fails("q2a", *DATA, "--images", "2", status=1)
    monkeypatch.setattr(codec, "stream", None)
    assert "pip install constriction" in fails("q2a", *DATA)
