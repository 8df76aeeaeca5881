"""Bad input: one line that names the culprit, exit status 2, no traceback, and nothing written or moved."""

import importlib
import io
import os
import pickle
import signal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import core
from conftest import SCRIPTS, noise_file, refused

FLAGS = """q1a --epoch 1; q1b --epochs1; q2a --Epochs 1; q2b --batch 8; bonus --receptive 3; q1a 5; q2a --epochs
q1b --data synthetic; q1a --batch-size 0; q1b --batch-size -4; q2a --batch-size 1.5; q2b --batch-size ten
q1b --lr nan; q1b --lr inf; q1b --lr -1; q2b --lr 1e6; bonus --lr fast; q1a --epochs -1; q2b --epochs 2.5
q1b --seed -1; q2a --seed x; q1b --samples 3; q2a --samples -1; q2a --compare; q2a --muon-lr -1; bonus --blind -1
q2a --device tpu; q2b --device cuda; q2a --precision fp8; q2a --latents 0; q2a --limit 5; bonus --receptive-field 0
bonus --receptive-field 99; bonus --prior laplace; bonus --table-epochs -1; q2a --kl-warmup 1.5; q1b --kl-warmup 0.1
q1a --batch-size 72001; q1b --smoke --batch-size 3601; q2a --data noise.npz --batch-size 49
q2b --data noise.npz --batch-size 49; bonus --data noise.npz --limit 20 --batch-size 21
q2a --smoke --data noise.npz --out noise.npz; q1a --smoke --out noise.npz/below"""
CASES = [case.strip() for line in FLAGS.splitlines() for case in line.split(";")]


class Code:
    """Unpickling this would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def saved(content):
    file = io.BytesIO()
    np.savez(file, content) if isinstance(content, np.ndarray) else torch.save(content, file)
    return file.getvalue()


GOOD = {"script": "q2a", "args": {"latents": 2, "limit": None}, "data": "", "step": 0, "curves": {}}
GOOD |= {"state": {}, "weights": {}, "optimisers": []}
FILES = {  # by the flag that names them
    "--evaluate": {
        "empty.pt": b"", "text.pt": b"no checkpoint", "pickle.pt": pickle.dumps(Code()), "list.pt": saved([1, 2]),
        "no_keys.pt": saved({"state": {}}), "other_script.pt": saved(GOOD | {"script": "q2b"}),
        "code.pt": saved(GOOD | {"state": Code()}),
        "half.pt": saved(GOOD | {"state": {"x": torch.zeros(1000)}})[:2000], "missing.pt": None,
    },
    "--data": {
        "text.npz": b"no images", "pickle.npz": pickle.dumps(Code()), "missing.npz": None,
        "code.npz": saved(np.array([[[Code()]]] * 30, dtype=object)),
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with images of noise, in which every script has earlier results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core, "fit", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    noise_file(tmp_path)
    for path in (Path("results", inner, script) for script in SCRIPTS for inner in ("", "smoke")):
        path.mkdir(parents=True)
        (path / "metrics.json").write_text("earlier results")
    return tmp_path


def assert_refused(folder, capsys, script, flags, culprit):
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    refused(capsys, lambda: importlib.import_module(script).main(flags), culprit)
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before


@pytest.mark.parametrize("case", CASES)
def test_flags(case, folder, capsys):
    script, *flags = case.split()
    assert_refused(folder, capsys, script, flags, next(f for f in reversed(flags) if f.startswith("--") or f == "5"))


@pytest.mark.parametrize("flag, name", [(flag, name) for flag, files in FILES.items() for name in files])
def test_files_that_are_broken_or_of_something_else(flag, name, folder, capsys):
    if FILES[flag][name] is not None:
        Path(name).write_bytes(FILES[flag][name])
    assert_refused(folder, capsys, "q2a", ["--smoke", flag, name], "of q2b, not of q2a" if "script" in name else name)
    if flag == "--evaluate" and Path(name).exists():  # the same file as a run to go on with
        Path(name).rename("results/q2a/checkpoint.pt")
        assert_refused(folder, capsys, "q2a", ["--resume"], "checkpoint.pt")


def test_controls_a_good_checkpoint_is_read_and_the_pickles_hold_code_that_would_run(folder):
    Path("good.pt").write_bytes(saved(GOOD))
    assert core.read_checkpoint(Path("good.pt"), "q2a") == GOOD
    for name, load in (("pickle.pt", pickle.load), ("code.pt", lambda file: torch.load(file, weights_only=False))):
        load(io.BytesIO(FILES["--evaluate"][name]))
        os.rmdir("code_was_run")
    assert np.load(io.BytesIO(FILES["--data"]["code.npz"]), allow_pickle=True)["arr_0"] is not None
    assert Path("code_was_run").exists()


def test_a_lack_of_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which `launch` sets
    for error in (MemoryError(), RuntimeError("can't allocate memory"), torch.OutOfMemoryError("CUDA out of memory.")):
        run = Mock(side_effect=error)
        refused(capsys, lambda run=run: core.launch(run), "out of memory: lower --batch-size")
    with pytest.raises(RuntimeError, match="a mistake"):  # control: a mistake has its traceback
        core.launch(Mock(side_effect=RuntimeError("a mistake")))
