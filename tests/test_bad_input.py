"""Bad input: one line that names the culprit, exit status 2, no traceback, and nothing written or overwritten."""

import importlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import core
from conftest import ROOT

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
    ("q2a", "--latents 0", "--latents"), ("bonus", "--latents -1", "--latents"), ("q2a", "--limit 5", "--limit"),
    ("q2b", "--limit 0", "--limit"), ("bonus", "--receptive-field 0", "--receptive-field"),
    ("bonus", "--receptive-field 99", "--receptive-field"), ("bonus", "--prior laplace", "--prior"),
    ("bonus", "--free-bits -1", "--free-bits"), ("bonus", "--table-epochs -1", "--table-epochs"),
]  # fmt: skip


def images(n, dtype=np.uint8, shape=(32, 32, 3)):
    return np.zeros((n, *shape), dtype=dtype)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Code:
    """Unpickling this would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


FILES = {  # data files by what is wrong with them: bytes, and what the line has to name
    "missing.npz": (None, "missing.npz"),
    "truncated.npz": (npz(images=images(30))[:-200], "truncated.npz"),
    "text.npz": (b"these are no images", "text.npz"),
    "empty.npz": (b"", "empty.npz"),
    "bad_zip.npz": (npz(images=images(30)).replace(b"\x00" * 64, b"\x01" * 64, 1), "bad_zip.npz"),
    "no_keys.npz": (npz(), "images"),
    "other_keys.npz": (npz(x=images(30), y=np.zeros(30)), "images"),
    "two_splits.npz": (npz(train=images(30), test=images(30)), "['test', 'train']"),
    "only_test.npz": (npz(test=images(30)), "['test']"),
    "floats.npz": (npz(images=images(30, np.float32)), "float32"),
    "first.npz": (npz(images=images(30, shape=(3, 32, 32))), "[30, 3, 32, 32]"),
    "grey.npz": (npz(images=images(30, shape=(32, 32))), "[30, 32, 32]"),
    "large.npz": (npz(images=images(30, shape=(64, 64, 3))), "[30, 64, 64, 3]"),
    "none.npz": (npz(images=images(0)), "train split holds 0 images"),
    "one_test.npz": (npz(train=images(30), valid=images(5), test=images(1)), "test split holds 1 images"),
    "no_valid.npz": (npz(train=images(30), valid=images(0), test=images(5)), "valid split holds 0 images"),
    "objects.npz": (npz(images=np.array([Code()] * 30, dtype=object)), "objects.npz"),
    "pickle.npz": (pickle.dumps(Code()), "pickle.npz"),
    "folder.npz": (..., "folder.npz"),
    "not_an_archive_of_arrays.npz": (b"PK\x05\x06" + bytes(18), "images"),
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
        Path("results", script).mkdir(parents=True)
        Path("results", script, "report.md").write_text("earlier results")
        Path("results", "smoke", script).mkdir(parents=True)
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(folder, capsys, script, flags, culprit):
    before = snapshot(folder)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and culprit in message
    assert snapshot(folder) == before


@pytest.mark.parametrize("script, flags, culprit", FLAGS, ids=[f"{s} {f}" for s, f, _ in FLAGS])
def test_flags(script, flags, culprit, folder, capsys):
    if ("cuda" in flags and torch.cuda.is_available()) or ("mps" in flags and torch.backends.mps.is_available()):
        pytest.skip("this machine has that device")
    assert_refused(folder, capsys, script, flags.split(), culprit)


@pytest.mark.parametrize("name", FILES)
def test_data_files(name, folder, capsys):
    content, culprit = FILES[name]
    if content is ...:
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content)
    for script in ("q2a", "bonus"):
        assert_refused(folder, capsys, script, ["--data", name, "--epochs", "1", "--batch-size", "2"], culprit)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, folder, capsys):
    content = CHECKPOINTS[name]
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        torch.save(content, name)
    assert_refused(folder, capsys, "q2a", ["--smoke", "--evaluate", name], name)


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


def test_broken_svhn_files(folder, capsys):
    """A truncated file has the wrong checksum; there is no network here to mend it by (see also test_data.py)."""
    Path("data").mkdir()
    for name in ("train_32x32.mat", "test_32x32.mat"):
        Path("data", name).write_bytes(b"MATLAB 5.0 MAT-file" + bytes(1000))
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    before = snapshot(folder / "results")
    command = [sys.executable, str(ROOT / "q2a.py"), "--epochs", "1"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 2 and "train_32x32.mat" in last and "Traceback" not in run.stderr
    assert snapshot(folder / "results") == before


def test_controls_a_good_file_is_not_refused_and_the_pickles_hold_code_that_would_run(folder):
    assert len(FLAGS) + len(FILES) + len(CHECKPOINTS) > 60
    Path("good.npz").write_bytes(npz(images=images(30)))
    train, valid, test = core.load_npz(Path("good.npz"), seed=0)
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
