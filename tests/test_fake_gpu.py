"""Everything a run does, on a GPU that is not there: torch's fake tensors have a device but no data.

Where tensors of two devices meet, an operation raises as it would on a real GPU, and so does `.numpy()` of a tensor
that is not on the CPU. Numbers are made up. Each script's own `main` runs, from the command line to the report.
"""

import argparse
import importlib

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import bonus
import core
import q1a
from conftest import SCRIPTS, results

FLAGS = {
    "q1a": ["--batch-size", "3600"], "q1b": ["--batch-size", "3600"], "q2a": ["--limit", "20"],
    "q2b": ["--limit", "20", "--compare"], "bonus": ["--limit", "20", "--receptive-field", "1"],
}  # fmt: skip


def made_up(x):
    """In place of a number that a fake tensor does not have."""
    return False if x.dtype == torch.bool else 0.5 if x.is_floating_point() else 0


def to_numpy(x, *, force=False):
    if x.device.type != "cpu":
        raise TypeError(f"can't convert {x.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor")
    if x.requires_grad:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
    if not isinstance(x, FakeTensor):
        return real_numpy(x)
    return np.full(tuple(x.shape), made_up(x), dtype=str(x.dtype).removeprefix("torch."))


real_numpy, real_getitem = Tensor.numpy, Tensor.__getitem__


def getitem(x, places):
    """With a mask of numpy's, as its places: how many they are cannot be told from a fake mask."""
    if isinstance(places, np.ndarray) and places.dtype == bool:
        places = torch.from_numpy(np.flatnonzero(places))
    return real_getitem(x, places)


def move(module, function, recurse=True):
    """nn.Module._apply with new parameters: torch's own would keep the old device of a fake one."""
    for child in module.children():
        move(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = function(buffer)
    return module


def deepcopied(x, memo):
    """Tensor.__deepcopy__ without a look at a fake tensor's storage, which has none."""
    if id(x) not in memo:
        copied = x.detach().clone()
        memo[id(x)] = nn.Parameter(copied, x.requires_grad) if isinstance(x, nn.Parameter) else copied
    return memo[id(x)]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the scripts can tell. No figure and no checkpoint is written."""
    monkeypatch.setattr(Tensor, "numpy", to_numpy)
    monkeypatch.setattr(Tensor, "__getitem__", getitem)
    monkeypatch.setattr(Tensor, "item", made_up)
    monkeypatch.setattr(Tensor, "tolist", lambda x: np.full(tuple(x.shape), made_up(x)).tolist())
    for name, kind in (("__float__", float), ("__int__", int)):
        monkeypatch.setattr(Tensor, name, lambda x, kind=kind: kind(made_up(x)))
    monkeypatch.setattr(Tensor, "__bool__", lambda x: False)
    monkeypatch.setattr(nn.Module, "_apply", move)
    monkeypatch.setattr(Tensor, "__deepcopy__", deepcopied)

    step = core.train_step

    def train_step(model, *more):
        def backward(loss):  # autograd's engine asks for a real GPU
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(Tensor, "backward", backward)
        return step(model, *more)

    monkeypatch.setattr(core, "train_step", train_step)
    wavefronts = core.wavefronts  # of these and other things that are done many times, a few are done here
    for module in (core, bonus):
        monkeypatch.setattr(module, "wavefronts", lambda *args: wavefronts(*args)[:3])
    monkeypatch.setattr(bonus, "RECEPTIVE_FIELDS", (2,))
    monkeypatch.setattr(q1a, "range", lambda *args: range(*args)[:3], raising=False)

    def jacrev(function, **_):
        return lambda z: torch.zeros(*function(z).shape, *z.shape, dtype=z.dtype, device=z.device)

    def lstsq(inputs, targets):
        return argparse.Namespace(solution=inputs.T @ targets)

    monkeypatch.setattr(torch.func, "jacrev", jacrev)  # these two have no fake form
    monkeypatch.setattr(torch.linalg, "lstsq", lstsq)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU that is not there")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(core, "choose_device", lambda name: "cuda")
    for module in (core, *map(importlib.import_module, SCRIPTS)):
        for name, stub in (("save_figure", lambda fig, path: plt.close(fig)), ("save_checkpoint", lambda *_: None)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stub)
    validate = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    yield
    torch.distributions.Distribution.set_default_validate_args(validate)


def run_on_gpu(script, out, *more):
    """The script's main, its training too."""
    module = importlib.import_module(script)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.main(["--smoke", "--epochs", "1", "--out", str(out), *FLAGS[script], *more])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_that_a_run_does_mixes_devices(script, gpu, tmp_path):
    run_on_gpu(script, tmp_path)  # what fails within `attempt` would end it with status 1
    metrics = results(tmp_path / "smoke", script)
    assert metrics["failed"] == {} and metrics["env"]["device"] == "cuda (a GPU that is not there)"
    report = (tmp_path / "smoke" / script / "report.md").read_text("utf-8")
    assert "Missing" not in report and "failed." not in report


def test_control_positions_left_on_the_cpu_are_found(gpu, tmp_path, monkeypatch, capsys):
    """A mistake that this code once made: a wavefront's rows on the CPU were added to a kernel's taps on the GPU."""
    wavefronts = core.wavefronts
    monkeypatch.setattr(core, "wavefronts", lambda height, width, slope, device: wavefronts(height, width, slope))
    monkeypatch.setitem(FLAGS, "q2b", ["--limit", "20", "--batch-size", "10"])
    with pytest.raises(SystemExit) as stop:
        run_on_gpu("q2b", tmp_path, "--epochs", "0")
    failed = results(tmp_path / "smoke", "q2b")["failed"]
    assert stop.value.code == 1 and {"samples.png", "interpolations.png", "the check of the prior"} <= set(failed)
    assert "device" in failed["samples.png"] and "cuda:0" in failed["samples.png"] and "cpu" in failed["samples.png"]
    assert "samples.png is missing" in capsys.readouterr().err


def test_control_a_buffer_left_on_the_cpu_is_found(gpu, tmp_path, monkeypatch):
    def without_buffers(module, function, recurse=True):
        for child in module.modules():
            buffers, child._buffers = child._buffers, {}
            for name, parameter in child._parameters.items():
                child._parameters[name] = None if parameter is None else nn.Parameter(function(parameter.detach()))
            child._buffers = buffers
        return module

    monkeypatch.setattr(nn.Module, "_apply", without_buffers)
    with pytest.raises(RuntimeError, match="device"):
        run_on_gpu("q2b", tmp_path, "--epochs", "0")


def test_control_numpy_refuses_what_is_not_on_the_cpu(gpu):
    with FakeTensorMode():
        x = torch.zeros(2, 3, device="cuda")
        assert x.cpu().numpy().shape == (2, 3)
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            x.numpy()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            np.asarray(x)
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(3)
