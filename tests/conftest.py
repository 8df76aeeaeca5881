"""What the tests share. They import core.py and the scripts from the folder above (pyproject.toml's pythonpath)."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

# One thread: the order of every sum is the same from run to run, and what runs in the background has a core left.
os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(signal, "SIGHUP"):  # nohup's, which the scripts respect
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
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
    with tempfile.TemporaryDirectory() as folder:
        usual = {"epochs": 3, "batch_size": 20, "lr": 3e-3, "path": Path(folder) / "checkpoint.pt", "run": {}}
        return core.fit(model, splits, **usual | changes)


def run(*command, folder=ROOT, **environment):
    """A command of python in a process of its own."""
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def refused(capsys, call, *words, status=2):
    """The one line on standard error with which call() ends the program; it holds all of the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    message = capsys.readouterr().err
    assert stop.value.code == status and message.startswith("error: ") and message.count("\n") == 1, message
    assert all(word in message for word in words), message
    return message


def image_args(script, *flags):
    """The arguments of an image script's smoke run."""
    defaults, smoke = (getattr(importlib.import_module(script), name) for name in ("DEFAULTS", "SMOKE"))
    return core.parse_args(core.ImageParser(script), ["--smoke", "--device", "cpu", *flags], defaults, smoke)[0]


def noise_file(folder):
    """A file of 60 images of noise, which is made faster than synthetic ones: its path."""
    path = folder / "noise.npz"
    np.savez(path, np.random.RandomState(0).randint(0, 256, (60, 32, 32, 3), dtype=np.uint8))
    return str(path)


def results(folder, script):
    """What a run wrote into metrics.json."""
    return json.loads((folder / script / "metrics.json").read_text("utf-8"))


def nowhere(folder):
    """Settings that a plain matplotlib fails with, a terminal of ASCII alone, and a torchvision for another torch."""
    (folder / "matplotlibrc").write_text("text.usetex: True\ntext.latex.preamble: \\nonsense\nfont.family: nothing\n")
    (folder / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    return {
        "MATPLOTLIBRC": str(folder / "matplotlibrc"), "MPLBACKEND": "module://no_such_backend",
        "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(folder),
    }  # fmt: skip


def pytest_collection_modifyitems(items):
    """Tests that wait for what is made in the background come last, in the order in which it is made."""

    def turn(item):
        if item.get_closest_marker("last"):
            return 3
        return 2 if "two_processes" in item.fixturenames else int("smoke" in item.fixturenames)

    items.sort(key=turn)


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """What takes long in processes of its own, made one after the other beside the tests that do not wait for it.

    {name: (folder, future)} of the scripts' --smoke runs, by the README's command, in an environment that asks for what
    is not there (`nowhere`), of tools/two_processes.py under torchrun, and of tools/kills.py. Nothing is made that no
    test asks for, and all of it is stopped if the tests are.
    """
    fixtures = {name for item in request.session.items for name in item.fixturenames}
    environment = os.environ | nowhere(tmp_path_factory.mktemp("settings"))
    smoke, two, kills = (tmp_path_factory.mktemp(name) for name in ("Größe", "two", "kills"))
    running = []

    def made(*command, **options):
        command = [sys.executable, *map(str, command)]
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True, **options))
        printed, errors = running[-1].communicate()
        return subprocess.CompletedProcess(command, running[-1].returncode, printed, errors)

    pool, futures = ThreadPoolExecutor(1), {}
    if "smoke" in fixtures:
        for script in ("q2a", "q2b", "q1a", "bonus", "q1b"):  # 2b is compared with the 2a that is there by then
            more = ["--compare"] if script == "q2b" else []
            command = (f"{script}.py", "--smoke", "--device", "cpu", "--out", smoke, *more)
            futures[script] = smoke, pool.submit(made, *command, env=environment)
    if "two_processes" in fixtures:
        noise_file(two)
        command = ("-m", "torch.distributed.run", "--nproc_per_node=2", "tests/tools/two_processes.py", two)
        futures["two_processes"] = two, pool.submit(made, *command)
    if "kills" in fixtures and sys.platform != "win32":
        noise_file(kills)
        futures["kills"] = kills, pool.submit(made, "tests/tools/kills.py", kills)
    yield futures
    pool.shutdown(wait=False, cancel_futures=True)
    for process in running:
        process.terminate()  # which torchrun hands on to its workers


@pytest.fixture(scope="session")
def smoke(background):
    """Of one --smoke run of every script: the folder of results, and what was printed. Tests do not write into it."""
    printed = {}
    for script in SCRIPTS:
        out, run = background[script][0], background[script][1].result()
        assert run.returncode == 0, run.stderr
        printed[script] = run.stdout
    return out / "smoke", printed


@pytest.fixture(scope="session")
def two_processes(background):
    """The folder of two_processes.py, and its process."""
    out, run = background["two_processes"]
    return out, run.result()


@pytest.fixture(scope="session")
def kills(background):
    """The process of kills.py."""
    return background["kills"][1].result()


@pytest.fixture
def offline(monkeypatch):
    """Whatever is fetched is asked of a proxy that is not there."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # one that has read other settings


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are made but not written."""
    for module in (core, *map(importlib.import_module, SCRIPTS)):
        if hasattr(module, "save_figure"):
            monkeypatch.setattr(module, "save_figure", lambda fig, path: plt.close(fig))


@pytest.fixture
def undrawn(unsaved, monkeypatch):
    """Nor is anything sampled for them, which takes most of a small run's time."""
    for script in ("q2a", "q2b", "bonus"):
        monkeypatch.setattr(importlib.import_module(script), "draw_figures", lambda *_: None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
