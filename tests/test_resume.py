"""A run that was killed and resumed ends with the same bits as one that never was; what fails loses no training.

python -m pytest tests/test_resume.py                  20 kills in all
KILLS=100 python -m pytest tests/test_resume.py        the long version
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch

import core
import q1a
import q2a
from conftest import ROOT, noise_file, refused, results
from tools.kills import KILLS, start, without_seconds


def wait_for(text, path, process):
    while text not in (path.read_text() if path.exists() else ""):
        assert process.is_alive()
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_signal_ends_the_run_at_once_in_one_line_and_resume_goes_on(tmp_path, capsys):
    """At most what came after the last checkpoint is lost: here the epochs' ends, as there is none between.

    Of Ctrl-C; `test_signals_end_the_run_wherever_it_is` has the other signals.
    """
    log, flags = tmp_path / "out.log", ["--data", noise_file(tmp_path), "--epochs", "1000"]
    process = start("q2a", tmp_path / "out", *flags, keep_seconds=1e9)
    wait_for("epoch  2.", log, process)  # a look within the third epoch
    refused(capsys, lambda: run_q2a(tmp_path / "out"), "another run")  # meanwhile, and disturbs nothing
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT and time.monotonic() - sent < 10
    last = log.read_text().splitlines()[-1]
    assert not list(tmp_path.rglob("q2a.*"))
    assert last.startswith("error: interrupted") and "--resume" in last and "Traceback" not in log.read_text()
    saved = torch.load(tmp_path / "out/smoke/q2a/checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] >= 4 and not saved["finished"]  # two epochs of two steps
    process = start("q2a", tmp_path / "out", *flags, "--resume")
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
    refused(capsys, lambda: run_q2a(finished, "--resume", "--epochs", "1"), "--epochs", "9 steps")


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
    refused(capsys, lambda: run_q2a(finished, "--resume", "--epochs", "3", *change), *named)
    assert {path: path.read_bytes() for path in finished.rglob("*.*")} == before


def test_on_resume_the_precision_is_what_the_run_had(finished, capsys, undrawn, monkeypatch):
    had, other = precisions(finished)
    refused(capsys, lambda: run_q2a(finished, "--resume", "--precision", other), f"--precision ({had}, now {other})")
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
        flags = ["--resume", "--epochs", "3", "--precision", precision]
        refused(capsys, lambda flags=flags: run_q2a(finished, *flags), "checkpoint.pt: not a readable checkpoint")


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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("this machine mounts no tmpfs for us; the tests above have the same with a hook")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_nothing_is_lost_and_the_run_can_go_on(small_disk, monkeypatch, capsys, unsaved):
    monkeypatch.setattr(core.signal, "signal", lambda number, handler: None)  # `launch` sets it
    flags = ["--smoke", "--out", str(small_disk / "results")]
    q1a.main([*flags, "--epochs", "1"])
    folder = small_disk / "results/smoke/q1a"
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    flags += ["--resume"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        core.launch(lambda: q1a.main(flags))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and "No space left on device" in lines[-1] and str(folder) in lines[-1]
    assert any(line.startswith("warning: a new ") and "No space left on device" in line for line in lines[:-1])
    now = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert now.keys() == before.keys()
    for path, content in before.items():  # a table of curves may have grown within its last block
        assert now[path].startswith(content) if path.suffix == ".csv" else now[path] == content
    (small_disk / "filler").unlink()
    q1a.main(flags)
    curves = results(folder, "")["curves"]
    assert all(curve["epoch"][-1] == 2 for curve in curves.values())


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
        refused(capsys, lambda error=error: core.launch(raiser(error)), words, status=status)
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
    def killed():  # as while figures are drawn
        os.kill(os.getpid(), number)
        time.sleep(1)

    refused(capsys, lambda: core.launch(killed), "--resume", status=128 + number)


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


def obeys(work, number, within=2.0):
    """Whether a signal that comes 0.3 s after work began ends its process, by `launch` and within so much CPU time."""
    begun, begins = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            signal.signal(number, signal.SIG_DFL)  # a shell's background job ignores SIGINT
            core.launch(lambda: os.write(begins, b"!") and work())
        finally:
            os._exit(0)
    os.close(begins)
    os.read(begun, 1)
    os.close(begun)
    time.sleep(0.3)
    os.kill(child, number)
    _, status, usage = os.wait4(child, 0)
    ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 128 + number
    return ended and usage.ru_utime + usage.ru_stime < 0.3 + within


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", [evaluation, reading_of_a_large_file, drawing_of_synthetic_images])
def test_an_interrupt_is_obeyed_within_two_seconds_in_long_work_too(work, number, tmp_path, capfd):
    assert obeys(lambda: work(tmp_path), number)
    message = capfd.readouterr().err
    assert message.startswith("error: interrupted") and message.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_control_one_long_call_into_c_is_seen_not_to_obey():
    assert not obeys(lambda: torch.linalg.svdvals(torch.randn(2000, 2000)), signal.SIGTERM, within=0.1)


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
    assert kills.returncode == 0, kills.stderr
    assert int(kills.stdout) >= KILLS
