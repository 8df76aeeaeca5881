"""How fast, and how near to what the machine can do: one table, ratios measured in one run, medians.

python tests/tools/bench.py           ->  results/bench/metrics.json, report.md   (half an hour on two idle cores)
python tests/tools/bench.py --part bounds   one part of it alone: steps, sampling, bounds or processes
python tests/tools/bench.py --short         a minute, to see that it works
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import bonus  # noqa: E402
import core  # noqa: E402
import q2b  # noqa: E402

MODELS = {
    "q2a": lambda: core.ImageVAE(16, core.StandardNormal), "q2b": lambda: core.ImageVAE(16, core.FlowPrior),
    "bonus": lambda: bonus.LossyVAE(16, 3, "flow", blind=1.0),
}  # fmt: skip


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_model(script, device):
    torch.manual_seed(0)
    return MODELS[script]().to(device)


def plain_way(script, images, batch_size, device):
    """What a good student writes: fp32, eager, a DataLoader over a TensorDataset, the loss looked at each step."""
    model = make_model(script, device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5)
    loader = DataLoader(TensorDataset(images.cpu()), batch_size, shuffle=True, drop_last=True)

    def run(steps):
        losses, done = [], 0
        while done < steps:
            for (x,) in loader:
                loss = model.loss(x.to(device))
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                losses.append(loss.item())
                done += 1
                if done == steps:
                    break

    return run


def our_way(script, images, batch_size, device, precision):
    """A step of core.fit: the set on the device, memory format as the scripts have it, fused Adam and Muon."""
    model = core.to_device(make_model(script, device), argparse.Namespace(device=device, precision=precision))
    optimisers, images = core.make_optimisers(model, 1e-5, 1e-5), images.to(device)

    def run(steps):
        order = torch.randperm(len(images), device=device)[: steps * batch_size]
        for batch in order.split(batch_size):
            core.train_step(model, optimisers, images[batch], precision)

    return run


def training_speed(device, batch_size, rounds, steps, modes):
    """Images per second of every model in every precision, and the fraction of the rate of a large product in it."""
    images = torch.randint(0, 256, (steps * batch_size, 3, 32, 32), dtype=torch.uint8)
    table = {}
    for script in MODELS:
        runs = {"plain": plain_way(script, images, batch_size, device)}
        runs |= {m: our_way(script, images, batch_size, device, m) for m in modes}
        with FlopCounterMode(display=False) as counter:
            our_way(script, images, 2, device, "fp32")(1)
        gflop = counter.get_total_flops() / 2 / 1e9
        seconds, rates = {mode: [] for mode in runs}, {mode: [] for mode in modes}
        for run in runs.values():
            run(2)  # allocate, choose kernels
        for _ in range(rounds):
            for precision in rates:
                rates[precision].append(product_rate(device, precision))
            for mode, run in runs.items():
                start = now(device)
                run(steps)
                seconds[mode].append(now(device) - start)
        row = {"gflop_an_image": gflop, "gflops_of_products": {p: statistics.median(r) for p, r in rates.items()}}
        for mode, times in seconds.items():
            speed = steps * batch_size / statistics.median(times)
            peak = row["gflops_of_products"]["fp32" if mode == "plain" else mode]
            row[mode] = {"images_per_s": speed, "times_plain": statistics.median(seconds["plain"]) /
                         statistics.median(times), "of_product_rate": speed * gflop / peak}  # fmt: skip
            print(f"{script:6} {mode:6} {speed:8.1f} images/s, {row[mode]['times_plain']:5.2f} x plain, "
                  f"{row[mode]['of_product_rate']:6.1%} of the product rate", flush=True)  # fmt: skip
        row["evaluation_images_per_s"] = evaluation_speed(script, images, device, rounds)
        best = max(row[mode]["images_per_s"] for mode in modes)
        row["looks_of_training_time"] = looks_of_training_time(row["evaluation_images_per_s"], best)
        print(f"{script:6} evaluation {row['evaluation_images_per_s']:.1f} images/s", flush=True)
        table[script] = row
    return table


def looks_of_training_time(evaluated_per_s, trained_per_s, epochs=20):
    """The fraction of a training's time, SVHN's sizes, that the looks at the three splits take."""
    train, valid, _ = core.SVHN_SIZES
    splits = {"train": torch.empty(train, 0), "valid": torch.empty(valid, 0)}
    looked_at = 3 * len(core.steps_to_look(epochs * train)) * core.num_looked_at(splits, epochs)
    return (looked_at / evaluated_per_s) / (epochs * train / trained_per_s)


def evaluation_speed(script, images, device, rounds):
    """Images per second of core.evaluate, fp32."""
    model, seconds = core.to_device(make_model(script, device), argparse.Namespace(device=device, precision="fp32")), []
    images = images.to(device)
    for _ in range(rounds + 1):
        start = now(device)
        core.evaluate(model, images)
        seconds.append(now(device) - start)
    return len(images) / statistics.median(seconds[1:])


def product_rate(device, precision, size=2048):
    """GFLOP/s of a large matrix product."""
    size = size if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
            for _ in range(2))  # fmt: skip
    a @ b
    start = now(device)
    for _ in range(3):
        a @ b
    return 3 * 2 * size**3 / (now(device) - start) / 1e9


def sampling(device, n, rounds):
    """Seconds for n samples: wavefronts against raster order, one position at a time, of flow and decoder."""
    model = make_model("bonus", device).eval()
    torch.nn.init.normal_(model.prior.net[-1].weight, std=0.02)
    eps = core.noise(torch.randn, (n, *model.prior.latent_shape), device, core.fixed_noise("bench"))
    u = core.noise(torch.rand, (n, bonus.COMPONENTS + 3, 32, 32), device, core.fixed_noise("bench"))
    ways = {
        "flow": lambda slope: model.prior.eps_to_z(eps, slope),
        "decoder": lambda slope: model.decoder.sample(eps, u, slope),
    }
    table = {}
    for name, way in ways.items():
        seconds, results = {None: [], 32: []}, {}
        for _ in range(rounds):
            for slope, times in seconds.items():
                start = now(device)
                results[slope] = way(slope)
                times.append(now(device) - start)
        wavefront, raster = (statistics.median(times) for times in seconds.values())
        table[name] = {"wavefront_s": wavefront, "raster_s": raster, "identical": torch.equal(*results.values())}
        start = now(device)
        with torch.no_grad():
            if name == "flow":
                model.prior.mean_and_log_std(eps)
            else:
                model.decoder(torch.zeros(n, 3, 32, 32, device=device), model.decoder.features(eps))
        table[name]["one_whole_pass_s"] = now(device) - start
        print(f"sampling {n}, {name}: {table[name]}", flush=True)
    return table


RECIPES = {  # of training 2b; what is not said is as the script has it
    "plain: the handout's Adam": core.HANDOUT,
    "earlier: Adam, one cycle": dict(batch_size=32, lr=1e-3, muon_lr=0.0, schedule="one-cycle"),
    "new: Muon and Adam": {},
}


class Reached(Exception):
    """Raised to end a training at the bound that was asked for."""


def seconds_to_bound(recipe, splits, seed, args, until=-float("inf")):
    """Train 2b until validation is below `until`, or to the end: the seconds of its steps, and the last bound.

    A look every ten steps, whose time is not counted.
    """
    recipe = {k: q2b.DEFAULTS[k] for k in ("batch_size", "lr", "muon_lr", "schedule")} | recipe
    torch.manual_seed(seed)
    model = core.to_device(MODELS["q2b"](), args)
    look, steps_to_look = core.look, core.steps_to_look
    save_checkpoint, write_curves = core.save_checkpoint, core.write_curves
    looking, training, last = 0.0, 0.0, float("inf")

    def noting(now, *rest):
        nonlocal looking, training, last
        begin = time.perf_counter()
        training = begin - start - looking
        look(now, *rest)
        looking += time.perf_counter() - begin
        last = now.curves["valid"]["neg_elbo_bpd"][-1]
        if last < until:
            raise Reached

    core.look, core.steps_to_look = noting, lambda steps: {*range(0, steps, 10), steps}
    core.save_checkpoint, core.write_curves = (lambda *_: None), (lambda *_: None)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = {"path": Path(folder) / "checkpoint.pt", "run": {}, "name": "bench"}
            core.fit(model, splits, epochs=args.epochs, seed=seed, precision=args.precision, **files, **recipe)
    except Reached:
        pass
    finally:
        core.look, core.steps_to_look = look, steps_to_look
        core.save_checkpoint, core.write_curves = save_checkpoint, write_curves
    return training, last


def times_to_bound(args, seeds):
    """Seconds until validation is below the plain recipe's last bound, for each recipe and seed."""
    splits = {name: x.to(args.device) for name, x in core.load_images(args).splits.items()}
    table = {
        "plain_bound_bpd": [],
        "seconds": {name: [] for name in RECIPES},
        "reached": {name: [] for name in RECIPES},
    }
    for seed in range(seeds):
        bound = float("inf")
        for name, recipe in RECIPES.items():
            plain = recipe is core.HANDOUT
            seconds, last = seconds_to_bound(recipe, splits, seed, args, -float("inf") if plain else bound)
            bound = last if plain else bound
            table["seconds"][name].append(seconds)
            table["reached"][name].append(plain or last < bound)
            print(f"seed {seed}, {name}: {last:.4f} bits/dim on validation after {seconds:.0f} s", flush=True)
        table["plain_bound_bpd"].append(bound)
    return table


CHILD = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def child(code, *flags):
    """Run a script in a process of its own; its seconds and its peak memory in MB.

    Started by a small process in between: a child's peak counts what its parent held when it was started.
    """
    before = time.perf_counter()
    command = [sys.executable, "-c", CHILD, sys.executable, *code, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{code} {flags} ended with {done.returncode}")
    return time.perf_counter() - before, int(done.stdout) / (1024 if sys.platform == "linux" else 2**20)


def memory(out, images, short):
    """Peak memory, MB, of q2a: how it grows with epochs, batch and number of images."""
    base, table = dict(epochs=1, batch_size=16, limit=images), {}
    changes = {"3 epochs": dict(epochs=3), "batch 64": dict(batch_size=64), "4 x images": dict(limit=4 * images)}
    for name, change in {"base": {}, **({} if short else changes)}.items():
        flags = [w for k, v in (base | change).items() for w in (f"--{k.replace('_', '-')}", str(v))]
        table[name] = child(["q2a.py"], "--data", "synthetic", "--out", f"{out}/{name}", *flags)[1]
        print(f"peak memory, {name}: {table[name]:.0f} MB", flush=True)
    return table


START_UP = """
import sys, time
import core, q2a
def first(*args):
    raise SystemExit(0)
core.train_step = first
q2a.main(["--smoke", "--out", sys.argv[1]])
"""


def processes(short, rounds):
    """Peak memory, seconds to the first step, and seconds of question 1, each in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        found = {"peak_memory_mb": memory(out, 160, short)}
        found["seconds_to_first_step"] = statistics.median(child(["-c", START_UP], out)[0] for _ in range(rounds))
        if not short:
            found |= {f"seconds_{q}": child([f"{q}.py"], "--out", out)[0] for q in ("q1a", "q1b")}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--part", choices=("steps", "sampling", "bounds", "processes"), help="all, unless given")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch-size", type=int, default=32, help="of the measured steps")
    parser.add_argument("--out", default="results/bench")
    args = parser.parse_args()
    args.started, device = time.monotonic(), core.choose_device(args.device)
    args.device, args.precision, short = device, core.choose_precision("auto", device), args.short
    modes = ["fp32", *(["bf16"] if args.precision == "bf16" else [])]  # one that is emulated has no row
    rounds, steps = (1, 1) if short else (5, 4 if device == "cpu" else 50)
    job = argparse.Namespace(data="synthetic", data_root="data", seed=0, evaluate=None, limit=48 if short else 4000)
    vars(job).update(epochs=1 if short else 3, device=device, precision=args.precision)
    parts = {
        "steps": lambda: training_speed(device, args.batch_size, rounds, steps, modes),
        "sampling": lambda: sampling(device, 4 if short else 100, rounds),
        "bounds": lambda: times_to_bound(job, 1 if short else 3),
        "processes": lambda: processes(short, rounds) if device == "cpu" and sys.platform != "win32" else {},
    }
    found = {name: part() for name, part in parts.items() if args.part in (None, name)}
    metrics = core.describe_run("bench", args, {"name": "random images; bounds: synthetic"}) | found
    folder = core.make_folder(Path(args.out))
    core.write_metrics(folder, args, metrics)  # with the seconds
    text = report(metrics)
    core.write_whole(folder / "report.md", lambda file: file.write(text.encode()))
    print(text)


def report(metrics):
    """The tables of metrics.json in words, of those parts that were measured."""
    env = metrics["env"]
    text = f"""# Speed

{env["device"]}, threads: {env["threads"]}, torch {env["torch"]}; medians, of rounds or of seeds, in one run of
{metrics["seconds"]:.0f} s.
"""
    if "steps" in metrics:
        rows = "\n".join(
            f"| {script} | {mode} | {r['images_per_s']:,.0f} | {r['times_plain']:.2f} | {r['of_product_rate']:.0%} |"
            for script, row in metrics["steps"].items()
            for mode, r in row.items()
            if isinstance(r, dict) and "images_per_s" in r
        )
        looks = ", ".join(f"{row['looks_of_training_time']:.0%} ({name})" for name, row in metrics["steps"].items())
        text += f"""
## A step of training, batches of {metrics["args"]["batch_size"]}

| model | training step | images/s | times plain | of the rate of a large matrix product |
|---|---|---|---|---|
{rows}

plain: fp32, eager, a DataLoader over a TensorDataset, the loss looked at each step; same network. The product's rate is
measured in the same precision and run, the step's operations are counted by torch. Looks at the three splits (fp32)
take, of the time of 20 epochs at SVHN's sizes: {looks}.
"""
    if "bounds" in metrics:
        found, rows = metrics["bounds"], []
        plain = statistics.median(next(iter(found["seconds"].values())))
        for name, seconds in found["seconds"].items():
            listed, middle = ", ".join(f"{s:.0f}" for s in seconds), statistics.median(seconds)
            missed = "" if all(found["reached"][name]) else " (not reached)"
            rows.append(f"| {name} | {middle:.0f}{missed} | {middle / plain:.2f} | {listed} |")
        bounds, table = ", ".join(f"{bound:.3f}" for bound in found["plain_bound_bpd"]), "\n".join(rows)
        text += f"""
## Seconds of training until 2b's validation is below the plain recipe's last bound

| recipe | seconds, median over seeds | of plain | each seed |
|---|---|---|---|
{table}

synthetic, 4,000 training images; plain sees each three times and ends at {bounds} bits/dim. Seconds of training steps;
looks, every ten steps, are not counted, and a time is late by ten steps at most.
"""
    if "sampling" in metrics:
        rows = "\n".join(
            f"| {name} | {s['wavefront_s']:.2f} | {s['raster_s']:.2f} "
            f"| {s['identical']} | {s['one_whole_pass_s']:.2f} |"
            for name, s in metrics["sampling"].items()
        )
        text += f"""
## Sampling

| samples | wavefronts, s | raster order, one position a step, s | identical | one whole pass, s |
|---|---|---|---|---|
{rows}

Raster order with whole passes, as in the textbook, takes 64 (flow) or 1,024 (decoder) of those.
"""
    if metrics.get("processes"):
        text += "\n## Memory and seconds\n"
    for key, value in metrics.get("processes", {}).items():
        shown = ", ".join(f"{k} {v:.0f}" for k, v in value.items()) if isinstance(value, dict) else f"{value:.1f}"
        text += f"\n{key.replace('_', ' ')}: {shown}\n"
    return text


if __name__ == "__main__":
    main()
