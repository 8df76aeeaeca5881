"""The data: what the handout says, what a user's file may get wrong, torchvision's reader, and the closed forms."""

import argparse
import hashlib
import http.server
import math
import threading

import numpy as np
import pytest
import scipy.io
import torch
from torchvision.datasets import SVHN

import core
import q1a
import q1b

# ------------------------------------------------------------------------------------------------------ questions 1


def test_1a_points_are_the_handouts():
    first = np.random.RandomState(0).randn(100_000, 2)[0]
    assert q1a.make_points("data1")[0] == pytest.approx([1 + 5 * first[0], 2 + first[1]])
    r = math.sqrt(2) / 2
    turned = [1 + r * 5 * first[0] - r * first[1], 2 + r * 5 * first[0] + r * first[1]]
    assert q1a.make_points("data2")[0] == pytest.approx(turned)


def test_points_are_split_in_order_without_overlap():
    x = np.arange(2000.0).reshape(1000, 2)
    data = core.split_points("x", x)
    assert [len(s) for s in data.splits.values()] == [720, 80, 200]
    assert np.array_equal(np.concatenate([s.numpy() for s in data.splits.values()]), x)


@pytest.mark.parametrize("data", q1a.TURN)
def test_1a_floor_is_the_gaussians_cross_entropy(data):
    x = torch.from_numpy(q1a.make_points(data))
    assert torch.from_numpy(np.cov(x.T.numpy())).allclose(torch.from_numpy(q1a.true_covariance(data)), atol=0.2)
    entropy = math.log(2 * math.pi * math.e) + math.log(5)  # 4.4473 nats
    assert q1a.cross_entropy(data, x).mean().item() == pytest.approx(entropy, abs=0.01)


@pytest.mark.parametrize("data", q1a.TURN)
@pytest.mark.parametrize("decoder", q1a.DECODERS)
def test_1a_least_kl(data, decoder):
    expected = 0 if (data, decoder) == ("data1", "diagonal") else 0.5 * math.log(25)
    assert q1a.closed_form(q1a.true_covariance(data), decoder)[1] == pytest.approx(expected, abs=1e-6)


def test_1b_points_are_the_handouts():
    points, labels = q1b.make_points()
    assert points.shape == (99_999, 2) and np.bincount(labels).tolist() == [33_333] * 3
    for label, centre in ((0, (-1.5, 2.5)), (1, (1.5, 2.5)), (2, (0, -2 / math.pi))):
        assert points[labels == label].mean(0) == pytest.approx(centre, abs=0.01)
    rand = np.random.RandomState(0)
    a = np.array([-1.5, 2.5]) + 0.2 * rand.randn(33_333, 2)
    assert (points == a[0]).all(1).any()
    train, test = labels[:80_000], labels[80_000:]
    assert abs(np.bincount(train) / len(train) - np.bincount(test) / len(test)).max() < 0.02


def test_1b_true_density_integrates_to_one_and_fits_its_points_best():
    grid = torch.linspace(-3.5, 4, 151, dtype=torch.float64)
    p = q1b.true_log_prob(torch.cartesian_prod(grid, grid)).exp()
    assert p.sum().item() * 0.05**2 == pytest.approx(1, abs=1e-6)
    test = core.split_points("", q1b.make_points()[0]).splits["test"]
    assert core.bits_per_dim(-q1b.true_log_prob(test).mean().item(), 2) == pytest.approx(0.955, abs=0.001)
    assert core.bits_per_dim(-q1b.true_log_prob(test[:100]).mean().item(), 2) == pytest.approx(0.985, abs=0.001)
    assert q1b.true_log_prob(test + 0.1).mean() < q1b.true_log_prob(test).mean() - 0.05


# ----------------------------------------------------------------------------------------------------- a user's file


def options(data, root, limit=None, evaluate=None):
    return argparse.Namespace(data=str(data), data_root=str(root), seed=0, limit=limit, evaluate=None)


def images(n):
    return np.random.RandomState(n).randint(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def test_npz_with_three_splits(tmp_path):
    np.savez(tmp_path / "x.npz", train=images(5), valid=images(3), test=images(2), labels=np.arange(10))
    data = core.load_images(options(tmp_path / "x.npz", tmp_path))
    assert data.name == "x.npz" and [len(x) for x in data.splits.values()] == [5, 3, 2]
    assert np.array_equal(data.splits["valid"].permute(0, 2, 3, 1).numpy(), images(3))
    assert data.splits["train"].dtype == torch.uint8 and data.splits["train"].shape[1:] == (3, 32, 32)


def test_npz_with_one_array_is_split_by_the_seed_without_overlap(tmp_path):
    np.savez(tmp_path / "x.npz", images=images(20))
    splits = core.load_npz(tmp_path / "x.npz", seed=1)
    assert [len(x) for x in splits] == [16, 2, 2]
    assert len(np.unique(np.concatenate(splits).reshape(20, -1), axis=0)) == 20
    assert not np.array_equal(core.load_npz(tmp_path / "x.npz", seed=2)[2], splits[2])


def test_data_hash_sees_one_changed_pixel(tmp_path):
    np.savez(tmp_path / "x.npz", images=images(20))
    data = core.load_images(options(tmp_path / "x.npz", tmp_path))
    before = data.describe()["sha256"]
    data.splits["test"][0, 0, 0, 0] ^= 1
    assert data.describe()["sha256"] != before


# -------------------------------------------------------------------------------------------------------------- SVHN


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A local server of small files in SVHN's official layout, and torchvision told their addresses and checksums."""
    served = tmp_path / "served"
    served.mkdir()
    splits = {}
    for split, n in (("train", 40), ("test", 8)):
        file = f"{split}_32x32.mat"
        labels = np.arange(n)[:, None] % 10 + 1
        scipy.io.savemat(served / file, {"X": images(n).transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
        splits[split] = [None, file, hashlib.md5((served / file).read_bytes()).hexdigest()]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for split in splits.values():
        split[0] = f"http://127.0.0.1:{server.server_port}/{split[1]}"
    monkeypatch.setattr(SVHN, "split_list", splits)
    yield server
    server.shutdown()
    server.server_close()


def test_svhn_is_downloaded_checked_and_split_by_a_fixed_permutation(tmp_path, official):
    train, valid, test = core.load_svhn(tmp_path / "data")
    assert [len(x) for x in (train, valid, test)] == [36, 4, 8]
    assert np.array_equal(test, images(8))  # channels last, in the file's order
    both = np.concatenate([train, valid]).reshape(40, -1)
    assert np.array_equal(np.unique(both, axis=0), np.unique(images(40).reshape(40, -1), axis=0))
    assert not np.array_equal(valid, images(40)[36:])  # not simply the end of the file
    assert np.array_equal(core.load_svhn(tmp_path / "data")[1], valid)
    assert sum(core.SVHN_SIZES[:2]) == 73_257 and core.SVHN_SIZES[1] == round(73_257 / 10)


def test_a_broken_svhn_file_is_fetched_again_and_without_network_is_an_error(tmp_path, official, capsys):
    root = tmp_path / "data"
    expected = core.load_svhn(root)
    whole = (root / "train_32x32.mat").read_bytes()
    (root / "train_32x32.mat").write_bytes(whole[:-100])
    assert np.array_equal(core.load_svhn(root)[0], expected[0])
    (root / "train_32x32.mat").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    official.shutdown()
    official.server_close()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        core.load_svhn(root)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert all(word in message for word in ("train_32x32.mat", "test_32x32.mat", str(root), "--data synthetic"))


# --------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_images_are_reproducible_and_as_compressible_as_svhn():
    x = core.synthetic_images(300)
    assert np.array_equal(x[:20], core.synthetic_images(20))
    assert x.shape == (300, 32, 32, 3) and x.dtype == np.uint8
    assert np.array_equal(x, core.synthetic_images(300)) and not np.array_equal(x, core.synthetic_images(300, seed=1))
    images = torch.from_numpy(x).permute(0, 3, 1, 2)
    assert core.codec_bits_per_dim(images, "PNG") == pytest.approx(4.53, rel=0.15)  # genuine SVHN's, on 1,083 images
    assert core.codec_bits_per_dim(images, "WebP", quality=100, method=6) == pytest.approx(3.40, rel=0.15)
    assert x.mean((0, 1, 2)) == pytest.approx([114.8, 116.2, 122.6], abs=6)  # of 1,295 genuine images
    assert x.std((0, 1, 2)) == pytest.approx([51.7, 53.0, 52.4], abs=6)


def test_codecs_cost_of_noise_is_8_bits_or_more_and_a_lossy_one_is_refused():
    noise = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (4, 3, 32, 32)).astype(np.uint8))
    for codec in ("PNG", "WebP"):
        assert 8 <= core.codec_bits_per_dim(noise, codec) < 8.5
        assert core.codec_bits_per_dim(torch.full_like(noise, 7), codec) < 0.5
    with pytest.raises(ValueError, match="JPEG did not give back the image"):
        core.codec_bits_per_dim(noise, "JPEG")


def test_synthetic_set_is_kept_and_read_back(tmp_path):
    made = core.load_synthetic(tmp_path, (30, 5, 5))
    assert [len(x) for x in made] == [30, 5, 5] and (tmp_path / "synthetic_v1.npz").exists()
    again = core.load_synthetic(tmp_path, (30, 5, 5))
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    data = core.load_images(options("synthetic", tmp_path / "none", limit=20))
    assert [len(x) for x in data.splits.values()] == [20, 2, 2] and "synthetic" in data.name and "20" in data.name
    assert not (tmp_path / "none").exists()


def test_1b_the_diagonal_model_starts_as_the_isotropic_one():
    torch.manual_seed(0)
    mlp = [core.GaussianMLP(q1b.HIDDEN, torch.nn.ReLU, n) for n in (2, 1)]
    start, x = core.VAE(*mlp, core.StandardNormal((2,))), torch.randn(50, 2)
    bounds = [core.evaluate(q1b.with_decoder(start, n), x) for n in (1, 2)]
    assert torch.allclose(bounds[0].recon, bounds[1].recon, atol=1e-5) and torch.equal(bounds[0].kl, bounds[1].kl)
    diagonal = q1b.with_decoder(start, 2)
    assert diagonal.decoder(torch.randn(3, 2))[1].shape == (3, 2)
    diagonal.decoder.net[-1].weight.data[3] += 1  # control: the two log stds are separate weights
    assert not torch.allclose(core.evaluate(diagonal, x).recon, bounds[0].recon, atol=1e-2)


def test_1b_a_torn_cluster_is_counted_and_codes_that_are_the_prior_miss_it_by_nothing():
    torch.manual_seed(0)
    labels, x = np.repeat([0, 1, 2], 1000), 0.1 * torch.randn(3000, 2)
    x[:500, 0] += 3  # half of cluster 0 lies elsewhere

    class Encoder(torch.nn.Module):
        def __init__(self, log_std):
            super().__init__()
            self.log_std = log_std

        def forward(self, x):
            return x, torch.full_like(x, self.log_std)

    def look(log_std, x):
        decoder = core.GaussianMLP((8,), torch.nn.ReLU)
        return q1b.look_at_codes(core.VAE(Encoder(log_std), decoder, core.StandardNormal((2,))), x, labels)

    z, found = look(-3, x)
    assert z.shape == (3000, 2) and found["pieces_of_clusters"] == [2, 1, 1]
    assert found["marginal_kl_bpd"][0] > 1  # far from the prior
    low, high = look(-1, math.sqrt(1 - math.exp(-2)) * torch.randn(3000, 2))[1]["marginal_kl_bpd"]
    assert low <= high and abs(low) < 0.05 and abs(high) < 0.05  # with the posterior's noise, N(0, I)
