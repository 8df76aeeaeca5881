"""What the tests share. They import core.py and the scripts from the folder above (pyproject.toml's pythonpath)."""

import importlib
import json
import os
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import core

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("q1a", "q1b", "q2a", "q2b", "bonus")
matplotlib.use("agg")


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def train(model, splits, **changes):
    """`core.fit` on a few small batches, with changes."""
    return core.fit(model, splits, **{"epochs": 3, "batch_size": 20, "lr": 3e-3, **changes})


def run(*command, folder=ROOT, **environment):
    """A command of python in a process of its own."""
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def results(folder, script):
    """What a run wrote into metrics.json."""
    return json.loads((folder / script / "metrics.json").read_text("utf-8"))


def nowhere(folder):
    """Settings that a plain matplotlib fails with, and a terminal without letters beyond ASCII."""
    (folder / "matplotlibrc").write_text("text.usetex: True\ntext.latex.preamble: \\nonsense\nfont.family: nothing\n")
    backend = "module://no_such_backend"
    return {"MATPLOTLIBRC": str(folder / "matplotlibrc"), "MPLBACKEND": backend, "PYTHONIOENCODING": "ascii"}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Of one --smoke run of every script, by the README's command: the folder of results, and what was printed.

    In an environment that asks for what is not there (`nowhere`). Tests read it and do not write into it.
    """
    out = tmp_path_factory.mktemp("Größe")
    environment = nowhere(tmp_path_factory.mktemp("settings")) | {"OMP_NUM_THREADS": "1"}

    def run_all(scripts):
        return {s: run(f"{s}.py", "--smoke", "--device", "cpu", "--out", out, **environment) for s in scripts}

    with ThreadPoolExecutor(2) as pool:  # 2b compares itself with 2a, which has to be there first
        first, second = pool.map(run_all, (("q2a", "q2b", "q1a"), ("bonus", "q1b")))
    for done in (first | second).values():
        assert done.returncode == 0, done.stderr
    return out / "smoke", {script: done.stdout for script, done in (first | second).items()}


@pytest.fixture
def one_thread():
    """On which the order of every sum is the same from run to run."""
    with core.one_thread():
        yield


@pytest.fixture
def offline(monkeypatch):
    """Whatever is fetched is asked of a proxy that is not there."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # one that has read other settings


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not written, which takes most of a small run's time."""
    for module in (core, *map(importlib.import_module, SCRIPTS)):
        if hasattr(module, "save_figure"):
            monkeypatch.setattr(module, "save_figure", lambda fig, path: plt.close(fig))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
