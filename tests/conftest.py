"""What the tests share. They import core.py and the scripts from the folder above (pyproject.toml's pythonpath)."""

import argparse
import os
from pathlib import Path

import matplotlib
import pytest
import torch

import core

ROOT = Path(__file__).resolve().parent.parent
os.environ["MPLBACKEND"] = "agg"  # of the scripts that tests start
matplotlib.use("agg")


def arguments(**changes):
    """What `fit` needs of a command line, with changes."""
    few = dict(epochs=3, batch_size=20, lr=3e-3, precision="fp32", seed=0, clock=core.Clock())
    return argparse.Namespace(**{**few, **changes})


@pytest.fixture
def one_thread():
    """On which the order of every sum is the same from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
