"""The data sets: a user's file, SVHN by torchvision's reader, and the synthetic stand-in."""

import argparse
import hashlib
import http.server
import shutil
import threading

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import SVHN

import core
from conftest import refused


def test_points_are_split_in_order_without_overlap():
    x = np.arange(2000.0).reshape(1000, 2)
    data = core.split_points("x", x)
    assert [len(s) for s in data.splits.values()] == [720, 80, 200]
    assert np.array_equal(np.concatenate([s.numpy() for s in data.splits.values()]), x)


# ----------------------------------------------------------------------------------------------------- a user's file


def options(data, root, limit=None, evaluate=None):
    return argparse.Namespace(data=str(data), data_root=str(root), seed=0, limit=limit, evaluate=evaluate)


def images(n):
    return np.random.RandomState(n).randint(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def load(path, **more):
    """The data's name, and its splits as arrays, channels last."""
    data = core.load_images(options(path, path, **more))
    return data.name, {k: x.permute(0, 2, 3, 1).numpy() for k, x in data.splits.items()}


def assert_same_images(found, expected):
    """In any order."""
    found, expected = (np.unique(x.reshape(len(x), -1), axis=0) for x in (found, expected))
    assert np.array_equal(found, expected)


def test_npz_with_three_splits(tmp_path):
    np.savez(tmp_path / "x.npz", train=images(5), valid=images(3), test=images(2), labels=np.arange(10))
    data = core.load_images(options(tmp_path / "x.npz", tmp_path))
    assert data.name == "x.npz" and [len(x) for x in data.splits.values()] == [5, 3, 2]
    assert np.array_equal(data.splits["valid"].permute(0, 2, 3, 1).numpy(), images(3))
    assert data.splits["train"].dtype == torch.uint8 and data.splits["train"].shape[1:] == (3, 32, 32)


def test_one_array_under_any_key_is_split_by_the_seed_without_overlap(tmp_path):
    np.savez(tmp_path / "x.npz", pictures=images(20), y=np.arange(20), one_hot=np.eye(20))
    name, splits = core.load_own(tmp_path / "x.npz", seed=1)
    assert name == "x.npz, split 80/10/10" and [len(x) for x in splits] == [16, 2, 2]
    assert_same_images(np.concatenate(splits), images(20))
    assert not np.array_equal(core.load_own(tmp_path / "x.npz", seed=2)[1][2], splits[2])
    np.save(tmp_path / "x.npy", images(20))
    name, again = core.load_own(tmp_path / "x.npy", seed=1)
    assert name == "x.npy, split 80/10/10" and all(np.array_equal(*pair) for pair in zip(splits, again, strict=True))


@pytest.mark.parametrize(
    "key, split",
    [
        ("train", "train"), ("x_train", "train"), ("X_TRAIN", "train"), ("train_images", "train"),
        ("train2017", "train"), ("Training", "train"), ("val", "valid"), ("valid", "valid"), ("x_val", "valid"),
        ("Validation", "valid"), ("val_images", "valid"), ("test", "test"), ("test_x", "test"),
        ("testing", "test"), ("arr_0", ""), ("images", ""), ("latest", ""), ("trainer", ""), ("value", ""), ("", ""),
    ],
)  # fmt: skip
def test_a_split_is_told_by_a_whole_word_of_an_arrays_or_a_folders_name(key, split):
    assert core.split_of(key) == split


def test_other_key_names_are_taken_for_their_splits_and_labels_are_left_out(tmp_path):
    labels = dict(y_train=np.arange(3072), train_labels=np.arange(10)[:, None], one_hot_test=np.eye(5))
    np.savez(tmp_path / "x.npz", train_images=images(10), val_images=images(4), test_images=images(5), **labels)
    name, splits = load(tmp_path / "x.npz")
    assert name == "x.npz"
    assert all(np.array_equal(splits[k], images(n)) for k, n in (("train", 10), ("valid", 4), ("test", 5)))


def test_without_validation_a_tenth_of_train_is_kept_for_it_and_test_stays_as_it_is(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=images(40), x_test=images(8))
    name, splits = load(tmp_path / "x.npz")
    assert name == "x.npz, a tenth of train kept for validation" and np.array_equal(splits["test"], images(8))
    assert [len(x) for x in splits.values()] == [36, 4, 8]
    assert_same_images(np.concatenate([splits["train"], splits["valid"]]), images(40))
    assert not np.array_equal(splits["valid"], images(40)[36:])  # not simply the end of the file
    assert not np.array_equal(core.load_own(tmp_path / "x.npz", seed=1)[1][1], splits["valid"])


@pytest.mark.parametrize("axes", [(0, 3, 1, 2), (1, 2, 3, 0)], ids=["channels first", "as in SVHN's files"])
def test_channels_may_come_first_or_the_images_last(axes, tmp_path):
    np.savez(tmp_path / "x.npz", train=images(20).transpose(axes), test=images(5).transpose(axes))
    name, splits = load(tmp_path / "x.npz")
    assert name == "x.npz, channels moved last, a tenth of train kept for validation"
    assert np.array_equal(splits["test"], images(5))
    assert not np.array_equal(splits["test"], images(5).transpose(0, 2, 1, 3))  # control: rows for columns


def test_images_of_another_size_are_resized(tmp_path):
    x = np.random.RandomState(0).randint(0, 256, (20, 3, 40, 48), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", train=x, valid=x[:2], test=x[:3])
    name, splits = load(tmp_path / "x.npz")
    assert name == "x.npz, channels moved last, resized to 32 x 32 from 48 x 40"
    resized = [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((32, 32))) for image in x]
    assert np.array_equal(splits["train"], np.stack(resized))


def save_pictures(folder, x, names):
    for image, name in zip(x, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


def test_a_folder_of_pictures_is_read_with_all_below_it(tmp_path):
    """PNG is exact; a JPEG, and a grey picture, are made uint8 [32, 32, 3] too. What is no picture is left out."""
    folder = tmp_path / "photos"
    save_pictures(folder, images(18), [f"{'cats/' * (k % 3)}{k}.png" for k in range(18)])
    x = np.random.RandomState(0).randint(0, 256, (80, 64), dtype=np.uint8)
    save_pictures(folder, [np.stack([x] * 3, 2), x[:40]], ["dogs/a.JPG", "dogs/b.jpeg"])
    (folder / "notes.txt").write_text("no picture")
    (folder / "._0.png").write_bytes(b"what macOS leaves beside a picture")
    save_pictures(folder, images(1), [".thumbnails/0.png"])
    name, splits = load(folder)
    resized = "resized to 32 x 32 from 64 x 80 and other sizes"
    assert name == f"photos, a folder of 20 images, all made RGB, {resized}, split 80/10/10"
    assert [len(x) for x in splits.values()] == [16, 2, 2]
    found = {image.tobytes() for image in np.concatenate(list(splits.values()))}
    assert len(found) == 20 and {image.tobytes() for image in images(18)} <= found


def test_a_photograph_that_was_taken_upright_is_read_upright(tmp_path):
    picture, exif = Image.fromarray(images(1)[0]), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown, the picture is turned by 90 degrees
    save_pictures(tmp_path / "x", images(19), [f"{k}.png" for k in range(19)])
    picture.save(tmp_path / "x" / "turned.png", exif=exif)
    _, splits = load(tmp_path / "x")
    turned = images(1)[0].transpose(1, 0, 2)[:, ::-1]
    assert any(np.array_equal(turned, image) for image in np.concatenate(list(splits.values())))


def test_subfolders_named_for_splits_are_the_splits(tmp_path):
    for split, n in (("Training", 20), ("val", 3), ("test", 4)):
        save_pictures(tmp_path / "x", images(n), [f"{split}/digit {k % 2}/{k}.png" for k in range(n)])
    name, splits = load(tmp_path / "x")
    assert name == "x, a folder of 27 images"
    for split, n in (("train", 20), ("valid", 3), ("test", 4)):
        assert_same_images(splits[split], images(n))
    shutil.rmtree(tmp_path / "x" / "val")
    name, splits = load(tmp_path / "x")
    assert name == "x, a folder of 24 images, a tenth of train kept for validation"
    assert [len(x) for x in splits.values()] == [18, 2, 4]


def test_the_test_split_alone_will_do_where_nothing_is_trained(tmp_path):
    np.savez(tmp_path / "x.npz", x_test=images(5))
    save_pictures(tmp_path / "x", images(5), [f"test/{k}.png" for k in range(5)])
    for path in (tmp_path / "x.npz", tmp_path / "x"):
        _, splits = load(path, evaluate="checkpoint.pt")
        assert [len(x) for x in splits.values()] == [0, 0, 5]
        assert_same_images(splits["test"], images(5))
        with pytest.raises(SystemExit):
            load(path)


def test_what_was_done_to_the_images_is_printed_and_in_the_reports_first_lines(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", images(1000).transpose(0, 3, 1, 2))
    data = core.load_images(options(tmp_path / "x.npz", tmp_path, limit=30))
    name = "x.npz, channels moved last, split 80/10/10, at most 30 training images"
    assert data.name == name
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"reading {tmp_path / 'x.npz'}", f"data: {name}: 30 train, 3 valid, 3 test"]
    args = core.ImageParser("q2a").parse_args(["--precision", "fp32", "--latents", "1", "--lr", "1", "--muon-lr", "0"])
    metrics = {"args": vars(args), "data": data.describe(), "params": 1}
    metrics |= {"curves": {"epoch": [1], "seconds": 1}, "env": {"device": "cpu"}}
    assert core.training_text(metrics).startswith(f"Data: {name}: 30 training, 3 validation and 3 test images.")


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
    words = ("train_32x32.mat", "test_32x32.mat", str(root), "--data synthetic")
    refused(capsys, lambda: core.load_svhn(root), *words)


# --------------------------------------------------------------------------------------------------------- synthetic


def synthetic(n):
    return core.make_synthetic((n - 2, 1, 1))


def test_synthetic_images_are_reproducible_and_as_compressible_as_svhn():
    x = np.concatenate(synthetic(300))
    assert x.shape == (300, 32, 32, 3) and x.dtype == np.uint8
    assert np.array_equal(
        x[:20], np.concatenate(synthetic(20))
    )  # the stream does not depend on how much of it is taken
    other = next(iter(core.synthetic_batches(0, 20, seed=1)))[0]
    assert not np.array_equal(x[:20], other)
    assert len(np.unique(x.reshape(300, -1), axis=0)) == 300
    images = torch.from_numpy(x[:100]).permute(0, 3, 1, 2)
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


def test_the_synthetic_set_has_svhns_sizes_unless_it_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "SVHN_SIZES", (30, 5, 5))
    whole = core.load_images(options("synthetic", tmp_path / "none")).splits
    assert [len(x) for x in whole.values()] == [30, 5, 5]
    data = core.load_images(options("synthetic", tmp_path / "none", limit=20))
    assert [len(x) for x in data.splits.values()] == [20, 2, 2] and "synthetic" in data.name and "20" in data.name
    assert torch.equal(data.splits["train"], whole["train"][:20]) and not (tmp_path / "none").exists()
