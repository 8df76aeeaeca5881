"""The data sets: points, a user's files, SVHN by torchvision's reader, and the synthetic stand-in."""

import hashlib
import http.server
import threading
from functools import partial

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import SVHN

import core
from conftest import refused


def images(n, *size):
    return np.random.RandomState(n).randint(0, 256, (n, *(size or (32, 32)), 3), dtype=np.uint8)


def save(path, **splits):
    """Into an npz file with labels, or into PNG files folder/split/0.png, 1.png, ...: the path."""
    if path.suffix:
        np.savez(path, labels=np.arange(9), **splits)
    for split, x in splits.items() if not path.suffix else ():
        (path / split).mkdir(parents=True, exist_ok=True)
        for k, image in enumerate(x):
            Image.fromarray(image).save(path / split / f"{k}.png")
    return path


def load(path, limit=None, seed=0, only_test=False):
    """The data's name, and its splits as arrays, channels last."""
    data = core.load_images(str(path), "nowhere", limit, seed, only_test)
    return data.name, [x.permute(0, 2, 3, 1).numpy() for x in data.splits.values()]


def same_images(found, expected):
    return sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in expected)


def test_points_are_split_in_order_and_their_hash_sees_one_of_them():
    x = np.arange(2000.0).reshape(1000, 2)
    data = core.split_points("x", x, batch_size=1)
    assert [len(part) for part in data.splits.values()] == [720, 80, 200]
    assert np.array_equal(torch.cat(list(data.splits.values())), x)
    before = data.describe()["sha256"]
    data.splits["test"][0, 0] += 1
    assert data.describe()["sha256"] != before


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_a_users_splits_are_kept_and_missing_ones_are_made(suffix, tmp_path):
    x, y, z = images(20), images(3), images(4)
    for valid in ("valid", "val", "Validation"):
        path = save(tmp_path / f"{valid}{suffix}", train=x, test=z, **{valid: y})
        assert all(map(same_images, load(path)[1], (x, y, z)))
    name, (train, valid, test) = load(save(tmp_path / f"two{suffix}", train=x, test=z))
    assert "a tenth of train" in name and len(train) == 18 and same_images(test, z)
    assert same_images([*train, *valid], x) and not same_images(valid, x[18:])  # not the file's end
    name, splits = load(save(tmp_path / f"one{suffix}", pictures=x))
    assert "split 80/10/10" in name and list(map(len, splits)) == [16, 2, 2] and same_images(np.concatenate(splits), x)
    assert not same_images(splits[2], load(tmp_path / f"one{suffix}", seed=1)[1][2])
    assert list(map(len, load(save(tmp_path / f"tests{suffix}", test=z), only_test=True)[1])) == [0, 0, 4]


def test_arrays_with_channels_first_or_of_another_size_become_32_x_32(tmp_path):
    x, z, first = images(20, 40, 48), images(5), (0, 3, 1, 2)
    name, splits = load(save(tmp_path / "x.npz", train=x.transpose(first), valid=x[:2], test=z.transpose(first)))
    resized = np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in x])
    assert np.array_equal(splits[0], resized) and np.array_equal(splits[2], z) and "made RGB of 32 x 32" in name


def test_image_files_of_any_kind_are_read_upright_and_what_is_no_image_is_passed_over(tmp_path):
    x, exif = images(16), Image.Exif()
    for k, ending in enumerate((*["png", "bmp", "webp", "tif"] * 4, "jpg", "JPEG")):
        Image.fromarray(x[k % 16]).save(tmp_path / f"{k}.{ending}", lossless=True)
    Image.fromarray(x[0, :, :, 0]).save(tmp_path / "grey.png")
    exif[0x0112] = 6  # the camera was turned: to be shown, the picture is turned by 90 degrees
    Image.fromarray(x[1]).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "labels.csv").write_text("no image")
    (tmp_path / "._0.png").write_bytes(b"what macOS leaves beside an image")
    found = {image.tobytes() for image in np.concatenate(load(tmp_path)[1])}
    x = [*x, x[1].transpose(1, 0, 2)[:, ::-1], np.stack([x[0, :, :, 0]] * 3, 2)]
    assert len(found) == 20 and {image.tobytes() for image in x} <= found


def test_what_cannot_be_taken_is_refused_with_what_it_is_and_what_is_wanted(tmp_path, capsys):
    x, no_image = images(20), "7.png is no readable"
    for key, array in {"grey": x[..., 0], "wide": x.astype(float), "pickle": x.astype(object), "few": x[:5]}.items():
        save(tmp_path / f"{key}.npz", **{key: array})
    save(tmp_path / "no test", train=x, val=images(4))
    broken, text, deep = (save(tmp_path / name, x=x) / "x" / "7.png" for name in ("broken", "text", "deep"))
    broken.write_bytes(broken.read_bytes()[:500])
    text.write_bytes(b"no image")
    Image.fromarray(np.full((32, 32), 1000, np.uint16)).save(deep)
    for name, *words in (
        ("absent.npz", "No such file", "wanted: uint8 [N, height, width, 3]"), ("pickle.npz", "no readable npz file"),
        ("grey.npz", "grey is uint8 [20, 32, 32]", "wanted"), ("wide.npz", "wide is float64 [20, 32, 32, 3]", "wanted"),
        ("few.npz", "'few': 5", "two images or more"), ("text", no_image), ("deep", no_image, "more than 8 bits"),
        ("no test", "'train': 20, 'valid': 4", "wanted: sets train and test"), ("broken", no_image, "remove"),
    ):  # fmt: skip
        refused(capsys, partial(load, tmp_path / name), str(tmp_path / name), *words)


def test_svhn_is_downloaded_checked_and_split_by_a_fixed_permutation(tmp_path, monkeypatch, capsys):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server, splits, root = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler), {}, tmp_path / "data"
    for split, n in (("train", 40), ("test", 8)):
        path = tmp_path / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": images(n).transpose(1, 2, 3, 0), "y": np.arange(n)[:, None] % 10 + 1})
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        splits[split] = [url, path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", splits)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    train, valid, test = core.load_svhn(root)
    assert [len(train), len(valid)] == [36, 4] and np.array_equal(test, images(8))
    assert same_images([*train, *valid], images(40))
    assert not np.array_equal(valid, images(40)[36:])  # not the file's end
    (root / "train_32x32.mat").write_bytes(b"broken")
    assert np.array_equal(core.load_svhn(root)[1], valid)  # fetched again
    (root / "train_32x32.mat").write_bytes(b"broken")
    server.shutdown()
    server.server_close()
    refused(capsys, lambda: core.load_svhn(root), str(root), "test_32x32.mat", "--data synthetic")


def test_synthetic_images_are_those_of_the_published_runs_however_many_are_drawn():
    (x,) = core.make_synthetic((3000,))
    known = (179, 186, 50, 123, 111, 149, 75, 255, 143, 255, 140, 62, 173, 95, 0, 107)
    near = np.abs(x.reshape(-1)[::576_000].astype(int) - known) <= 2
    assert near.sum() >= 15  # of 16: another release of the fonts may move the edge of a digit
    assert all(map(np.array_equal, load("synthetic", limit=20)[1], np.split(x[:24], [20, 22])))


def test_codecs_cost_of_noise_is_8_bits_or_more_and_a_lossy_one_is_refused():
    noise = torch.from_numpy(images(4).transpose(0, 3, 1, 2))
    for codec in ("PNG", "WebP"):
        flat, full = (core.codec_bits_per_dim(x, codec) for x in (torch.full_like(noise, 7), noise))
        assert flat < 0.5 < 8 <= full
    with pytest.raises(ValueError, match="JPEG did not give back the image"):
        core.codec_bits_per_dim(noise, "JPEG")


def test_a_wall_without_tint_and_light_has_the_laws_colours():
    scenes = {name: torch.zeros_like(x) for name, x in core.draw_scenes(2, torch.Generator()).items()}
    scenes["z_wall"][1] = 1.0
    picture = core.render(scenes | {"u_left": torch.ones(2), "u_right": torch.ones(2)}, core.digit_atlas())
    assert picture[0, :, 0, 0].tolist() == pytest.approx([115, 116, 123], abs=1e-3)
    assert picture[1, :, 0, 0].tolist() == pytest.approx([150, 151, 158], abs=1e-3)
