"""Bad input: one line that names the culprit, exit status 2, no traceback, and nothing written or overwritten."""

import importlib
import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core
from conftest import refused

FLAGS = [  # script, flags, what the line has to name
    ("q1a", "--epoch 1", "--epoch"), ("q1b", "--epochs1", "--epochs1"), ("q2a", "--Epochs 1", "--Epochs"),
    ("q2b", "--batch 8", "--batch"), ("bonus", "--receptive 3", "--receptive"), ("q1a", "5", "5"),
    ("q2a", "--epochs", "--epochs"), ("q1b", "--data synthetic", "--data"), ("q2a", "--seeds 3", "--seeds"),
    ("q1a", "--batch-size 0", "--batch-size"), ("q1b", "--batch-size -4", "--batch-size"),
    ("q2a", "--batch-size 1.5", "--batch-size"), ("q2b", "--batch-size ten", "--batch-size"),
    ("q1a", "--batch-size 72001", "--batch-size"), ("q1a", "--smoke --batch-size 3601", "--batch-size"),
    ("q2a", "--data synthetic --limit 20 --batch-size 21", "--batch-size"),
    ("q1b", "--lr nan", "--lr"), ("q1b", "--lr inf", "--lr"), ("q1b", "--lr -1", "--lr"), ("q1a", "--lr 0", "--lr"),
    ("q2b", "--lr 1e6", "--lr"), ("bonus", "--lr fast", "--lr"), ("q1a", "--epochs -1", "--epochs"),
    ("q2b", "--epochs 2.5", "--epochs"), ("q1b", "--seed -1", "--seed"), ("q2a", "--seed x", "--seed"),
    ("q1a", "--seeds 0", "--seeds"), ("q1b", "--seeds 101", "--seeds"), ("q1b", "--samples 3", "--samples"),
    ("q2a", "--samples -1", "--samples"), ("q2b", "--compile", "--compile"), ("q2a", "--compare", "--compare"),
    ("q2a", "--muon-lr -1", "--muon-lr"), ("q2b", "--schedule x", "--schedule"), ("bonus", "--blind -1", "--blind"),
    ("q2a", "--device tpu", "--device"), ("q2b", "--device cuda", "--device cuda"),
    ("bonus", "--device mps", "--device mps"), ("q2a", "--precision fp8", "--precision"),
    ("q2a", "--latents 0", "--latents"), ("bonus", "--latents 0", "--latents"), ("q2a", "--limit 5", "--limit"),
    ("q2b", "--limit 0", "--limit"), ("bonus", "--receptive-field 0", "--receptive-field"),
    ("bonus", "--receptive-field 99", "--receptive-field"), ("bonus", "--prior laplace", "--prior"),
    ("bonus", "--free-bits -1", "--free-bits"), ("bonus", "--table-epochs -1", "--table-epochs"),
    ("q2a", "--kl-warmup 1.5", "--kl-warmup"), ("bonus", "--kl-warmup x", "--kl-warmup"),
    ("q1b", "--kl-warmup 0.1", "--kl-warmup"), ("q1b", "--smoke --batch-size 3601", "--batch-size"),
    ("q2b", "--compare --evaluate checkpoint.pt", "--compare needs a training"),
    ("q2b", "--data synthetic --limit 20 --batch-size 21", "--batch-size"),
    ("bonus", "--data synthetic --limit 20 --batch-size 21", "--batch-size"),
]  # fmt: skip


def images(n, dtype=np.uint8, shape=(32, 32, 3)):
    return np.zeros((n, *shape), dtype=dtype)


def spread(low, high, *shape):
    """30 different images whose values go from low to high."""
    x = np.linspace(low, high, 30 * np.prod(shape), dtype=np.float32)
    return np.random.RandomState(0).permutation(x).reshape(30, *shape)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Code:
    """Unpickling this would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


FILES = {  # data files by what is wrong with them: bytes, and what the line has to name
    "missing.npz": (None, "No such file"),
    "missing_folder": (None, "there is no such file"),
    "truncated.npz": (npz(images=images(30))[:-200], "truncated.npz"),
    "text.npz": (b"these are no images", "text.npz"),
    "empty.npz": (b"", "empty.npz"),
    "bad_zip.npz": (npz(images=images(30)).replace(b"\x00" * 64, b"\x01" * 64, 1), "bad_zip.npz"),
    "no_keys.npz": (npz(), "found no images"),
    "labels.npz": (npz(y=np.zeros(3072), one_hot=np.zeros((30, 10))), "found no images"),
    "two_sets.npz": (npz(a=images(30), b=images(20), y=np.zeros(30)), "found a [30, 32, 32, 3], b [20, 32, 32, 3]"),
    "no_test.npz": (npz(train=images(30), valid=images(5)), "found train [30, 32, 32, 3], valid [5, 32, 32, 3]"),
    "only_test.npz": (npz(test=images(30)), "found test [30, 32, 32, 3]"),
    "twice.npz": (npz(train=images(30), x_train=images(30), test=images(5)), "found train [30, 32, 32, 3], x_train"),
    "none.npz": (npz(images=images(0)), "train split holds 0 images"),
    "few.npz": (npz(images=images(9)), "valid split holds 1 images"),
    "one_test.npz": (npz(train=images(30), valid=images(5), test=images(1)), "test split holds 1 images"),
    "no_valid.npz": (npz(train=images(30), valid=images(0), test=images(5)), "valid split holds 0 images"),
    "few_to_train.npz": (npz(x_train=images(9), x_test=images(5)), "valid split holds 1 images"),
    "objects.npz": (npz(images=np.array([Code()] * 30, dtype=object)), "objects.npz"),
    "pickle.npz": (pickle.dumps(Code()), "pickle.npz"),
    "pickle.pkl": (pickle.dumps(Code()), "a .pkl file"),
    "train_32x32.mat": (b"MATLAB 5.0 MAT-file", "for SVHN's own files: --data svhn --data-root ."),
    "one.PNG": (b"a picture", "for a folder of images: --data ."),
    "empty_folder": ([], "found no images"),
    "broken_folder": (["good.png", "broken.png"], "broken.png is no readable 8-bit image"),
    "deep_folder": (["good.png", "deep.png"], "deep.png is no readable 8-bit image (its levels have more than 8 bits)"),
    "small_folder": (["train/a.png", "test/b.png"], "split holds 0 images"),
    "mixed_folder": (["train/a.png", "test/b.png", "more/c.png"], "others [1, 32, 32, 3], test [1"),
    "not_an_archive_of_arrays.npz": (b"PK\x05\x06" + bytes(18), "found no images"),
}
OTHER_KINDS = {  # arrays of 30 images that are refused with a recipe: what the line has to name
    "floats from 0 to 1": (spread(0, 1, 32, 32, 3), "float32 [30, 32, 32, 3]"),
    "floats from -1 to 1": (spread(-1, 1, 3, 32, 32), "float32 [30, 3, 32, 32]"),
    "floats from 0 to 255": (spread(0, 255, 40, 32, 3), "float32 [30, 40, 32, 3]"),
    "integers": (spread(0, 255, 32, 32, 3).astype(np.int64), "int64 [30, 32, 32, 3]"),
    "grey": (spread(0, 255, 28, 28).astype(np.uint8), "uint8 [30, 28, 28]"),
    "grey, channels first": (spread(0, 255, 1, 28, 28).astype(np.uint8), "uint8 [30, 1, 28, 28]"),
    "grey floats, channels last": (spread(0, 1, 28, 28, 1), "float32 [30, 28, 28, 1]"),
    "black and white": (spread(0, 1, 28, 28) > 0.5, "bool [30, 28, 28]"),
    "transparent": (spread(0, 255, 32, 32, 4).astype(np.uint8), "uint8 [30, 32, 32, 4]"),
    "transparent, channels first": (spread(0, 255, 4, 32, 32).astype(np.uint8), "uint8 [30, 4, 32, 32]"),
    "flat": (spread(0, 255, 3072).astype(np.uint8), "uint8 [30, 3072]"),
    "flat floats": (spread(-1, 1, 3072), "float32 [30, 3072]"),
}
GOOD = {"script": "q2a", "args": {"latents": 4, "seed": 0}, "curves": {}, "finished": True, "state": {}}
CHECKPOINTS = {  # of --evaluate
    "missing.pt": None,
    "empty.pt": b"",
    "text.pt": b"no checkpoint",
    "pickle.pt": pickle.dumps(Code()),
    "list.pt": [1, 2],
    "no_keys.pt": {"state": {}},
    "other_script.pt": {**GOOD, "script": "q2b"},
    "other_network.pt": {**GOOD, "state": {"x": torch.zeros(1)}},
    "code.pt": {**GOOD, "state": Code()},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, in which every script has earlier results; afterwards all files must be as before."""
    monkeypatch.chdir(tmp_path)
    for script in ("q1a", "q1b", "q2a", "q2b", "bonus"):
        for folder in (Path("results", script), Path("results", "smoke", script)):
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text("earlier results")
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(folder, capsys, script, flags, culprit):
    before = snapshot(folder)
    message = refused(capsys, lambda: importlib.import_module(script).main(flags), culprit)
    assert snapshot(folder) == before
    return message


@pytest.mark.parametrize("script, flags, culprit", FLAGS, ids=[f"{s} {f}" for s, f, _ in FLAGS])
def test_flags(script, flags, culprit, folder, capsys):
    if ("cuda" in flags and torch.cuda.is_available()) or ("mps" in flags and torch.backends.mps.is_available()):
        pytest.skip("this machine has that device")
    assert_refused(folder, capsys, script, flags.split(), culprit)


@pytest.mark.parametrize("name", FILES)
def test_data_files(name, folder, capsys):
    content, culprit = FILES[name]
    if isinstance(content, list):
        Path(name).mkdir()
        for file in content:
            Path(name, file).parent.mkdir(exist_ok=True)
            Image.fromarray(images(1)[0]).save(Path(name, file))
        if "broken.png" in content:
            Path(name, "broken.png").write_bytes(b"no picture")
        if "deep.png" in content:
            Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(Path(name, "deep.png"))
    elif content is not None:
        Path(name).write_bytes(content)
    for script in ("q2a", "bonus"):
        assert_refused(folder, capsys, script, ["--data", name, "--epochs", "1", "--batch-size", "2"], culprit)


def typed(command, **names):
    """Run numpy's part of a refusal, as a user would; it makes images.npz, which is then read."""
    exec(command, {"np": np, **names})
    return core.load_own(Path("images.npz"), seed=0)[1]


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_an_array_of_another_kind_is_refused_with_a_recipe_that_works_when_typed(kind, folder, capsys):
    x, found = OTHER_KINDS[kind]
    Path("x.npz").write_bytes(npz(data=x))
    message = assert_refused(folder, capsys, "q2a", ["--data", "x.npz"], f"data is {found}, not uint8")
    splits = typed(message.split("make it so: ")[1], x=x)
    assert [len(split) for split in splits] == [24, 3, 3]
    levels = np.concatenate(splits)
    assert levels.min() < 20 and levels.max() > 235 and 110 < levels.mean() < 145  # all of the range is there
    assert len(np.unique(levels.reshape(30, -1), axis=0)) == 30
    with pytest.raises(SystemExit):  # control: without the recipe's other steps
        typed("np.savez('images.npz', images=x)", x=x)


@pytest.mark.parametrize("name", ["two_sets.npz", "pickle.pkl", "missing.npz", "objects.npz"])
def test_a_file_without_one_set_of_images_is_refused_with_a_command_that_makes_such_a_file(name, folder, capsys):
    if FILES[name][0]:
        Path(name).write_bytes(FILES[name][0])
    message = assert_refused(folder, capsys, "q2a", ["--data", name], name)
    splits = typed(re.search(r"np\.savez\(.*?\)", message)[0], x=images(30), y=images(3))
    assert sum(map(len, splits)) == (33 if "two" in name else 30) and len(splits[2]) == 3


def test_a_single_picture_is_refused_with_the_folders_name_which_is_then_taken(folder, capsys):
    Path("pictures").mkdir()
    for k, x in enumerate(images(30)):
        Image.fromarray(x).save(f"pictures/{k}.png")
    message = assert_refused(folder, capsys, "q2a", ["--data", "pictures/0.png"], "for a folder of images: --data")
    splits = core.load_own(Path(message.split("--data ")[-1].strip()), seed=0)[1]
    assert [len(x) for x in splits] == [24, 3, 3]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, folder, capsys):
    content = CHECKPOINTS[name]
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        torch.save(content, name)
    culprit = "of q2b, not of q2a" if name == "other_script.pt" else name
    assert_refused(folder, capsys, "q2a", ["--smoke", "--evaluate", name], culprit)


def test_a_truncated_checkpoint(folder, capsys):
    file = io.BytesIO()
    torch.save({**GOOD, "state": {"x": torch.zeros(1000)}}, file)
    Path("half.pt").write_bytes(file.getvalue()[:2000])
    assert_refused(folder, capsys, "q2a", ["--smoke", "--evaluate", "half.pt"], "half.pt")


@pytest.mark.parametrize("out", ["a_file", "a_file/below", "/proc/no_folder"])
def test_output_folders(out, folder, capsys):
    if out.startswith("/proc") and not Path("/proc").exists():
        pytest.skip("no folder here is known to refuse everyone")
    Path("a_file").write_text("not a folder")
    for script in ("q1a", "q2a"):
        assert_refused(folder, capsys, script, ["--smoke", "--out", out], out)


def test_broken_svhn_files(folder, capsys, offline):
    """A truncated file has the wrong checksum; there is no network here to mend it by (see also test_data.py)."""
    Path("data").mkdir()
    for name in ("train_32x32.mat", "test_32x32.mat"):
        Path("data", name).write_bytes(b"MATLAB 5.0 MAT-file" + bytes(1000))
    assert_refused(folder, capsys, "q2a", ["--epochs", "1"], "train_32x32.mat")


def test_controls_a_good_file_is_not_refused_and_the_pickles_hold_code_that_would_run(folder):
    Path("good.npz").write_bytes(npz(images=images(30)))
    _, (train, valid, test) = core.load_own(Path("good.npz"), seed=0)
    assert [len(x) for x in (train, valid, test)] == [24, 3, 3]
    torch.save(GOOD, "good.pt")
    assert core.read_checkpoint(Path("good.pt"), ("args", "state", "curves", "finished"), "q2a") == GOOD
    with pytest.raises(SystemExit):
        core.read_checkpoint(Path("good.pt"), ("args", "state", "curves", "finished"), "q2b")
    assert not Path("code_was_run").exists()
    for name in ("pickle.npz", "pickle.pt"):
        content = FILES[name][0] if name in FILES else CHECKPOINTS[name]
        pickle.loads(content)
        os.rmdir("code_was_run")
    torch.save(CHECKPOINTS["code.pt"], "code.pt")
    torch.load("code.pt", weights_only=False)
    os.rmdir("code_was_run")
    Path("objects.npz").write_bytes(FILES["objects.npz"][0])
    with np.load("objects.npz", allow_pickle=True) as file:
        file["images"]
    os.rmdir("code_was_run")
