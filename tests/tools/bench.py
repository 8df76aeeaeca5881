"""How many seconds of training it takes 2b to reach the bound that a plain recipe ends with, by recipe and seed.

python tests/tools/bench.py  ->  results/bench/bench.json, report.md   (half an hour on two idle cores)
"""

import argparse
import json
import math
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import core  # noqa: E402
import q2b  # noqa: E402

RECIPES = {  # of training 2b; what is not said is as the script has it
    "plain: the handout's Adam": dict(**core.HANDOUT, schedule="constant"),
    "new: Muon and Adam": {},
}


class Reached(Exception):
    """Raised to end a training: at the bound that was asked for, or after its last step."""


def seconds_to_bound(recipe, splits, device, until=-math.inf):
    """Train 2b until validation is below `until`, or to the end: the seconds of its steps, and the last bound.
    Validation's first 100 images are evaluated every ten steps, which is not counted."""
    torch.manual_seed(recipe.seed)
    model = core.ImageVAE(q2b.DEFAULTS["latents"], core.FlowPrior).to(device).to(memory_format=torch.channels_last)
    train_step, steps = core.train_step, recipe.epochs * (len(splits["train"]) // recipe.batch_size)
    done, training, last = 0, 0.0, math.inf

    def timed_step(*args):
        nonlocal done, training, last
        start = time.perf_counter()
        train_step(*args)
        if device == "cuda":
            torch.cuda.synchronize()
        training += time.perf_counter() - start
        done += 1
        if done % 10 == 0 or done == steps:
            last = core.bits_per_dim(core.evaluate(model, splits["valid"][:100]).neg_elbo.mean().item(), 3072)
            if last < until or done == steps:
                raise Reached

    unused = {"add_to_curves": lambda *_: False, "save_progress": lambda *_: None}
    with mock.patch.multiple(core, train_step=timed_step, **unused), suppress(Reached):
        core.fit(model, splits, recipe, Path("unused"), {})
    return training, last


def times_to_bound(splits, device, recipe, seeds):
    """Seconds until validation is below the plain recipe's last bound, for each recipe and seed."""
    table = {"plain_bound_bpd": [], "seconds": {k: [] for k in RECIPES}, "reached": {k: [] for k in RECIPES}}
    for seed in range(seeds):
        bound = -math.inf
        for name, changes in RECIPES.items():
            seconds, last = seconds_to_bound(replace(recipe, **changes, seed=seed), splits, device, bound)
            plain = name.startswith("plain")
            bound = last if plain else bound
            table["seconds"][name].append(seconds)
            table["reached"][name].append(plain or last < bound)
            print(f"seed {seed}, {name}: {last:.4f} bits/dim on validation after {seconds:.0f} s", flush=True)
        table["plain_bound_bpd"].append(bound)
    return table


def report(metrics):
    """The table of bench.json in words."""
    env, found, rows = metrics["env"], metrics["bounds"], []
    plain = statistics.median(next(iter(found["seconds"].values())))
    for name, seconds in found["seconds"].items():
        listed, middle = ", ".join(f"{s:.0f}" for s in seconds), statistics.median(seconds)
        missed = "" if all(found["reached"][name]) else " (not reached)"
        rows.append(f"| {name} | {middle:.0f}{missed} | {middle / plain:.2f} | {listed} |")
    bounds, table = ", ".join(f"{bound:.3f}" for bound in found["plain_bound_bpd"]), "\n".join(rows)
    return f"""# Seconds of training until 2b's validation is below the plain recipe's last bound

| recipe | seconds, median over seeds | of plain | each seed |
|---|---|---|---|
{table}

Data: {metrics["data"]["name"]}. Plain sees each three times, and ends at {bounds} bits/dim. The
seconds are those of training steps, without the evaluations, every ten steps; a time is late by ten steps at most. On
{env["device"]}, threads: {env["threads"]}, torch {env["torch"]}, in {env["precision"]}.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args, (device, precision) = parser.parse_args(), core.choose_machine("auto", "auto")
    data = core.load_images("synthetic", "", 4000, 0)
    splits = {name: x.to(device) for name, x in data.splits.items()}
    flags = core.Parser("q2b", images=True).parse_args(["--epochs", "3"])
    _, recipe = core.image_recipe(flags, len(splits["train"]), precision)
    folder, metrics = ROOT / "results" / "bench", core.describe_run("bench", args, data.describe(), device, precision)
    metrics["bounds"] = times_to_bound(splits, device, recipe, seeds=3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
    (folder / "report.md").write_text(report(metrics), "utf-8")
    print(report(metrics))


if __name__ == "__main__":
    main()
