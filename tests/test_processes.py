"""torchrun with two processes on the CPU: the same batches, noise and bounds as one, and every file written once."""

import copy
import importlib
import json
import re

import pytest
import torch

import core
from conftest import noise_file, refused
from tools.two_processes import RUNS


def distance(a, b):
    """Between two sets of weights, over all of them."""
    return sum((a[name].double() - b[name].double()).square().sum() for name in a).sqrt().item()


@pytest.mark.parametrize("script", RUNS)
def test_two_processes_train_as_one(script, two_processes, tmp_path, undrawn, monkeypatch):
    (folder, run), module, begun = two_processes, importlib.import_module(script), []

    def fit(model, splits, **options):
        begun.append((copy.deepcopy(model), splits, options | {"path": tmp_path / "control.pt"}))
        return core.fit(model, splits, **options)

    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(module, "check_prior", lambda prior: 0.0)
    module.main([*RUNS[script], "--data", noise_file(tmp_path), "--out", str(tmp_path)])
    assert run.returncode == 0, run.stderr
    folders = [tmp_path / "smoke" / script, folder / "smoke" / script]
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    for split in ("train", "valid", "test"):
        for key, values in one["curves"][split].items():
            assert two["curves"][split][key] == pytest.approx(values, rel=2e-3, abs=2e-4)
    first, last = (one["curves"]["test"]["neg_elbo_bpd"][k] for k in (0, -1))
    assert first != pytest.approx(last, rel=5e-3)
    one_files, two_files = ({path.relative_to(folder) for path in folder.rglob("*.*")} for folder in folders)
    figures = {path for path in two_files if path.suffix == ".png"}
    assert two_files - figures == one_files  # of which no figure was drawn
    report = (folders[1] / "report.md").read_text("utf-8")
    assert script == "bonus" or {path.name for path in figures} == set(re.findall(r"\((\w+\.png)\)", report))
    assert run.stdout.count("wrote ") == len(RUNS) and not list(folder.rglob("*.part"))
    # The weights after the last step, against the way that training has moved them.
    of_one, of_two = (torch.load(f / "checkpoint.pt", weights_only=True)["progress"]["weights"] for f in folders)
    (model, splits, options), step = begun[0], core.train_step
    start = copy.deepcopy(model.state_dict())
    assert distance(of_one, of_two) < 0.01 * distance(of_one, start)
    if script == "q2b":  # control: one process's share of each batch, without the other's
        monkeypatch.setattr(core, "train_step", lambda a, b, x, *more: step(a, b, x[::2], *more))
        core.fit(model, splits, **options)
        assert distance(of_one, model.state_dict()) > 0.1 * distance(of_one, start)


def test_what_cannot_be_shared_is_refused_in_one_line(two_processes, tmp_path, monkeypatch, capsys):
    folder, run = two_processes
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--batch-size 15 cannot be shared evenly by 2" in lines[0] and "status 2" in run.stdout
    assert not (folder / "smoke" / "q2a").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        capsys, lambda: importlib.import_module("q1a").main(["--smoke", "--out", str(tmp_path)]), "not with torchrun"
    )
    assert not list(tmp_path.rglob("*.*"))
