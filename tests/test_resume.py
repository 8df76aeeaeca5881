"""A run that was killed and resumed ends with the same bits as one that never was; what fails loses no training.

python -m pytest tests/test_resume.py                  20 kills in all
KILLS=100 python -m pytest tests/test_resume.py        the long version
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import core
import q2a
from conftest import ROOT, results

KILLS = int(os.environ.get("KILLS", 20))
SIZES = {  # epochs, and arguments that keep a run short; the longest first, for the pool
    "bonus": (2, ["--limit", "40", "--table-epochs", "1", "--batch-size", "20", "--receptive-field", "1"]),
    "q2b": (2, ["--limit", "40", "--compare"]), "q1b": (2, ["--batch-size", "600"]), "q2a": (2, ["--limit", "40"]),
}  # fmt: skip
# The server of new processes imports what they need once, and computes nothing itself.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
CONTEXT.set_forkserver_preload(["core", *SIZES])


def run_script(script, out, more, keep_seconds, log, draw):
    """The script's main in this process, checkpoints every keep_seconds, what it prints in the file log.

    Without `draw`, figures are not drawn and few samples made for them, and a table and a curve are shorter: weights
    and metrics, which are compared, depend on none of them.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    core.KEEP_SECONDS = keep_seconds
    module = importlib.import_module(script)
    if not draw:
        core.save_figure = module.save_figure = lambda fig, path: plt.close(fig)
        module.draw_figures = lambda *_: None
        module.plot_images = module.plot_curves = lambda *_, **__: None
        module.RECEPTIVE_FIELDS, module.IWAE_K, module.DRAWS_PER_POINT = (1,), (1, 100), 1000  # of bonus, of q1b
    epochs, sizes = SIZES[script]
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        flags = ["--smoke", "--device", "cpu", "--out", out, "--epochs", str(epochs), *sizes, *more]
        core.launch(lambda: module.main(flags))


def start(script, out, *more, keep_seconds=0.0, draw=KILLS >= 100):
    process = CONTEXT.Process(target=run_script, args=(script, str(out), more, keep_seconds, f"{out}.log", draw))
    process.start()
    return process


def outcome(script, out):
    """Metrics, weights and tables of curves, without what may differ: seconds and machine."""
    folder = out / "smoke" / script
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    metrics["args"].pop("out")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    flat = {}
    for name, value in state.items():
        flat.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    tables = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*curves.csv")}
    return without_seconds({k: v for k, v in metrics.items() if k != "env"}), flat, tables


def without_seconds(value):
    """Nested metrics without the entries "seconds"."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return value


def assert_same(found, expected):
    assert found[0] == expected[0] and found[2] == expected[2]
    assert found[1].keys() == expected[1].keys() and all(torch.equal(found[1][k], expected[1][k]) for k in found[1])


@pytest.fixture(scope="session", autouse=True)
def kills(request, tmp_path_factory):
    """How often runs of each script were killed: numbers still to come, as it is done beside the other tests.

    Nothing is started if the test that asks for them is not among those that run.
    """
    asked_for = any(item.name.startswith("test_killed") for item in request.session.items)
    scripts = SIZES if asked_for and sys.platform != "win32" else ()
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1))
    yield [pool.submit(kill_and_resume, script, tmp_path_factory.mktemp(script)) for script in scripts]
    pool.shutdown(cancel_futures=True)


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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_at_once_in_one_line_and_resume_goes_on(number, tmp_path, capsys):
    """At most what came after the last checkpoint is lost: here the epochs' ends, as there is none between."""
    log = tmp_path / "out.log"
    process = start("q2a", tmp_path / "out", "--epochs", "1000", keep_seconds=1e9)
    wait_for("epoch  2.", log, process)  # a look within the third epoch
    if number == signal.SIGINT:  # meanwhile another run is refused, and disturbs nothing
        with pytest.raises(SystemExit) as stop:
            run_q2a(tmp_path / "out")
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and "another run" in message
    sent = time.monotonic()
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number and time.monotonic() - sent < 10
    last = log.read_text().splitlines()[-1]
    assert not list(tmp_path.rglob("q2a.*"))
    assert last.startswith("error: interrupted") and "--resume" in last and "Traceback" not in log.read_text()
    saved = torch.load(tmp_path / "out/smoke/q2a/checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] >= 4 and not saved["finished"]  # two epochs of two steps
    if number == signal.SIGTERM:
        process = start("q2a", tmp_path / "out", "--epochs", "1000", "--resume")
        wait_for("going on from", log, process)
        process.kill()
        process.join()


@pytest.fixture
def finished(smoke, tmp_path):
    """A copy of the smoke run of q2a, which is finished: the folder --out."""
    shutil.copytree(smoke[0] / "q2a", tmp_path / "smoke" / "q2a")
    return tmp_path


def run_q2a(out, *more):
    q2a.main(["--smoke", "--device", "cpu", "--out", str(out), *more])


@pytest.fixture
def no_step(monkeypatch):
    """A training step fails the test."""

    def step(*args):
        raise AssertionError("a training step was made")

    monkeypatch.setattr(core, "train_step", step)


def test_resume_trains_on_for_more_epochs_and_refuses_fewer(finished, capsys, undrawn):
    before = results(finished / "smoke", "q2a")["curves"]
    run_q2a(finished, "--resume", "--epochs", "3")
    curves = results(finished / "smoke", "q2a")["curves"]
    assert curves["step"][: len(before["step"])] == before["step"] and curves["epoch"][-1] == 3
    assert curves["step"] == sorted(curves["step"]) and curves["valid"]["kl_bpd"][0] == before["valid"]["kl_bpd"][0]
    assert "step     1 " not in capsys.readouterr().out  # of the first epoch none is made again
    with pytest.raises(SystemExit) as stop:
        run_q2a(finished, "--resume", "--epochs", "1")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "--epochs" in message and "9 steps" in message


def test_resume_of_a_finished_run_makes_no_step_and_gives_the_same(finished, undrawn, no_step):
    before = results(finished / "smoke", "q2a")
    run_q2a(finished, "--resume")
    after = results(finished / "smoke", "q2a")
    assert without_seconds(after["curves"]) == without_seconds(before["curves"]) and after["final"] == before["final"]


def precisions(finished):
    had = results(finished / "smoke", "q2a")["args"]["precision"]
    return had, {"fp32": "bf16", "bf16": "fp32"}[had]


@pytest.mark.parametrize(
    "change, named",
    [
        (["--seed", "1"], ["--seed (0, now 1)"]), (["--batch-size", "8"], ["--batch-size (16, now 8)"]),
        (["--latents", "3"], ["--latents (4, now 3)", "the network"]),
        (["--lr", "0.1"], [f"--lr ({q2a.DEFAULTS['lr']}, now 0.1)"]),
        (["--limit", "50"], ["--limit (48, now 50)", "the data"]), (["--schedule", "constant"], ["--schedule"]),
        (["--muon-lr", "0"], [f"--muon-lr ({q2a.DEFAULTS['muon_lr']}, now 0.0)"]),
        (["--kl-warmup", "0.5"], ["--kl-warmup (None, now 0.5)"]),
    ],
)  # fmt: skip
def test_resume_with_other_arguments_is_refused_and_names_both_values(change, named, finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*.*")}
    with pytest.raises(SystemExit) as stop:
        run_q2a(finished, "--resume", "--epochs", "3", *change)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and all(name in message for name in named)
    assert {path: path.read_bytes() for path in finished.rglob("*.*")} == before


def test_on_resume_the_precision_is_what_the_run_had(finished, capsys, undrawn, monkeypatch):
    had, other = precisions(finished)
    with pytest.raises(SystemExit) as stop:
        run_q2a(finished, "--resume", "--precision", other)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"--precision ({had}, now {other})" in message
    for native in (False, True):  # whatever this machine would have chosen
        for unit in ("avx512_bf16", "amx_tile"):
            monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda native=native: native, raising=False)
        run_q2a(finished, "--resume")
        assert results(finished / "smoke", "q2a")["args"]["precision"] == had
        assert f"--precision {had}" in capsys.readouterr().out


def test_resume_refuses_a_broken_checkpoint(finished, capsys):
    path = finished / "smoke/q2a/checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for precision in ("auto", "fp32"):
        with pytest.raises(SystemExit) as stop:
            run_q2a(finished, "--resume", "--epochs", "3", "--precision", precision)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1
        assert "checkpoint.pt: not a readable checkpoint" in message


def full_disk(monkeypatch, wanted):
    """Writing a file that is `wanted` ends half way: the disk is full."""

    def write_whole(path, write):
        def half(file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        return whole(path, half if wanted(path) else write)

    whole = core.write_whole
    monkeypatch.setattr(core, "write_whole", write_whole)


def test_a_full_disk_costs_a_checkpoint_and_is_said(finished, monkeypatch, capsys, undrawn):
    path = finished / "smoke/q2a/checkpoint.pt"
    before = path.read_bytes()
    full_disk(monkeypatch, lambda path: path.name == "checkpoint.pt")
    run_q2a(finished, "--resume", "--epochs", "2")
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err and "epoch  2.00" in printed.out
    assert path.read_bytes() == before and not list(finished.rglob("*.part"))


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def write(file):
        file.write(b"half")
        raise OSError(28, "disk full")

    with pytest.raises(OSError, match="disk full") as error:
        core.write_whole(path, write)
    assert path.read_text("utf-8") == "old" and list(tmp_path.iterdir()) == [path]
    assert error.value.filename == str(path)


# ------------------------------------------------------------------------------------------------------- results first

DRAWN = {"curves.png", "samples.png", "interpolations.png", "reconstructions.png"}


def assert_missing(folder, status, printed, missing):
    """The run ended with status 1, weights and metrics are there, and a line and the report name each missing thing."""
    assert status == 1
    lines = printed.strip().splitlines()
    for name in missing:
        assert sum(line.startswith(f"warning: {name} is missing: ") for line in lines) == 1, name
    assert lines[-1].startswith("error: missing: ") and "--resume" in lines[-1] and "Traceback" not in printed
    metrics, report = results(folder, ""), (folder / "report.md").read_text("utf-8")
    assert set(metrics["failed"]) == set(missing) and set(metrics["final"]) == set(core.SPLITS)
    assert all(f"**Missing: {name}.**" in report for name in missing)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["finished"] is True
    assert {path.name for path in folder.glob("*.png")} == DRAWN - set(missing)
    assert not list(folder.rglob("*.part"))


def assert_made_up_for(folder):
    metrics = results(folder, "")
    assert metrics["failed"] == {} and {path.name for path in folder.glob("*.png")} == DRAWN
    assert "Missing" not in (folder / "report.md").read_text("utf-8")


def test_a_machine_that_cannot_draw_says_so_before_training(tmp_path, monkeypatch, capsys):
    args = argparse.Namespace(batch_size=1, resume=False)
    monkeypatch.setattr(core.plt, "figure", lambda: 1 / 0)
    core.prepare(tmp_path, args, examples=1)
    assert capsys.readouterr().err.startswith("warning: a trial figure is missing: ZeroDivisionError")
    monkeypatch.undo()
    core.prepare(tmp_path, args, examples=1)
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


def test_a_figure_that_cannot_be_drawn_is_named_and_resume_makes_up_for_it(finished, monkeypatch, capsys, no_step):
    folder = finished / "smoke/q2a"
    for path in folder.glob("*.png"):
        path.unlink()

    def wrong(*args):
        raise IndexError("no such axis")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(core, "draw_curves", wrong)
        patch.setattr(q2a, "straight_lines", wrong)
        patch.setattr(q2a, "check_prior", wrong)
        run_q2a(finished, "--resume")
    printed = capsys.readouterr().err
    missing = {"curves.png", "interpolations.png", "the check of the prior"}
    assert_missing(folder, stop.value.code, printed, missing)
    assert "no such axis (test_resume.py, line" in printed and "check of the prior" in printed
    run_q2a(finished, "--resume")
    assert_made_up_for(folder)


def test_a_disk_that_is_full_when_figures_are_drawn_costs_only_them(finished, monkeypatch, capsys, no_step):
    folder = finished / "smoke/q2a"
    for path in folder.glob("*.png"):
        path.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        full_disk(patch, lambda path: path.suffix == ".png")
        run_q2a(finished, "--resume")
    assert_missing(folder, stop.value.code, capsys.readouterr().err, DRAWN)
    run_q2a(finished, "--resume")
    assert_made_up_for(folder)


# ----------------------------------------------------------------------------------------------- signals, the machine


def test_launch_turns_what_the_machine_runs_out_of_into_a_line(capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def raiser(error):
        def main():
            raise error

        return main

    for error, status, words in (
        (MemoryError(), 2, "--batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "--batch-size"),
        (OSError(28, "No space left on device", "x/metrics.json"), 1, "x/metrics.json: No space left on device"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            core.launch(raiser(error))
        message = capsys.readouterr().err
        assert stop.value.code == status and message.count("\n") == 1 and words in message
    with pytest.raises(RuntimeError, match="a mistake"):
        core.launch(raiser(RuntimeError("a mistake")))
    with pytest.raises(OSError, match="a library's"):  # not of the machine: its traceback is of use
        core.launch(raiser(OSError("a library's")))


def leave(status):
    """In place of os._exit, which would end the tests."""
    raise SystemExit(status)


@pytest.fixture
def handlers(monkeypatch):
    """Those of signals, which `core.launch` sets, are as before after the test."""
    if sys.platform == "win32":
        pytest.skip("needs POSIX signals")
    monkeypatch.setattr(os, "_exit", leave)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job does not have
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_run_wherever_it_is(number, handlers, capsys):
    with pytest.raises(SystemExit) as stop:  # as while figures are drawn
        core.launch(lambda: os.kill(os.getpid(), number) or time.sleep(1))
    message = capsys.readouterr().err
    assert stop.value.code == 128 + number and message.count("\n") == 1 and "--resume" in message


def interrupted_where_python_drops_it():
    """As may happen when one of tqdm's bars, which it keeps in a WeakSet, comes to its end."""
    thing = core.Progress()
    callback = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM) or sum(range(1000)))
    del thing
    return callback


def test_an_interrupt_ends_the_run_where_python_drops_exceptions_too(handlers, capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    core.launch(interrupted_where_python_drops_it)  # control: an exception, as `leave` raises, would not end it
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    core.launch(interrupted_where_python_drops_it)
    assert statuses == [128 + signal.SIGTERM] and capsys.readouterr().err.count("error: interrupted") == 2


def test_a_signal_that_the_shell_has_ignored_stays_ignored(handlers):
    """As SIGHUP under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    core.launch(lambda: os.kill(os.getpid(), signal.SIGHUP) or time.sleep(0.1))


def evaluation(folder):
    model = core.ImageVAE(4, core.StandardNormal)
    core.evaluate(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(10**6, -1, -1, -1))


def reading_of_a_large_file(folder):
    """Of 300 MB, which are then resized."""
    shape = (60_000, 40, 40, 3)
    np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.uint8, shape=shape)  # a file of holes
    core.load_own(folder / "x.npy", seed=0)


def drawing_of_synthetic_images(folder):
    core.make_synthetic(core.SVHN_SIZES)


def assert_obeyed(work, number, within=2.0):
    """A signal that comes 0.3 s after work began ends it. Seconds of this thread: other programs may be running."""
    timer, begin = threading.Timer(0.3, os.kill, (os.getpid(), number)), time.thread_time()
    timer.start()
    try:
        with pytest.raises(SystemExit) as stop:
            core.launch(work)
    finally:
        timer.cancel()
    assert stop.value.code == 128 + number and time.thread_time() - begin < 0.3 + within


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", [evaluation, reading_of_a_large_file, drawing_of_synthetic_images])
def test_an_interrupt_is_obeyed_within_two_seconds_in_long_work_too(work, number, handlers, tmp_path, capsys):
    assert_obeyed(lambda: work(tmp_path), number)
    message = capsys.readouterr().err
    assert message.startswith("error: interrupted") and message.count("\n") == 1
    assert not list(tmp_path.glob("synthetic*"))


def test_control_one_long_call_into_c_is_seen_not_to_obey(handlers):
    with pytest.raises(AssertionError):
        assert_obeyed(lambda: torch.linalg.svdvals(torch.randn(2000, 2000)), signal.SIGTERM, within=0.1)


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
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1] == "error: out of memory: lower --batch-size, --latents or --limit"


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.last
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(kills):
    """SIGKILL at any moment of a run, but not while figures are drawn: the short version leaves drawing out."""
    assert sum(done.result() for done in kills) >= KILLS
