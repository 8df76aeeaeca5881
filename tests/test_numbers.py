"""Bounds stay finite and in order whatever the images, and a disk that is full loses nothing."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bonus
import core
import q1a
from conftest import ROOT, arguments

MODELS = {
    "2a": lambda: core.ImageVAE(2, core.StandardNormal), "2b": lambda: core.ImageVAE(2, core.FlowPrior),
    "bonus": lambda: bonus.LossyVAE(2, 2, "flow"),
}  # fmt: skip
made = {}


def model_of(name):
    """An untrained model whose flow is not the identity, made once."""
    if name not in made:
        torch.manual_seed(0)
        model = MODELS[name]()
        if name != "2a":
            torch.nn.init.normal_(model.prior.net[-1].weight, std=0.02)
        made[name] = model.eval()
    return made[name]


def random_images(generator, n):
    """Images of different contrast, from constant to uniform noise."""
    contrast = torch.rand(n, 1, 1, 1, generator=generator)
    centre = 256 * torch.rand(n, 3, 1, 1, generator=generator)
    x = centre + 256 * contrast * (torch.rand(n, 3, 32, 32, generator=generator) - 0.5)
    return x.floor().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000))
def test_bounds_are_finite_ordered_and_depend_on_neither_batches_nor_order(name, seed, n, batch_size, noise_seed):
    generator = torch.Generator().manual_seed(seed)
    model, x = model_of(name), random_images(generator, n)
    terms = core.evaluate(model, x, seed=noise_seed)
    assert all(t.isfinite().all() and t.shape == (n,) for t in terms)
    order = torch.randperm(n, generator=generator)
    for other in (
        core.evaluate(model, x, batch_size, noise_seed).neg_elbo[order],
        core.evaluate(model, x[order], batch_size, noise_seed, places=order).neg_elbo,
    ):
        assert torch.allclose(other, terms.neg_elbo[order], rtol=1e-5, atol=1e-3)
    log_w = torch.stack([-core.evaluate(model, x, seed=noise_seed + k).neg_elbo for k in range(3)])
    assert (log_w.mean(0) <= core.iwae(log_w) + 1e-9).all()  # of the same samples: Jensen, for every image


def test_without_its_places_another_order_does_change_a_bound():
    x = random_images(torch.Generator().manual_seed(0), 4)
    there, back = (core.evaluate(model_of("2b"), y).neg_elbo for y in (x, x.flip(0)))
    assert not torch.allclose(back.flip(0), there, rtol=1e-5, atol=1e-3)


POISON = {
    "all 0": lambda n: torch.zeros(n, 3, 32, 32, dtype=torch.uint8),
    "all 255": lambda n: torch.full((n, 3, 32, 32), 255, dtype=torch.uint8),
    "constant": lambda n: torch.randint(0, 256, (n, 3, 1, 1), dtype=torch.uint8).expand(n, 3, 32, 32).contiguous(),
    "one image": lambda n: torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(n, 1, 1, 1),
    "a poisoned batch": lambda n: torch.cat(
        [torch.randint(0, 256, (n // 2, 3, 32, 32)), 255 * torch.randint(0, 2, (n - n // 2, 3, 32, 32))]
    ).to(torch.uint8),
}


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", MODELS)
def test_training_and_evaluation_survive_strange_images(name, poison):
    torch.manual_seed(0)
    splits = {k: POISON[poison](n) for k, n in (("train", 16), ("valid", 4), ("test", 4))}
    model = MODELS[name]()
    precision = core.choose_precision("auto", "cpu")
    curves = core.fit(model, splits, arguments(epochs=2, batch_size=4, lr=1e-3, precision=precision))
    assert curves["skipped_steps"] == 0 and torch.tensor(curves["test"]["neg_elbo_bpd"]).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_points_that_are_not_finite_stop_a_run_and_not_the_weights(value, capsys):
    """In the training set their steps are skipped; in an evaluated one no bound can be told, and the run says so."""

    def run(split):
        splits = {k: torch.randn(n, 2) for k, n in (("train", 200), ("valid", 20), ("test", 20))}
        splits[split][-1] = value
        mlps = [core.GaussianMLP((8,), torch.nn.SiLU) for _ in range(2)]
        model = core.VAE(*mlps, core.StandardNormal((2,)))
        args = arguments(epochs=2, batch_size=10, lr=1e-3)
        return model, lambda: core.fit(model, splits, args)

    model, fit = run("train")
    assert fit()["skipped_steps"] == 2  # one batch an epoch holds the point
    assert all(p.isfinite().all() for p in model.parameters())
    model, fit = run("valid")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit()
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.count("\n") == 1 and "epoch 0" in message


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("this machine mounts no tmpfs for us; test_resume.py has the same with a hook")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_nothing_is_lost_and_the_run_can_go_on(small_disk):
    flags = ["--smoke", "--out", str(small_disk / "results")]
    q1a.main(flags)
    folder = small_disk / "results/smoke/q1a"
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    flags += ["--resume", "--epochs", "3"]
    full = subprocess.run([sys.executable, str(ROOT / "q1a.py"), *flags], capture_output=True, text=True)
    lines = full.stderr.strip().splitlines()
    assert full.returncode == 1 and "No space left on device" in lines[-1] and str(folder) in lines[-1]
    assert "the one before is kept" in lines[0] and "Traceback" not in full.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    (small_disk / "filler").unlink()
    q1a.main(flags)
    curves = json.loads((folder / "metrics.json").read_text("utf-8"))["curves"]
    assert all(curve["epoch"] == [0, 1, 2, 3] for curve in curves.values())
