"""Tests import core.py and the scripts from the folder above, whatever folder pytest starts in."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["MPLBACKEND"] = "agg"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
