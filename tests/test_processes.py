"""torchrun with two processes on the CPU: the same batches, noise and bounds as one, and every file written once."""

import importlib
import json
import re

import pytest
import torch

from two_processes import RUNS


@pytest.mark.parametrize("script", RUNS)
def test_two_processes_train_as_one(script, two_processes, tmp_path, undrawn):
    folder, run = two_processes
    importlib.import_module(script).main([*RUNS[script], "--out", str(tmp_path)])
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


def test_what_cannot_be_shared_is_refused_in_one_line(two_processes, tmp_path, monkeypatch, capsys):
    folder, run = two_processes
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--batch-size 15 cannot be shared evenly by 2" in lines[0] and "status 2" in run.stdout
    assert not (folder / "smoke" / "q2a").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("q1a").main(["--smoke", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "not with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))
