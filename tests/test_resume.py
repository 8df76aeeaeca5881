"""A run that was killed and resumed ends with the same bits as one that never was.

python -m pytest tests/test_resume.py                  20 kills in all
KILLS=100 python -m pytest tests/test_resume.py        the long version
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import pytest
import torch

import core
from conftest import ROOT, arguments

KILLS = int(os.environ.get("KILLS", 20))
SIZES = {  # epochs, and arguments that keep a run short; the longest first, for the pool
    "bonus": (2, ["--limit", "40", "--table-epochs", "1", "--batch-size", "20", "--receptive-field", "1"]),
    "q2b": (2, ["--limit", "40", "--compare"]), "q1b": (3, ["--batch-size", "300"]), "q2a": (2, ["--limit", "40"]),
}  # fmt: skip
# The server of new processes imports what they need once, and computes nothing itself.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
CONTEXT.set_forkserver_preload(["core", *SIZES])


def run_script(script, out, more, keep_seconds, log):
    """The script's main in this process, checkpoints every keep_seconds, what it prints in the file log.

    The short version leaves out pictures, and shortens a table and a curve: what is compared depends on none of them.
    """
    torch.set_num_threads(1)
    core.KEEP_SECONDS = keep_seconds
    module = importlib.import_module(script)
    if KILLS < 100:
        core.plot_image_model = lambda *_: None
        core.save_figure = module.save_figure = lambda fig, path: plt.close(fig)
        module.TABLE, module.COUNTS = ((1, None), (2, None)), (1, 100)  # of bonus, of q1b
    epochs, sizes = SIZES[script]
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        module.main(["--smoke", "--out", out, "--epochs", str(epochs), *sizes, *more])


def start(script, out, *more, keep_seconds=0.0):
    process = CONTEXT.Process(target=run_script, args=(script, str(out), more, keep_seconds, f"{out}.log"))
    process.start()
    return process


def outcome(script, out):
    """Weights and metrics, without what may differ: seconds and machine."""
    folder = out / "smoke" / script
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    metrics["args"].pop("out")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    flat = {}
    for name, value in state.items():
        flat.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return {k: v for k, v in metrics.items() if k not in ("seconds", "env")}, flat


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys() and all(torch.equal(found[1][k], expected[1][k]) for k in found[1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(tmp_path):
    for script in SIZES:
        (tmp_path / script).mkdir()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each waits for its own processes
        kills = list(pool.map(kill_and_resume, SIZES, [tmp_path / script for script in SIZES]))
    assert sum(kills) >= KILLS


def kill_and_resume(script, tmp_path):
    """Its share of KILLS at random moments, each followed by --resume; the number of kills."""
    whole = tmp_path / "whole"
    begin = time.monotonic()
    process = start(script, whole, keep_seconds=1e9)
    process.join()
    seconds = time.monotonic() - begin
    assert process.exitcode == 0, (tmp_path / "whole.log").read_text()
    moments, kills, runs, more = random.Random(f"{script} {KILLS}"), 0, 0, []
    while kills < KILLS / len(SIZES) or more:
        out = tmp_path / f"killed_{runs}"
        process = start(script, out, *more)
        process.join(moments.uniform(0, 0.7 * seconds) if kills < KILLS / len(SIZES) else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills, more = kills + 1, ["--resume"]
        else:
            assert process.exitcode == 0, (tmp_path / f"killed_{runs}.log").read_text()
            assert_same(outcome(script, out), outcome(script, whole))
            runs, more = runs + 1, []
    assert runs
    return kills


def wait_for(text, path, process):
    while text not in (path.read_text() if path.exists() else ""):
        assert process.is_alive()
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(number, status, tmp_path):
    log = tmp_path / "out.log"
    process = start("q2a", tmp_path / "out", "--epochs", "1000", keep_seconds=1e9)
    wait_for("epoch   1/", log, process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    last = log.read_text().splitlines()[-1]
    assert "--resume" in last and "q2a.pt" in last and "Traceback" not in log.read_text()
    saved = torch.load(tmp_path / "out/smoke/q2a/progress/q2a.pt", weights_only=True)["at"]
    assert saved["epoch"] >= 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of q2a, its folder."""
    out = tmp_path_factory.mktemp("finished")
    run_main("q2a", out)
    return out


def run_main(script, out, *more):
    epochs, sizes = SIZES[script]
    importlib.import_module(script).main(["--smoke", "--out", str(out), "--epochs", str(epochs), *sizes, *more])


def test_resume_trains_on_for_more_epochs_and_refuses_fewer(finished, capsys):
    run_main("q2a", finished, "--resume", "--epochs", "3")
    curves = json.loads((finished / "smoke/q2a/metrics.json").read_text("utf-8"))["curves"]
    assert curves["epoch"] == [0, 1, 2, 3] and "epoch   2/" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run_main("q2a", finished, "--resume", "--epochs", "1")
    assert stop.value.code == 2 and "--epochs 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, named",
    [
        (["--seed", "1"], "--seed"), (["--batch-size", "8"], "--batch-size"), (["--latents", "3"], "--latents"),
        (["--lr", "0.1"], "--lr"), (["--limit", "50"], "--limit, the data"), (["--precision", "fp32"], "--precision"),
    ],
)  # fmt: skip
def test_resume_with_other_arguments_is_refused_and_names_them(change, named, finished, capsys):
    if change == ["--precision", core.choose_precision("auto", "cpu")]:
        pytest.skip("that is what it was")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*")}
    with pytest.raises(SystemExit) as stop:
        run_main("q2a", finished, "--resume", "--epochs", "3", *change)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and named in message
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.*")} == before


def test_a_run_without_resume_sets_an_earlier_checkpoint_aside(finished, capsys):
    path = finished / "smoke/q2a/progress/q2a.pt"
    before = path.read_bytes()
    run_main("q2a", finished, "--epochs", "0")
    assert "q2a.old.pt; --resume would" in capsys.readouterr().out
    assert path.with_suffix(".old.pt").read_bytes() == before != path.read_bytes()
    path.with_suffix(".old.pt").replace(path)


def test_resume_refuses_a_broken_checkpoint(finished, capsys):
    path = finished / "smoke/q2a/progress/q2a.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit) as stop:
        run_main("q2a", finished, "--resume", "--epochs", "3")
    message = capsys.readouterr().err
    path.write_bytes(whole)
    assert stop.value.code == 2 and message.count("\n") == 1 and "q2a.pt: not a readable checkpoint" in message


def test_a_full_disk_costs_a_checkpoint_and_is_said(finished, monkeypatch, capsys):
    path = finished / "smoke/q2a/progress/q2a.pt"
    before = path.read_bytes()

    def full(path, write):
        if path.parent.name == "progress" and path.name != ".writable":
            part = path.with_name(path.name + ".part")
            part.write_bytes(b"half")
            part.unlink()
            raise OSError(28, "No space left on device")
        return whole(path, write)

    whole = core.write_whole
    monkeypatch.setattr(core, "write_whole", full)
    run_main("q2a", finished, "--resume", "--epochs", "4")
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err and "epoch   4/4" in printed.out
    assert path.read_bytes() == before


def tiny_model(poison):
    """A linear-Gaussian VAE in the plane whose bound is not finite at the steps that poison(step) names."""

    class Poisoned(core.VAE):
        steps = 0

        def forward(self, x, noise):
            terms = super().forward(x, noise)
            if self.training:
                self.steps += 1
                if poison(self.steps):
                    terms = core.Terms(terms.recon * float("nan" if self.steps % 2 else "inf"), terms.kl)
            return terms

    make = core.GaussianMLP
    return Poisoned(make((8,), torch.nn.SiLU), make((8,), torch.nn.SiLU), core.StandardNormal((2,)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_without_a_finite_gradient_are_skipped_and_counted(precision, tmp_path, capsys):
    splits = {k: torch.randn(n, 2) for k, n in (("train", 400), ("valid", 20), ("test", 20))}
    args = arguments(epochs=2, batch_size=10, lr=1e-2, precision=precision)
    curves = core.fit(tiny_model(lambda step: step in (3, 4, 50)), splits, args, tmp_path / "a.pt")
    assert curves["skipped_steps"] == 3 and "3 steps skipped so far" in capsys.readouterr().out
    model = tiny_model(lambda step: step > 60)
    with pytest.raises(SystemExit) as stop:
        core.fit(model, splits, args, tmp_path / "b.pt")
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "10 steps in a row" in message and "epoch 2, by step 30" in message
    assert all(p.isfinite().all() for p in model.parameters())
    kept = torch.load(tmp_path / "b.pt", weights_only=True)
    assert kept["at"]["epoch"] == 2 and all(p.isfinite().all() for p in kept["model"].values())
    args = arguments(epochs=20, batch_size=400, precision=precision)  # one step an epoch
    with pytest.raises(SystemExit):
        core.fit(tiny_model(lambda step: True), splits, args)
    assert "10 steps in a row" in capsys.readouterr().err


def test_launch_turns_what_the_machine_runs_out_of_into_a_line(capsys):
    def raiser(error):
        def main():
            raise error

        return main

    for error, status, words in (
        (KeyboardInterrupt(), 130, "--resume"), (MemoryError(), 2, "--batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "--batch-size"),
        (OSError(28, "No space left on device", "x/metrics.json"), 1, "x/metrics.json: No space left on device"),
    ):  # fmt: skip
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            core.launch(raiser(error))
        signal.signal(signal.SIGTERM, before)
        message = capsys.readouterr().err
        assert stop.value.code == status and message.count("\n") == 1 and words in message
    with pytest.raises(RuntimeError, match="a mistake"):
        core.launch(raiser(RuntimeError("a mistake")))
    signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_signals_outside_training_end_the_run_and_a_second_one_in_training_does_so_at_once(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job does not have
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):  # as while figures are drawn
        with pytest.raises(SystemExit) as stop:
            core.launch(lambda number=number: os.kill(os.getpid(), number))
        message = capsys.readouterr().err
        assert stop.value.code == status and message.count("\n") == 1 and "--resume" in message
    with pytest.raises(KeyboardInterrupt), core.catch_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM] and "once more to stop at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


OUT_OF_MEMORY = """
import resource, sys
import core, q2a
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)
core.launch(lambda: q2a.main(["--smoke", "--limit", "500", "--batch-size", "500", "--out", sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
def test_a_machine_that_runs_out_of_memory_is_told_which_flag_to_lower(tmp_path):
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1] == "error: out of memory: lower --batch-size, --latents or --limit"
