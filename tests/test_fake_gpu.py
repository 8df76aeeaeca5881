"""Everything a run does, on a GPU that is not there: torch's fake tensors have a device but no data. What a step costs.

Where tensors of two devices meet, an operation raises as on a real GPU, and so does `.numpy()` of a tensor that is not
on the CPU. Numbers are made up. Each script's own `main` runs, from the command line to the report.
"""

import importlib
from collections import Counter, namedtuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bonus
import core
from conftest import SCRIPTS, results, train

FLAGS = {script: ["--limit", "20"] for script in SCRIPTS} | {key: ["--batch-size", "3600"] for key in ("q1a", "q1b")}
FLAGS["q2b"], FLAGS["bonus"] = ["--limit", "20", "--compare"], ["--limit", "20", "--receptive-field", "1"]
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")
real_numpy, last, count, waits = Tensor.numpy, torch.channels_last, Counter(), []  # see `Operations`


def made_up(x):
    """In place of a number that a fake tensor does not have."""
    waits.extend(["a number"] * x.is_cuda)
    return False if x.dtype == torch.bool else 0.5 if x.is_floating_point() else 0


def to_numpy(x, *, force=False):
    if x.is_cuda or x.requires_grad:
        raise TypeError(f"can't convert {x.device} device type tensor, or one that requires grad, to numpy")
    made = np.full(tuple(x.shape), made_up(x), dtype=str(x.dtype).removeprefix("torch."))
    return made if isinstance(x, FakeTensor) else real_numpy(x)


def move(module, function, recurse=True, buffers=True):
    """nn.Module._apply with new parameters: torch's own would keep the old device of a fake one."""
    for child in module.modules():
        for name, p in child._parameters.items():
            child._parameters[name] = None if p is None else nn.Parameter(function(p.detach()), p.requires_grad)
        if buffers:
            child._buffers.update({name: function(buffer) for name, buffer in child._buffers.items()})
    return module


def deepcopied(x, memo):  # without a look at a fake tensor's storage, which has none
    return memo.setdefault(id(x), x.detach().clone().requires_grad_(x.requires_grad))


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the scripts can tell. No figure and no checkpoint is written."""
    step, fronts = core.train_step, bonus.wavefronts

    def train_step(model, *more):
        assert all(p.is_contiguous(memory_format=last) for p in model.parameters() if p.ndim == 4)

        def backward(loss):  # autograd's engine asks for a real GPU
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None

        monkeypatch.setattr(Tensor, "backward", backward)
        step(model, *more)

    for place, name, stub in (
        (Tensor, "numpy", to_numpy), (Tensor, "item", made_up), (Tensor, "__deepcopy__", deepcopied),
        (Tensor, "tolist", lambda x: np.full(tuple(x.shape), made_up(x)).tolist()),
        (Tensor, "__bool__", lambda x: bool(made_up(x))), (Tensor, "__float__", lambda x: float(made_up(x))),
        (torch, "equal", lambda a, b: (a == b).all() is not None), (torch.cuda, "get_device_name", lambda: "not there"),
        (torch.func, "jacrev", lambda f, **_: lambda z: z.new_zeros(*f(z).shape, *z.shape)),  # it and lstsq have no
        (torch.linalg, "lstsq", lambda a, b: namedtuple("Found", "solution")(a.T @ b)),  # fake form
        (torch.distributions.Distribution, "_validate_args", False), (nn.Module, "_apply", move),
        (core, "train_step", train_step), (core, "choose_machine", lambda *_, **__: ("cuda", "bf16")),
        (core, "save_progress", lambda *_: None), (core, "save_figure", lambda fig, path: plt.close(fig)),
        (bonus, "wavefronts", lambda slope: fronts(slope)[:2]), (bonus, "RECEPTIVE_FIELDS", (2,)),  # a few of many
    ):  # fmt: skip
        monkeypatch.setattr(place, name, stub)


def run_on_gpu(script, out, *more):
    with FakeTensorMode(allow_non_fake_inputs=True):
        importlib.import_module(script).main(["--smoke", "--epochs", "1", "--out", str(out), *FLAGS[script], *more])


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_that_a_run_does_mixes_devices(script, gpu, tmp_path):
    run_on_gpu(script, tmp_path)
    assert results(tmp_path / "smoke", script)["env"]["device"] == "cuda (not there)"


def test_controls_what_is_on_the_wrong_device_is_found(gpu, tmp_path, monkeypatch):
    mistakes = [(nn.Module, "_apply", lambda *args: move(*args, buffers=False))]
    mistakes.append((core, "noise", lambda kind, shape, *_: kind(shape)))
    mistakes.append((core, "bin_centres", np.asarray))
    for mistake in mistakes:
        with monkeypatch.context() as patch, pytest.raises((RuntimeError, TypeError), match="device"):
            patch.setattr(*mistake)
            run_on_gpu("q2b", tmp_path, "--epochs", "0")


class Operations(TorchDispatchMode):
    """Counts operations, views left out; and notes those that a CPU has to wait for, as `made_up` does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        count[func.name()] += not func.is_view
        if isinstance(result, Tensor) and not result.is_cuda and any(isinstance(x, Tensor) and x.is_cuda for x in args):
            waits.append(func.name())
        return result


def test_between_two_evaluations_a_training_waits_for_no_number(gpu, monkeypatch):
    """Controls: a loss that asks, in each of the last three steps."""
    monkeypatch.setattr(core, "sha256_of", lambda _: waits.clear() or "")
    monkeypatch.setattr(core, "add_to_curves", lambda *_: True)
    asks, waited = iter((None, None, None, "item", "__bool__", "cpu")), []

    def asking(*args):
        waited.append(len(waits))
        found, ask = loss(*args), next(asks)
        if ask:
            getattr(found, ask)()
        return found

    with FakeTensorMode(allow_non_fake_inputs=True), Operations():
        model = core.ImageVAE(2, core.FlowPrior).to("cuda").to(memory_format=last)
        loss = model.loss
        model.loss = asking
        splits = dict.fromkeys(core.SPLITS, torch.zeros(12, 3, 32, 32, dtype=torch.uint8, device="cuda"))
        train(model, splits, epochs=2, batch_size=4, muon_lr=0.01, kl_warmup=0.5, precision="bf16")
    assert [*waited, len(waits)] == [0, 0, 0, 0, 1, 2, 3]


def test_a_step_of_2b_at_batch_16_has_at_most_750_operations(monkeypatch):
    model, x = core.ImageVAE(16, core.FlowPrior).to(memory_format=last), torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    optimisers, at_once = core.make_optimisers(model, 2e-3, 0.012), core.orthogonalise
    for one_by_one in (False, True):  # control: each matrix alone
        if one_by_one:
            monkeypatch.setattr(core, "orthogonalise", lambda matrices: [at_once([x])[0] for x in matrices])
        count.clear()
        with Operations():
            core.train_step(model, optimisers, x, "fp32")
        assert (count.total() > 750) == one_by_one and count["aten::_local_scalar_dense"] == 0, count.most_common()
