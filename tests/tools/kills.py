"""Runs of the scripts in processes of their own, killed at random moments and resumed, for test_resume.py.

Argument: a folder for them, which holds noise.npz, the images to train on. Prints the number of kills.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import core

import matplotlib.pyplot as plt
import torch

KILLS = int(os.environ.get("KILLS", 20))
FEW = ["--limit", "20", "--batch-size", "10"]
SIZES = {  # epochs, and arguments that keep a run short
    "bonus": (2, [*FEW, "--table-epochs", str(int(KILLS >= 100)), "--receptive-field", "1"]),
    "q2b": (2, [*FEW, "--compare"]),
    "q1b": (2, ["--batch-size", "600"]), "q2a": (2, FEW), "q1a": (2, ["--batch-size", "600"]),
}  # fmt: skip
# The server of new processes imports what they need once, and computes nothing itself.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
CONTEXT.set_forkserver_preload(["core", *SIZES])


def run_script(script, out, more, keep_seconds, log, draw):
    """The script's main in this process, checkpoints every keep_seconds, what it prints in the file log.

    Without `draw`, figures are not drawn and few samples made for them, a curve is shorter, and the prior
    is not checked: weights and all other metrics, which are compared, depend on none of them.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    core.KEEP_SECONDS = keep_seconds
    module = importlib.import_module(script)
    if not draw:
        core.save_figure = module.save_figure = lambda fig, path: plt.close(fig)
        module.draw_figures = lambda *_: None
        module.plot_images = module.plot_curves = lambda *_, **__: None
        module.plot_samples = module.plot_evidence = module.plot_all_curves = lambda *_: None  # of q1a
        module.check_prior = lambda prior: 0.0
        module.IWAE_K, module.DRAWS_PER_POINT = (1, 100), 1000  # of q1b
    epochs, sizes = SIZES[script]
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        flags = ["--smoke", "--device", "cpu", "--out", out, "--epochs", str(epochs), *sizes, *more]
        core.launch(lambda: module.main(flags))


def start(script, out, *more, keep_seconds=0.0, draw=KILLS >= 100):
    process = CONTEXT.Process(
        target=run_script, args=(script, str(out), more, keep_seconds, f"{out}.log", draw), daemon=True
    )
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


def kill_and_resume(script, folder):
    """The script's share of KILLS at random moments, each followed by --resume; the number of kills."""
    whole = folder / "whole"
    of_images = [] if script in ("q1a", "q1b") else ["--data", str(folder.parent / "noise.npz")]
    begin = time.monotonic()
    process = start(script, whole, *of_images, keep_seconds=1e9)
    process.join()
    seconds = time.monotonic() - begin
    assert process.exitcode == 0, (folder / "whole.log").read_text()
    moments, kills, runs, more = random.Random(f"{script} {KILLS}"), 0, 0, []
    while kills < KILLS / len(SIZES) or more:
        out = folder / f"killed_{runs}"
        process = start(script, out, *of_images, *more)
        process.join(moments.uniform(0, 0.7 * seconds) if kills < KILLS / len(SIZES) else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills, more = kills + 1, ["--resume"]
        else:
            assert process.exitcode == 0, (folder / f"killed_{runs}.log").read_text()
            assert_same(outcome(script, out), outcome(script, whole))
            runs, more = runs + 1, []
    assert runs
    return kills


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a run that it has started ends with it
    kills = 0
    for script in SIZES:
        folder = Path(sys.argv[1], script)
        folder.mkdir()
        kills += kill_and_resume(script, folder)
    print(kills)


if __name__ == "__main__":
    main()
