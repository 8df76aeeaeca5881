"""Wherever the scripts run: settings that ask for what is not there, a log in place of a terminal, two runs at once."""

import argparse
import contextlib
import importlib
import io
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import tqdm.std
from PIL import Image

import core
import q2a
from conftest import SCRIPTS, noise_file, nowhere, refused, results, run

IMAGES = ("q2a", "q2b", "bonus")

# ------------------------------------------------------------------------------------------------------- environment


def test_settings_that_ask_for_what_is_not_there_do_no_harm(smoke):
    """The runs of all scripts had them: see `nowhere`."""
    folder, printed = smoke
    for script in SCRIPTS:
        assert results(folder, script)["failed"] == {} and (folder / script / "curves.png").exists()
        report = next(line for line in printed[script].splitlines() if line.startswith("wrote "))
        assert "Gr??e" in report  # the folder's name has letters that this terminal has not


def test_control_a_plain_matplotlib_fails_with_these_settings(tmp_path):
    """By its backend, and, where there is no LaTeX, by its fonts."""
    draw = "import matplotlib.pyplot as plt; plt.figure().text(0, 0, 'x'); plt.savefig('x.png'); print('drawn')"
    environment = nowhere(tmp_path)
    assert "no_such_backend" in run("-c", draw, folder=tmp_path, **environment).stderr
    done = run("-c", draw, folder=tmp_path, **environment | {"MPLBACKEND": "agg"})
    assert done.returncode or shutil.which("latex")


def ascii_log(monkeypatch):
    """Standard output as a file whose encoding is ASCII and that is not yet written line by line: what is in it."""
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    return file


def test_a_log_shows_each_line_at_once_and_a_question_mark_for_a_letter_it_has_not(monkeypatch):
    monkeypatch.setattr(core.signal, "signal", lambda number, handler: None)
    file, seen = ascii_log(monkeypatch), []
    core.launch(lambda: print("Größe −1") or seen.append(file.getvalue()))
    assert seen == [b"Gr??e ?1\n"]
    file = ascii_log(monkeypatch)  # control: not so without `launch`
    print("data")
    assert file.getvalue() == b""
    with pytest.raises(UnicodeEncodeError):
        print("Größe")


# --------------------------------------------------------------------------------------------------- a log's progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when it is told to: clock(seconds)."""
    now = [1000.0]

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(core, "IN_KERNEL", False)
    monkeypatch.setattr(core.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return wait


def work(clock, seconds):
    """A training of so many steps, a second each, with an evaluation of 100 s after the first 150."""
    with core.progress_bar(total=1000, desc="training") as bar:
        for second in range(seconds):
            clock(1)
            bar.update(1)
            if second == 150:
                bar.clear()
                print("epoch 1")
                for _ in core.progress_bar(range(100), desc="evaluating", delay=2):
                    clock(1)


def test_in_a_log_a_long_piece_of_work_prints_a_line_a_minute_and_nothing_else(clock, capsys):
    work(clock, 300)
    printed = capsys.readouterr()
    lines = [line for line in printed.out.split("\n") if line]
    of_training = [line for line in lines if re.fullmatch(r"training: \d+ of 1,?000 after [\d:]+( s)?", line)]
    of_evaluation = [line for line in lines if re.fullmatch(r"evaluating: \d+ of 100 after [\d:]+( s)?", line)]
    assert 5 <= len(of_training) <= 7 and 1 <= len(of_evaluation) <= 2  # 400 s of the one, 100 s of the other
    assert [line for line in lines if line not in of_training + of_evaluation] == ["epoch 1"]
    assert of_training[0].startswith("training: 60 of") and not set(printed.out) & set("\r\x1b") and not printed.err


def test_in_a_log_short_work_prints_nothing_and_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    work(clock, 50)
    printed = capsys.readouterr()
    assert not printed.out.strip() and not printed.err
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(clock, 50)
    assert "training:   5%" in sys.stderr.getvalue() and not capsys.readouterr().out.strip()


def test_in_a_run_of_several_processes_one_speaks(clock, capsys, monkeypatch):
    monkeypatch.setattr(core, "rank_and_world", lambda: (1, 2))
    work(clock, 300)
    assert capsys.readouterr().out.strip() == "epoch 1"


# --------------------------------------------------------------------------------------------- two runs in one folder


@contextlib.contextmanager
def another_run(folder, shared=False):
    """What another process does while it writes into the folder; shared: or while it only asks."""
    fcntl = pytest.importorskip("fcntl")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path):
    """A folder in which every script has earlier results."""
    found = {"args": {"precision": "fp32", "epochs": 1}, "must_match": {"--seed": 0}, "finished": True, "state": {}}
    for script in SCRIPTS:
        folder = tmp_path / "smoke" / script
        (folder / "progress").mkdir(parents=True)
        for name in ("metrics.json", "report.md", "curves.csv", "progress/short_run.pt"):
            (folder / name).write_text(f"earlier {name} of {script}")
        torch.save({"script": script, **found}, folder / "checkpoint.pt")
    return tmp_path


def main_of(script, out, *more):
    """The script's smoke run, of image scripts on 60 images of noise, which are made faster than synthetic ones."""
    flags = ["--smoke", "--device", "cpu", "--out", str(out), *more]
    if script in IMAGES:
        flags += ["--data", noise_file(out)]
    importlib.import_module(script).main(flags)


def assert_refused(capsys, culprit, script, out, *more):
    before = contents(out / "smoke")
    refused(capsys, lambda: main_of(script, out, *more), "error: another run", f"writing into {culprit}:", "--out")
    assert contents(out / "smoke") == before


@pytest.fixture
def stopped(monkeypatch):
    """Every training is interrupted when it begins."""

    def stop(*args, **more):
        raise KeyboardInterrupt

    for script in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(script), "fit", stop)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_a_live_run_writes_into_is_refused_and_nothing_is_lost(script, out, capsys, stopped):
    folder = out / "smoke" / script
    for more in ([], ["--resume"]):
        with another_run(folder):
            assert_refused(capsys, folder, script, out, *more)
    with pytest.raises(KeyboardInterrupt):  # control: with its end the folder is free
        main_of(script, out)


def test_the_folder_of_an_evaluation_belongs_to_one_run_too(out, capsys, smoke):
    checkpoint, folder = smoke[0] / "q2a" / "checkpoint.pt", out / "smoke" / "q2a" / "evaluate"
    with another_run(folder):
        assert_refused(capsys, folder, "q2a", out, "--evaluate", str(checkpoint))


def test_a_live_run_keeps_others_out_and_is_not_kept_out_by_itself(tmp_path):
    core.claim(tmp_path / "q2a", resume=False)
    with pytest.raises(BlockingIOError), another_run(tmp_path / "q2a", shared=True):
        pass
    core.claim(tmp_path / "q2a", resume=False)
    with another_run(tmp_path / "q2b", shared=True):  # control
        pass


def test_a_training_and_an_evaluation_of_its_checkpoint_do_not_wait_for_each_other(out):
    with another_run(out / "smoke" / "q2a" / "evaluate"):
        core.claim(out / "smoke" / "q2a", resume=True)
    with another_run(out / "smoke" / "q2b"):
        core.claim(out / "smoke" / "q2b" / "evaluate", resume=False)


def test_results_are_not_moved_away_from_under_a_live_evaluation(out, capsys):
    folder = out / "smoke" / "q2a"
    with another_run(folder / "evaluate"):
        assert_refused(capsys, folder / "evaluate", "q2a", out)


def test_a_comparison_with_another_2a_or_with_a_live_run_of_it_is_refused_and_nothing_is_moved(out, capsys):
    folder, before = out / "smoke" / "q2a", contents(out / "smoke")
    refused(capsys, lambda: main_of("q2b", out, "--compare", "--seed", "1"), "--seed (0, now 1)")
    assert contents(out / "smoke") == before
    (folder / "checkpoint.pt").unlink()
    with another_run(folder):
        assert_refused(capsys, folder, "q2b", out, "--compare")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_earlier_runs_results_are_moved_whole_and_with_resume_they_stay(script, out, capsys, stopped):
    """Whatever becomes of the new run, here interrupted at once; of question 1 with several seeds."""
    folder = out / "smoke" / script
    (folder / "seed_1").mkdir()
    (folder / "seed_1" / "report.md").write_text("another seed's")
    before = contents(folder)
    more = ["--seeds", "2"] if script in ("q1a", "q1b") else []
    with pytest.raises(KeyboardInterrupt):
        main_of(script, out, *more, "--resume")
    assert contents(folder) == before and "earlier results" not in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        main_of(script, out, *more)
    earlier = folder.with_name(f"{script}.1")
    assert contents(earlier) == before and not contents(folder)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("earlier results"))
    assert str(folder) in line and str(earlier) in line and "--resume" in line
    with pytest.raises(KeyboardInterrupt):  # nothing is there to be moved, and nothing is
        main_of(script, out, *more)
    assert {path.name for path in folder.parent.glob(f"{script}*")} == {script, earlier.name}


def test_resume_says_so_if_there_is_nothing_to_go_on_from(out, tmp_path, capsys):
    args = argparse.Namespace(resume=True, batch_size=1)
    core.prepare(tmp_path / "smoke" / "q2a", args, examples=1)
    assert not capsys.readouterr().out
    core.prepare(tmp_path / "new", args, examples=1)
    assert "no earlier run" in capsys.readouterr().out


def test_runs_in_one_process_one_after_the_other_each_keep_their_results(tmp_path, monkeypatch, undrawn, capsys):
    """As in a notebook: an interrupted run, a whole one, one more, and one that goes on."""
    folder, step, steps = tmp_path / "smoke" / "q2a", core.train_step, []
    short = ["--limit", "20"]  # one step in an epoch
    monkeypatch.setattr(q2a, "check_prior", lambda prior: 0.0)

    def interrupted(*args):
        steps.append(0)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(core, "train_step", interrupted)
        main_of("q2a", tmp_path, *short, "--epochs", "2")
    first = contents(folder)
    main_of("q2a", tmp_path, *short, "--epochs", "1")
    second = contents(folder)
    main_of("q2a", tmp_path, *short, "--epochs", "0")
    main_of("q2a", tmp_path, *short, "--epochs", "1", "--resume")
    assert contents(tmp_path / "smoke/q2a.1") == first and contents(tmp_path / "smoke/q2a.2") == second
    kept = torch.load(tmp_path / "smoke/q2a.1/checkpoint.pt", weights_only=True)
    assert kept["finished"] is False and kept["progress"]["step"] == 1 and "curves.csv" in {p.name for p in first}
    assert results(tmp_path / "smoke", "q2a.2")["curves"]["step"] == results(folder, "")["curves"]["step"] == [0, 1]
    assert {path.name for path in folder.parent.iterdir()} == {"q2a", "q2a.1", "q2a.2"}


def test_a_run_that_has_ended_gives_its_folder_back_while_its_process_lives_on(out, capsys, stopped):
    """A notebook's kernel lives on after an interrupt, and after a refusal."""
    folder = out / "smoke" / "q2a"
    with pytest.raises(KeyboardInterrupt):
        main_of("q2a", out)
    with another_run(folder):
        assert_refused(capsys, folder, "q2a", out)
    with another_run(folder):
        pass


def test_where_folders_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    core.claim(tmp_path / "q2a", resume=False)
    (tmp_path / "q2a" / "metrics.json").write_text("{}")
    core.claim(tmp_path / "q2a", resume=False)
    assert (tmp_path / "q2a.1" / "metrics.json").exists()


def test_of_several_processes_the_first_claims_the_folder_for_all(tmp_path, monkeypatch):
    (tmp_path / "metrics.json").write_text("{}")
    monkeypatch.setattr(core, "rank_and_world", lambda: (1, 2))
    with another_run(tmp_path):
        core.claim(tmp_path, resume=False)
    assert (tmp_path / "metrics.json").exists()


# ---------------------------------------------------------------------------------------- a user's data, a user's flags


def test_a_folder_of_photographs_is_trained_on_and_the_report_says_what_was_done(tmp_path, undrawn, capsys):
    (tmp_path / "Größe").mkdir()
    for k, x in enumerate(np.random.RandomState(0).randint(0, 256, (30, 40, 48, 3), dtype=np.uint8)):
        Image.fromarray(x).save(tmp_path / "Größe" / f"{k}.png")
    flags = ["--data", str(tmp_path / "Größe"), "--epochs", "1", "--batch-size", "8", "--latents", "2"]
    q2a.main([*flags, "--kl-warmup", "0.5", "--device", "cpu", "--out", str(tmp_path)])
    name = "Größe, a folder of 30 images, resized to 32 x 32 from 48 x 40, split 80/10/10"
    metrics, report = results(tmp_path, "q2a"), (tmp_path / "q2a" / "report.md").read_text("utf-8")
    assert metrics["data"]["name"] == name and metrics["args"]["kl_warmup"] == 0.5
    assert f"Data: {name}: 24 training, 3 validation and 3 test images." in report
    assert f"data: {name}: 24 train, 3 valid, 3 test\n" in capsys.readouterr().out


@pytest.fixture
def options_of_fit(tmp_path, monkeypatch):
    """What a script hands to its first training, from flags: a function. Images of noise, and no --smoke."""

    def options_of(script, *flags):
        asked = {}

        def fit(model, splits, **options):
            asked.update(options)
            raise KeyboardInterrupt

        monkeypatch.setattr(importlib.import_module(script), "fit", fit)
        data = ["--data", noise_file(tmp_path), "--latents", "2", "--device", "cpu", "--out", str(tmp_path)]
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(script).main([*data, *flags])
        return asked

    return options_of


TRAININGS = pytest.mark.parametrize(
    "script, more",
    [("q2a", []), ("q2b", []), ("q2b", ["--compare"]), ("bonus", [])],
    ids=["q2a", "q2b", "q2b --compare", "bonus"],
)


@TRAININGS
def test_the_flags_of_training_reach_it(script, more, options_of_fit):
    defaults = importlib.import_module(script).DEFAULTS
    without = options_of_fit(script, *more)
    assert without["kl_warmup"] is None and without["seed"] == 0
    assert all(without[name] == defaults[name] for name in ("epochs", "lr", "muon_lr", "schedule", "batch_size"))
    values = dict(epochs=3, lr=0.5, muon_lr=0.25, schedule="one-cycle", batch_size=7, seed=9, kl_warmup=0.125)
    flags = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    for precision in ("fp32", "bf16"):  # one of them is what this machine would have chosen
        asked = options_of_fit(script, *more, *flags, "--precision", precision)
        assert {name: asked[name] for name in values} == values and asked["precision"] == precision


@TRAININGS
def test_handout_sets_its_four_values_and_a_flag_that_is_given_wins(script, more, options_of_fit):
    of_handout = dict(batch_size=32, lr=2e-4, muon_lr=0.0, schedule="constant")
    for flags, changed in (([], {}), (["--lr", "0.5"], {"lr": 0.5}), (["--batch-size", "8"], {"batch_size": 8})):
        for order in (["--handout", *flags], [*flags, "--handout"]):
            asked = options_of_fit(script, *more, *order)
            assert {name: asked[name] for name in of_handout} == of_handout | changed


def test_question_1_runs_on_one_thread_and_question_2_on_all(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(core, "THREADS", 2)
    try:
        for parser, threads in ((core.ImageParser("q2a"), 2), (core.Parser("q1a"), 1)):
            core.parse_args(parser, ["--device", "cpu"], q2a.DEFAULTS, q2a.SMOKE)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
