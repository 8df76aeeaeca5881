"""Interruptions, kills, second runs and several processes: a run ends with the same bits, and nothing is lost."""

import importlib
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import core
import q2a
import q2b
from conftest import ROOT, SCRIPTS, noise_file, refused, results, run, tiny_networks, train

SHORT = ["--data", "noise.npz", "--limit", "20", "--batch-size", "10", "--epochs", "1", "--latents", "2"]
SHORT += ["--precision", "fp32", "--device", "cpu"]  # two steps


@pytest.fixture
def steps(tmp_path, monkeypatch, undrawn):
    """In a working folder with images of noise: the training steps made, steps.made. At steps.stop comes a Ctrl-C."""

    def train_step(*args):
        if steps.made == steps.stop:
            raise KeyboardInterrupt
        steps.made += 1
        step(*args)

    monkeypatch.chdir(Path(noise_file(tmp_path)).parent)
    monkeypatch.setattr("q1b.DRAWS_PER_POINT", 1000)
    tiny_networks(monkeypatch.setattr)
    steps, step = SimpleNamespace(made=0, stop=None), core.train_step
    monkeypatch.setattr(core, "train_step", train_step)
    monkeypatch.setattr(core, "KEEP_SECONDS", -1)  # a checkpoint at each step
    return steps


def outcome(*folder):
    """Weights, curves and measurements of a run."""
    folder = Path(*folder)
    files = {path.name: core.sha256_of(core.read_checkpoint(path)["state"]) for path in folder.glob("*.pt")}
    files |= {path.name: path.read_text() for path in folder.glob("*.csv")}
    return files, [results(folder, "").get(key) for key in ("final", "against_2a", "no_code")]


def contents(folder="results"):
    return {path: path.read_bytes() for path in Path(folder).rglob("*.*") if path.is_file()}


@pytest.mark.parametrize(
    "script, where, flags, stops",
    [
        ("q1a", ["smoke"], ["--batch-size", "1200"], (4, 15)),  # of 4 trainings of 6 steps each
        ("q1b", ["smoke"], ["--batch-size", "1200"], (2, 8)),  # 3, 6 and 6
        ("q2b", [], [*SHORT, "--epochs", "2", "--compare"], (3, 6, 9)),  # 2b 4, 2a 4, the flow on 2a 2
        ("bonus", [], [*SHORT, "--table-epochs", "0", "--receptive-field", "1"], (1, 3)),  # 2, and without a code 2
    ],
)
def test_resume_alone_goes_on_with_the_runs_arguments_to_the_same_bits(script, where, flags, stops, steps):
    main, smoke = importlib.import_module(script).main, [f"--{name}" for name in where]
    main([*smoke, *flags, "--out", "whole"])
    total, steps.made = steps.made, 0
    for k, steps.stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            main([*smoke, *(["--resume"] if k else flags)])
    steps.stop = None
    main([*smoke, "--resume"])
    assert steps.made == total > max(stops)  # no step is made twice
    assert outcome("results", *where, script) == outcome("whole", *where, script)


def test_after_a_figure_that_fails_a_run_goes_on_with_the_arguments_it_had(steps, monkeypatch, capsys):
    folder = Path("results/q2a")
    monkeypatch.setattr(core, "plot_curves", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        q2a.main(SHORT)
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "curves.csv", "metrics.json"}
    before, first = contents(), outcome(folder)
    np.savez("other.npz", np.load("noise.npz")["arr_0"][::-1])
    for flags, words in (
        ("--seed 1", "--seed (0, now 1)"), ("--batch-size 5", "--batch-size (10, now 5)"),
        ("--latents 3 --lr 0.1", "--lr (0.002, now 0.1), --latents (2, now 3)"), ("--limit 30", "--limit (20, now 30)"),
        ("--kl-warmup 0.5", "--kl-warmup (0.0, now 0.5)"), ("--handout", "--handout (False, now True)"),
        ("--epochs 0", "has done 2 steps"), ("--data other.npz", "other data"),
    ):  # fmt: skip
        refused(capsys, lambda flags=flags: q2a.main(["--resume", *flags.split()]), words)
    assert contents() == before
    monkeypatch.setattr(core, "plot_curves", lambda *args: core.write_whole(args[-1], b"drawn"))
    q2a.main(["--resume"])
    assert steps.made == 2 and outcome(folder) == first
    assert (folder / "curves.png").exists() and (folder / "report.md").exists()
    q2a.main(["--resume", "--epochs", "2"])
    rows = (folder / "curves.csv").read_text().splitlines()
    assert steps.made == 4 and rows[:4] == first[0]["curves.csv"].splitlines() and rows[5].startswith("4,2")


def test_compare_trains_2a_as_q2a_does_and_does_not_train_2b_again(steps, capsys):
    q2a.main([*SHORT, "--out", "alone"])
    q2b.main(SHORT)
    q2b.main(["--resume", "--compare"])
    assert steps.made == 2 + 2 + (2 + 2)  # 2a and the flow on 2a
    q2a.main(["--resume"])
    assert steps.made == 8 and outcome("results/q2a") == outcome("alone/q2a")
    q2a.main(["--resume", "--epochs", "2"])
    before, twice = contents(), [*SHORT, "--epochs", "2", "--compare"]
    np.savez("noise.npz", np.load("noise.npz")["arr_0"][::-1])
    for flags, words in (
        (["--resume", "--compare"], "--epochs (2, now 1)"), ([*twice, "--seed", "1"], "--seed (0, now 1)"),
        (twice, "the data"),
    ):  # fmt: skip
        refused(capsys, lambda flags=flags: q2b.main(flags), "another 2a", words)
    assert contents() == before and steps.made == 10


KILLS = """
import multiprocessing, random, signal, time
import core, q1a
core.KEEP_SECONDS, core.save_figure = -1, lambda fig, path: core.plt.close(fig)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def start(*flags):
    flags = ["--smoke", "--epochs", "3", "--batch-size", "900", *flags]
    child = multiprocessing.get_context("fork").Process(target=core.launch, args=[lambda: q1a.main(flags)])
    child.start()
    return child
status = lambda child: child.join() or child.exitcode
begin = time.monotonic()
assert status(start("--out", "whole")) == 0
seconds, ends = time.monotonic() - begin, []
for k in range(6):
    child = start(*["--resume"] * (k > 0))
    child.join(random.uniform(0.02, 0.2) * seconds)
    child.kill()
    ends.append(status(child))  # 2 if a checkpoint were broken
assert set(ends) <= {0, -9} and ends.count(-9) >= 3 and status(start("--resume")) == 0
for number in (signal.SIGINT, signal.SIGTERM):
    child = start("--epochs", "100000", "--out", str(number))
    while not core.Path(f"{number}/smoke/q1a/data1_diagonal.pt").exists():
        time.sleep(0.01)
    print("statuses", status(start("--out", str(number))), core.os.kill(child.pid, number), status(child))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and POSIX signals")
def test_kills_leave_whole_files_interrupts_end_in_a_line_and_a_second_run_is_refused(tmp_path):
    done = run("-c", KILLS, folder=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stdout.count("statuses 2 None 130") == 2, done.stderr
    assert outcome(tmp_path, "results/smoke/q1a") == outcome(tmp_path, "whole/smoke/q1a")
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and all("another run is writing into" in line for line in lines[::2])
    assert all(line.startswith("error: interrupted") and "--resume" in line for line in lines[1::2])
    assert not list(tmp_path.rglob("q1a.*"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_earlier_results_are_moved_whole(script, steps):
    main, folder = importlib.import_module(script).main, Path("results/smoke", script)
    folder.mkdir(parents=True)
    flags, steps.stop = ["--smoke", *["--data", "noise.npz"] * (script[:2] != "q1")], 0
    for k in range(3):  # the same process may claim the folder again, as a notebook does
        with pytest.raises(KeyboardInterrupt):
            main(flags)
        (folder / "samples.png").write_bytes(b"of run %d" % k)
    for k, name in enumerate((f"{script}.1", f"{script}.2", script)):
        kept = contents(folder.with_name(name))
        assert len(kept) == 3 and kept[folder.with_name(name) / "samples.png"] == b"of run %d" % k


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    core.write_results(tmp_path, {"x": 1.5})
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, contents: write(path, contents[:9]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        core.write_results(tmp_path, {"x": 2.5})
    assert results(tmp_path, "") == {"x": 1.5}


class Still(nn.Linear):
    """A model without noise, so that two processes can train as one. Its matrix is Muon's."""

    def forward(self, x, generator=None):
        return core.Terms((super().forward(x).tanh() - x).square().sum(1), x.new_zeros(len(x)))

    def loss(self, x, kl_weight, done):
        return self(x).neg_elbo.mean() / 16  # whose gradients are not clipped; their sum over processes would be


def train_still():
    """How training moves its weights, [272]."""
    torch.manual_seed(0)
    model, x = Still(16, 16, dtype=torch.float64), torch.randn(32, 16, dtype=torch.float64)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    train(model, dict.fromkeys(core.SPLITS, x), batch_size=8, muon_lr=0.02)
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


TWO = """from test_resume import SHORT, core, q2a, tiny_networks, torch, train_still
tiny_networks(setattr)
core.draw_image_figures = lambda *_: None
core.choose_machine("cpu")
torch.save(train_still(), f"{core.rank_and_world()[0]}.pt")
core.launch(lambda: q2a.main(SHORT))"""


def test_two_processes_train_as_one_and_write_each_file_once(tmp_path, monkeypatch):
    noise_file(tmp_path)
    (tmp_path / "two.py").write_text(TWO)
    torchrun, paths = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"), (ROOT, ROOT / "tests")
    done = run(*torchrun, "two.py", folder=tmp_path, PYTHONPATH=os.pathsep.join(map(str, paths)))
    assert done.returncode == 0 and done.stdout.count("wrote ") == 1, done.stderr
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"q2a", ".q2a.lock"}
    one = train_still()
    assert all((torch.load(tmp_path / f"{rank}.pt") - one).norm() < 1e-5 * one.norm() for rank in (0, 1))
    step = core.train_step  # control: one process's share of each batch, without the other's
    monkeypatch.setattr(core, "train_step", lambda a, b, x, *more: step(a, b, x[::2], *more))
    assert (train_still() - one).norm() > 1e-2 * one.norm()


def test_processes_wait_two_hours_for_each_other_and_have_a_gpu_each(monkeypatch, capsys):
    joined, gpus = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: joined.append((backend, timeout)))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    core.join_processes("cpu")
    core.join_processes("cuda")
    assert joined == [("gloo", timedelta(hours=2)), ("nccl", timedelta(hours=2))] and gpus == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    refused(capsys, lambda: core.join_processes("cuda"), "more processes than the 2 GPUs", "--nproc_per_node")


def test_processes_share_a_batch_draw_noise_of_their_own_and_one_writes(tmp_path, monkeypatch, capsys):
    seen, x = [], torch.arange(32.0, dtype=torch.float64)[:, None].expand(-1, 16)
    monkeypatch.setattr(core, "train_step", lambda m, o, x, *more: seen.append((x[:, 0], torch.rand(1))))
    for place in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(core, "rank_and_world", lambda place=place: place)
        train(Still(16, 16, dtype=torch.float64), dict.fromkeys(core.SPLITS, x), epochs=1, batch_size=32)
    (whole, _), (first, noise), (second, other_noise) = seen
    assert torch.equal(torch.cat([first, second]).msort(), whole.msort()) and noise != other_noise
    core.write_results(tmp_path, {})
    assert not core.claim(tmp_path, resume=False).is_locked and not list(tmp_path.iterdir())
    refused(capsys, lambda: core.check_batch_size(15, 100), "--batch-size 15")
