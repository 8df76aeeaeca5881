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
RUNS = {  # of the bonus no samples are drawn, which takes most of the time; those of 2b are drawn by two processes too
    "q2b": [],
    "bonus": ["--limit", "32", "--free-bits", "0.05", "--table-epochs", "0", "--receptive-field", "1"],
}
PROGRAM = """import sys
import core, q2a, q2b, bonus
bonus.draw_figures = lambda *args: None
out = ["--out", sys.argv[1]]
try:
    q2a.main(["--smoke", "--batch-size", "15", *out])
except SystemExit as stop:
    print("status", stop.code)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes, first with a batch that cannot be shared, then as the scripts run: the folder, and the process."""
    folder = tmp_path_factory.mktemp("two")
    mains = ", ".join(f"{script}.main({[*FLAGS, *more]} + out)" for script, more in RUNS.items())
    (folder / "program.py").write_text(f"{PROGRAM}core.launch(lambda: ({mains}))\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", folder / "program.py", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return folder, subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("script", RUNS)
def test_two_processes_train_as_one(script, two, tmp_path, undrawn):
    folder, run = two
    importlib.import_module(script).main([*FLAGS, *RUNS[script], "--out", str(tmp_path)])
    assert run.returncode == 0, run.stderr
    folders = [tmp_path / "smoke" / script, folder / "smoke" / script]
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    for split in ("train", "valid", "test"):
        for key, values in one["curves"][split].items():
            assert two["curves"][split][key] == pytest.approx(values, rel=2e-3, abs=2e-4)
    first, last = (one["curves"]["test"]["neg_elbo_bpd"][k] for k in (0, -1))
    assert first != pytest.approx(last, rel=1e-2)
    one_files, two_files = ({path.relative_to(folder) for path in folder.rglob("*.*")} for folder in folders)
    figures = {path for path in two_files if path.suffix == ".png"}
    assert two_files - figures == one_files  # of which no figure was drawn
    report = (folders[1] / "report.md").read_text("utf-8")
    assert script == "bonus" or {path.name for path in figures} == set(re.findall(r"\((\w+\.png)\)", report))
    assert run.stdout.count("wrote ") == len(RUNS) and not list(folder.rglob("*.part"))
    states = [torch.load(f / "checkpoint.pt", weights_only=True)["state"] for f in folders]
    assert all((states[0][k] - states[1][k]).abs().max() < 2e-3 for k in states[0])


def test_what_cannot_be_shared_is_refused_in_one_line(two, tmp_path, monkeypatch, capsys):
    folder, run = two
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--batch-size 15 cannot be shared evenly by 2" in lines[0] and "status 2" in run.stdout
    assert not (folder / "smoke" / "q2a").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("q1a").main(["--smoke", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "not with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))
