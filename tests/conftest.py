"""What the tests share. They import core.py and the scripts from the folder above (pyproject.toml's pythonpath)."""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# One thread: the order of every sum is the same from run to run, and what runs in the background has a core left.
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import bonus
import core

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("q1a", "q1b", "q2a", "q2b", "bonus")


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def train(model, splits, **changes):
    """`core.fit` on a few small batches. changes: fields of the recipe, and fit's path, about, resume and name."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"path": Path(folder) / "checkpoint.pt", "about": {"script": "test", "args": {}}, "resume": False}
        options |= {key: changes.pop(key) for key in ("path", "about", "resume", "name") if key in changes}
        recipe = core.Recipe(**{"epochs": 3, "batch_size": 20, "lr": 3e-3} | changes)
        return core.fit(model, splits, recipe, **options)


class TinyEncoder(core.ConvEncoder):
    def __init__(self, channels):
        nn.Module.__init__(self)
        self.net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 2 * channels, 1))


class TinyDecoder(core.ConvDecoder):
    def __init__(self, channels, out_channels=6):
        nn.Module.__init__(self)
        self.net = nn.Sequential(nn.ConvTranspose2d(channels, out_channels, 4, 4))


def tiny_networks(setattr_):
    """For 2a, 2b and the bonus, where it does not matter what is trained."""
    for module in (core, bonus):
        setattr_(module, "ConvEncoder", TinyEncoder)
        setattr_(module, "ConvDecoder", TinyDecoder)


def run(*command, folder=ROOT, **environment):
    """A command of python in a process of its own."""
    command = [sys.executable, *map(str, command)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def refused(capsys, call, *words, status=2):
    """The one line on standard error with which call() ends the program; it holds all of the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    message = capsys.readouterr().err
    assert stop.value.code == status and message.startswith("error: ") and message.count("\n") == 1, message
    assert all(word in message for word in words), message
    return message


def noise_file(folder):
    """A file of 60 images of noise, which is made faster than synthetic ones: its path."""
    path = folder / "noise.npz"
    np.savez(path, np.random.RandomState(0).randint(0, 256, (60, 32, 32, 3), dtype=np.uint8))
    return str(path)


def results(folder, script):
    """What a run wrote into metrics.json."""
    return json.loads((folder / script / "metrics.json").read_text("utf-8"))


def pytest_collection_modifyitems(items):
    """Tests that wait for the smoke runs come last."""
    items.sort(key=lambda item: "smoke" in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def smoke_runs(request, tmp_path_factory):
    """A folder, and {script: future} of --smoke runs, one after the other, in processes beside the other tests."""
    out, futures = tmp_path_factory.mktemp("Größe"), {}
    with ThreadPoolExecutor(1) as pool:
        if any("smoke" in item.fixturenames for item in request.session.items):
            for script in ("q2a", "q2b", "q1a", "q1b", "bonus"):  # 2b is compared with the 2a that is there by then
                flags = ["--smoke", "--device", "cpu", "--out", out, *["--compare"] * (script == "q2b")]
                futures[script] = pool.submit(run, f"{script}.py", *flags)
        yield out / "smoke", futures
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def smoke(smoke_runs):
    """Of one --smoke run of every script: the folder of results, and what was printed. Tests do not write into it."""
    printed = {}
    for script, future in smoke_runs[1].items():
        done = future.result()
        assert done.returncode == 0, done.stderr
        printed[script] = done.stdout
    return smoke_runs[0], printed


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are neither drawn nor written, nor is anything sampled for them: most of a small run's time."""
    monkeypatch.setattr(core, "save_figure", lambda fig, path: plt.close(fig))
    for module, name in ((core, "save_grid"), (core, "draw_image_figures"), (bonus, "draw_figures")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
