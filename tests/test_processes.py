"""torchrun with two processes on the CPU: the same batches, noise and bounds as one, and every file written once."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

FLAGS = ["--smoke", "--device", "cpu", "--epochs", "2", "--precision", "fp32", "--muon-lr", "0", "--lr", "2e-4"]


UNDRAWN = """import core, bonus
bonus.draw_figures = lambda *args: None
core.launch(bonus.main)
"""


def run_two(path, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(path), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "script, more",
    [("q2b", []), ("bonus", ["--limit", "32", "--free-bits", "0.05", "--table-epochs", "0", "--receptive-field", "1"])],
)
def test_two_processes_train_as_one(script, more, tmp_path, undrawn):
    """Of the bonus no samples are drawn, which takes most of the time; those of 2b are drawn by two processes too."""
    path, module = ROOT / f"{script}.py", importlib.import_module(script)
    if script == "bonus":
        path = tmp_path / "undrawn.py"
        path.write_text(UNDRAWN)
    module.main([*FLAGS, *more, "--out", str(tmp_path / "one")])
    run = run_two(path, *FLAGS, *more, "--out", str(tmp_path / "two"))
    assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / out / "smoke" / script / "metrics.json").read_text()) for out in ("one", "two"))
    for split in ("train", "valid", "test"):
        for key, values in one["curves"][split].items():
            assert two["curves"][split][key] == pytest.approx(values, rel=2e-3, abs=2e-4)
    assert one["curves"]["test"]["neg_elbo_bpd"][0] != pytest.approx(
        one["curves"]["test"]["neg_elbo_bpd"][-1], rel=1e-2
    )
    folders = [tmp_path / out / "smoke" for out in ("one", "two")]
    one_files, two_files = ({path.relative_to(folder) for path in folder.rglob("*.*")} for folder in folders)
    figures = {path for path in two_files if path.suffix == ".png"}
    assert two_files - figures == one_files  # of which no figure was drawn
    report = (folders[1] / script / "report.md").read_text("utf-8")
    assert script == "bonus" or {path.name for path in figures} == set(re.findall(r"\((\w+\.png)\)", report))
    assert run.stdout.count("wrote ") == 1 and not list(tmp_path.rglob("*.part"))
    states = [torch.load(f / script / "checkpoint.pt", weights_only=True)["state"] for f in folders]
    assert all((states[0][k] - states[1][k]).abs().max() < 2e-3 for k in states[0])


def test_what_cannot_be_shared_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    run = run_two(ROOT / "q2a.py", "--smoke", "--batch-size", "15", "--out", str(tmp_path))
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode and len(lines) == 1 and "--batch-size 15 cannot be shared evenly by 2" in lines[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("q1a").main(["--smoke", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "not with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))
