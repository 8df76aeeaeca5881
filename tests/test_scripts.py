"""The scripts as a user runs them: the real commands, the files they leave, and what their reports say."""

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import bonus
import core
import q1a
import q2a
import q2b
from conftest import ROOT, SCRIPTS, image_args, nowhere, refused, results

FIGURES = {
    "q1a": {"curves", "samples", "evidence"}, "q1b": {"curves", "samples", "latents", "iwae"},
    "q2a": {"curves", "samples", "interpolations", "reconstructions"},
    "q2b": {"curves", "samples", "interpolations", "reconstructions", "experiments", "samples_2a_2b"},
    "bonus": {"curves", "samples", "interpolations", "reconstructions", "lossy", "neighbours", "receptive_fields"},
}  # fmt: skip
TRAININGS = {  # checkpoints in the folder progress: one for each training but the script's own
    "q1a": {f"{data}_{decoder}" for data in ("data1", "data2") for decoder in ("diagonal", "isotropic")},
    "q1b": {"short_run", "diagonal", "isotropic"}, "q2a": set(), "q2b": {"flow_on_2a"},
    "bonus": {"receptive_field_1", "receptive_field_2", "receptive_field_3", "no_code"},
}  # fmt: skip
IMAGES = ("q2a", "q2b", "bonus")
BOUND = {"neg_elbo_bpd", "neg_elbo_se_bpd", "kl_bpd", "kl_se_bpd", "recon_bpd"}


def without_hash(path):
    """The name of a file; that of 2b's flow holds a hash of the weights of its 2a."""
    return re.sub("2a_[0-9a-f]{8}", "2a", path.name)


def numbers(value):
    """All numbers in a nested structure of metrics."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def check_bound(bound):
    assert bound["neg_elbo_bpd"] == pytest.approx(bound["kl_bpd"] + bound["recon_bpd"], abs=1e-6)
    assert set(bound) >= BOUND


def without_seconds(curves):
    return {k: v for k, v in curves.items() if k != "seconds"}


# ---------------------------------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_run_leaves_all_its_files(smoke, script):
    folder, outputs = smoke
    names = {path.name for path in (folder / script).iterdir()}
    own = {"metrics.json", "report.md", "checkpoint.pt"} | ({"progress"} if TRAININGS[script] else set())
    own |= {"curves.csv"} if script in IMAGES else set()
    assert names == own | {f"{name}.png" for name in FIGURES[script]}
    sides = {f"{name}{end}" for name in TRAININGS[script] for end in (".pt", "_curves.csv")}
    assert {without_hash(path) for path in (folder / script / "progress").glob("*")} == sides
    assert all(path.stat().st_size < 1_000_000 for path in (folder / script).glob("*.png"))
    first, *rest = outputs[script].splitlines()
    assert first.startswith(script) and "--device cpu" in first and "--seed 0" in first
    assert sum(bool(re.search(r"epoch +\d+\.\d\d  step +\d+  -ELBO bits/dim: train", line)) for line in rest) >= 2
    report = (folder / script / "report.md").read_text("utf-8")
    assert {match for match in re.findall(r"\((\w+)\.png\)", report)} == FIGURES[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_say_what_ran_on_what_and_are_finite(smoke, script):
    metrics = results(smoke[0], script)
    images = {"check_prior_nats", "test_codecs_bpd", "test_draw_se_bpd", "finished", "floor"}
    codes = {"receptive_fields", "no_code", "another_code_costs_bpd", "another_code_costs_se_bpd"}
    codes |= {"test_kl_per_position_bits"}
    more = {"q2a": images, "q2b": images | {"against_2a"}, "bonus": images | codes}
    assert set(metrics) - more.get(script, set()) == {
        "script", "args", "data", "env", "params", "seconds", "curves", "final", "failed",
    }  # fmt: skip
    assert metrics["script"] == script and metrics["args"]["seed"] == 0 and metrics["failed"] == {}
    assert {"torch", "device", "python"} <= set(metrics["env"]) and metrics.get("finished", True) is True
    described = metrics["data"]["data1"] if script == "q1a" else metrics["data"]
    assert {"name", "train", "valid", "test", "sha256"} <= set(described)
    assert all(math.isfinite(n) for n in numbers(metrics))


def test_metrics_of_q1a(smoke):
    final = results(smoke[0], "q1a")["final"]
    assert set(final) == TRAININGS["q1a"]
    for bound in final.values():
        check_bound(bound)
        assert bound["neg_elbo_bpd"] > bound["floor_bpd"] - 0.01


def test_metrics_of_q1b(smoke):
    final = results(smoke[0], "q1b")["final"]
    assert set(final) == {"diagonal", "isotropic"}
    for model in final.values():
        for split in core.SPLITS:
            check_bound(model[split])
        first = model["first100"]
        assert {"neg_elbo_bpd", "neg_elbo_se_bpd", "neg_iwae100_bpd", "neg_iwae100_se_bpd", "floor_bpd"} <= set(first)
        assert first["neg_iwae100_bpd"] <= first["neg_elbo_bpd"]
        assert model["test"]["neg_elbo_bpd"] > model["test"]["floor_bpd"]


@pytest.mark.parametrize("script", IMAGES)
def test_metrics_of_question_2(smoke, script):
    metrics = results(smoke[0], script)
    assert "synthetic" in metrics["data"]["name"]
    curves = metrics["curves"]
    assert curves["step"] == sorted(core.steps_to_look(curves["step"][-1]))
    assert curves["epoch"][0] == 0 and curves["epoch"][-1] == metrics["args"]["epochs"]
    best = curves["step"].index(curves["best_step"])
    assert curves["epoch"][best] == curves["best_epoch"]
    for split in core.SPLITS:  # so few images that a look sees all of validation and test
        check_bound(metrics["final"][split])
        for key in core.CURVE_KEYS:
            assert len(curves[split][key]) == len(curves["epoch"])
            assert curves[split][key][best] == pytest.approx(metrics["final"][split][key], abs=1e-5)
    assert "synthetic" in (smoke[0] / script / "report.md").read_text("utf-8")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_trainings_curves_are_a_table_too(smoke, script):
    folder, curves = smoke[0] / script, results(smoke[0], script)["curves"]
    tables = {"curves.csv": curves} if script in IMAGES else {}
    tables |= {f"progress/{name}_curves.csv": curves.get(name) for name in TRAININGS[script]}
    found = {path.relative_to(folder).with_name(without_hash(path)).as_posix(): path for path in folder.rglob("*.csv")}
    assert set(found) == set(tables)
    for name, of_training in tables.items():
        head, *rows = found[name].read_text().splitlines()
        assert head.startswith("step,epoch,train_neg_elbo_bpd,") and len(rows) >= 2
        if of_training:  # metrics.json has no curves of a start, a table's row and the like
            columns = [of_training["step"], of_training["epoch"]]
            columns += [of_training[split][key] for split in core.SPLITS for key in core.CURVE_KEYS]
            assert [[float(x) for x in row.split(",")] for row in rows] == [list(r) for r in zip(*columns, strict=True)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoint_loads_safely_and_is_of_its_script(smoke, script):
    saved = torch.load(smoke[0] / script / "checkpoint.pt", weights_only=True)
    keys = {"script", "args", "state"}
    assert set(saved) == (keys | {"curves", "finished", "must_match", "progress"} if script in IMAGES else keys)
    assert saved["script"] == script and saved["args"]["smoke"] is True
    if script not in IMAGES:
        assert set(saved["state"]) == set(results(smoke[0], script)["final"])


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(smoke, tmp_path, undrawn):
    """Of q2a; of question 1 the next test says the same."""
    for name, seed in (("same", 0), ("other", 1)):
        q2a.main(["--smoke", "--device", "cpu", "--seed", str(seed), "--out", str(tmp_path / name)])
    first, same, other = (results(f, "q2a") for f in (smoke[0], tmp_path / "same/smoke", tmp_path / "other/smoke"))
    assert same["final"] == first["final"] and other["final"] != first["final"]
    assert without_seconds(same["curves"]) == without_seconds(first["curves"])


def test_several_seeds_are_the_runs_of_each_seed_with_mean_and_deviation(smoke, tmp_path, undrawn):
    q1a.main(["--smoke", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path)])
    folder = tmp_path / "smoke" / "q1a"
    both, second = (json.loads((f / "metrics.json").read_text("utf-8")) for f in (folder, folder / "seed_1"))
    alone = results(smoke[0], "q1a")
    assert both["final"] == alone["final"] == both["seeds"]["0"] and both["seeds"]["1"] == second["final"]
    assert (both["args"]["seeds"], second["args"]["seed"], second["args"]["seeds"]) == (2, 1, 1)
    values = [both["seeds"][k]["data2_diagonal"]["neg_elbo_bpd"] for k in "01"]
    assert values[0] != values[1]
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    row = next(
        line for line in (folder / "report.md").read_text("utf-8").split("## 2 seeds")[1].splitlines()
        if line.startswith("| data2_diagonal")
    )  # fmt: skip
    assert row.startswith(f"| data2_diagonal | {mean:.4f} ± {deviation:.4f} |")
    assert "seeds" not in (folder / "seed_1" / "report.md").read_text("utf-8")


def test_a_figure_that_one_seed_cannot_draw_stops_no_other_seed(tmp_path, undrawn, monkeypatch):
    plot, drawn = q1a.plot_evidence, []

    def plot_evidence(*args):
        drawn.append(args)
        if len(drawn) == 1:
            raise ValueError("a mistake")
        plot(*args)

    monkeypatch.setattr(q1a, "plot_evidence", plot_evidence)
    with pytest.raises(SystemExit) as stop:
        q1a.main(["--smoke", "--epochs", "0", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path)])
    folder = tmp_path / "smoke" / "q1a"
    assert stop.value.code == 1 and set(results(folder, "")["failed"]) == {"evidence.png (seed 0)"}
    assert "Missing: evidence.png" in (folder / "report.md").read_text("utf-8")
    assert "Missing" not in (folder / "seed_1" / "report.md").read_text("utf-8")


def test_a_bound_below_its_floor_ends_the_run_with_status_1_and_is_named(tmp_path, undrawn, monkeypatch, capsys):
    monkeypatch.setattr(q2a, "synthetic_floor", lambda splits, nats: core.synthetic_floor(splits, nats - 1e5))
    flags = ["--smoke", "--epochs", "0", "--limit", "20", "--latents", "2", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        q2a.main(flags)
    name, folder = "a bound above its floor", tmp_path / "smoke/q2a"
    assert stop.value.code == 1 and capsys.readouterr().err.splitlines()[-1].startswith(f"error: missing: {name};")
    assert set(results(folder, "")["failed"]) == {name} and "a defect" in results(folder, "")["failed"][name]
    assert f"**Missing: {name}.**" in (folder / "report.md").read_text("utf-8")


def test_metrics_that_are_not_numbers_are_not_written(tmp_path):
    args = argparse.Namespace(started=0.0)
    core.write_metrics(tmp_path, args, {"x": 1.5})
    before = (tmp_path / "metrics.json").read_bytes()
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            core.write_metrics(tmp_path, args, {"x": 2.5, "y": [value]})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


# ----------------------------------------------------------------------------------------------------------- --evaluate


def levels_of_noise(model, z, *key, same=False):
    """In place of `bonus.LossyVAE.draw_levels`."""
    return torch.randint(0, 256, (len(z), 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("script", IMAGES)
def test_evaluate_gives_the_trained_models_bound_on_any_file_and_trains_nothing(
    smoke, script, tmp_path, unsaved, monkeypatch
):
    """From the one split that is needed; the whole path, with single samples (the bonus's are noise here)."""
    if script == "bonus":  # its pixels, drawn one after the other, take long, and nobody looks at these
        monkeypatch.setattr(bonus.LossyVAE, "draw_levels", levels_of_noise)
    module, checkpoint = importlib.import_module(script), smoke[0] / script / "checkpoint.pt"
    reported, before = results(smoke[0], script), checkpoint.read_bytes()
    test = core.load_images(image_args(script)).splits["test"].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "test.npz", test=test)
    flags = ["--data", str(tmp_path / "test.npz"), "--out", str(tmp_path), "--device", "cpu", "--evaluate"]
    module.main([*flags, str(checkpoint), "--samples", "3"])
    metrics = results(tmp_path, f"{script}/evaluate")
    expected = reported["final"]["test"]["neg_elbo_bpd"]
    assert metrics["final"]["test"]["neg_elbo_bpd"] == pytest.approx(expected, abs=1e-5)
    assert metrics["check_prior_nats"] < 1e-6 and metrics["failed"] == {} and metrics["finished"] is True
    assert all(metrics["args"][name] == reported["args"][name] for name in ("epochs", "batch_size", "latents", "seed"))
    assert without_seconds(metrics["curves"]) == without_seconds(reported["curves"])
    report = (tmp_path / script / "evaluate" / "report.md").read_text("utf-8")
    assert f"{expected:.4f} ±" in report and "was not finished" not in report
    assert checkpoint.read_bytes() == before and {p.name for p in (tmp_path / script).iterdir()} == {"evaluate"}
    assert not list(tmp_path.rglob("*.pt"))
    samples = sorted((tmp_path / script / "evaluate" / "samples").iterdir())
    assert [path.name for path in samples] == ["0000.png", "0001.png", "0002.png"]
    pictures = [np.asarray(Image.open(path)) for path in samples]
    assert all(x.shape == (32, 32, 3) and x.dtype == np.uint8 for x in pictures)
    assert not np.array_equal(pictures[0], pictures[1])


def test_evaluate_of_other_images_gives_another_bound(smoke, tmp_path, undrawn):
    checkpoint, reported = smoke[0] / "q2a" / "checkpoint.pt", results(smoke[0], "q2a")["final"]["test"]
    test = core.load_images(image_args("q2a")).splits["test"].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "test.npz", test=test[:, ::-1, :, ::-1] // 2)
    flags = ["--data", str(tmp_path / "test.npz"), "--out", str(tmp_path), "--device", "cpu", "--evaluate"]
    q2a.main([*flags, str(checkpoint)])
    found = results(tmp_path, "q2a/evaluate")["final"]["test"]
    assert abs(found["neg_elbo_bpd"] - reported["neg_elbo_bpd"]) > 0.01


def test_an_interrupted_runs_checkpoint_is_evaluated_and_called_unfinished(tmp_path, undrawn, monkeypatch):
    step, steps = core.train_step, []

    def interrupted(*args):
        steps.append(0)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*args)

    flags = ["--smoke", "--device", "cpu", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(core, "train_step", interrupted)
        patch.setattr(core, "KEEP_SECONDS", -1)
        with pytest.raises(KeyboardInterrupt):
            q2a.main(flags)
    folder = tmp_path / "smoke/q2a"
    q2a.main([*flags, "--evaluate", str(folder / "checkpoint.pt")])
    metrics = results(folder, "evaluate")
    assert "**was not finished**" in (folder / "evaluate/report.md").read_text("utf-8")
    assert metrics["finished"] is False and metrics["curves"]["step"] == [0, 1, 2]


# -------------------------------------------------------------------------------------------------------- 2b and bonus


def test_2b_report_compares_with_2a_on_the_same_images(smoke):
    report = (smoke[0] / "q2b" / "report.md").read_text("utf-8")
    assert "change against 2a" in report and "(experiments.png)" in report
    assert smoke[1]["q2b"].count("going on from") == 1 and "\n2a  epoch" not in smoke[1]["q2b"]  # 2a had been trained
    a, b = (results(smoke[0], script) for script in ("q2a", "q2b"))
    for key in core.CURVE_KEYS:  # both start at the same bound
        assert a["curves"]["test"][key][0] == pytest.approx(b["curves"]["test"][key][0], abs=1e-6)
    found = b["against_2a"]
    for term, key in (("neg_elbo", "neg_elbo_bpd"), ("kl", "kl_bpd"), ("recon", "recon_bpd")):
        expected = b["final"]["test"][key] - a["final"]["test"][key]
        assert found[term]["bpd"] == pytest.approx(expected, abs=1e-5)
    assert found["neg_elbo"]["bpd"] == pytest.approx(found["kl"]["bpd"] + found["recon"]["bpd"], abs=1e-6)
    assert found["neg_elbo"]["bpd"] == pytest.approx(found["prior_alone"]["bpd"] + found["rest"]["bpd"], abs=1e-6)
    bits = found["kl_bits"]
    assert bits["2a"] / 3072 == pytest.approx(a["final"]["test"]["kl_bpd"], abs=1e-5)
    assert bits["2b"] / 3072 == pytest.approx(b["final"]["test"]["kl_bpd"], abs=1e-5)
    alone = (bits["2a_fitted_flow"] - bits["2a"]) / 3072
    assert found["prior_alone"]["bpd"] == pytest.approx(alone, abs=1e-6)  # the decoder is frozen: all of it is KL
    for name in ("2a", "2b"):
        assert sum(map(sum, found["kl_per_position_bits"][name])) == pytest.approx(bits[name], rel=1e-4)
    assert q2b.verdict(found) in report


def test_bonus_reports_a_row_for_each_receptive_field(smoke):
    """That all are trained on one budget is in test_bonus.py."""
    rows = results(smoke[0], "bonus")["receptive_fields"]
    assert [r["receptive_field"] for r in rows] == [1, 2, 3] and all(r["kl_bpd"] > 0 for r in rows)
    report = (smoke[0] / "bonus" / "report.md").read_text("utf-8")
    for r in rows:
        check_bound(r)
        assert f"| {r['neg_elbo_bpd']:.4f} ±" in report


def test_bonus_compares_with_the_same_pixelcnn_without_a_code(smoke):
    metrics = results(smoke[0], "bonus")
    found, bound = metrics["no_code"], metrics["final"]["test"]["neg_elbo_bpd"]
    check_bound(found)
    assert found["kl_bpd"] == 0
    assert found["above_bpd"] == pytest.approx(found["neg_elbo_bpd"] - bound, abs=1e-6)
    kept = torch.load(smoke[0] / "bonus/progress/no_code.pt", weights_only=True)
    assert kept["curves"]["epoch"][-1] == metrics["args"]["epochs"]
    assert f"{found['above_bpd']:+.4f} ±" in (smoke[0] / "bonus" / "report.md").read_text("utf-8")


# ------------------------------------------------------------------------------------- devices, precision, notebooks


def test_choosing_a_device_makes_products_fp32():
    """As TORCH_ALLOW_TF32_CUBLAS_OVERRIDE does, which sets torch to TF32; choosing a device takes it back."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    core.choose_device("cpu")
    assert torch.get_float32_matmul_precision() == "highest" and torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("native", [False, True])
def test_bf16_without_hardware_for_it_is_warned_of_and_auto_avoids_it(native, monkeypatch, capsys):
    for unit in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: native, raising=False)
    assert core.choose_precision("auto", "cpu") == ("bf16" if native else "fp32")
    assert not capsys.readouterr().out
    assert core.choose_precision("bf16", "cpu") == "bf16"
    assert ("warning" in capsys.readouterr().out) != native
    assert core.choose_precision("fp32", "cpu") == "fp32" and not capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0) if native else (7, 5))
    assert core.choose_precision("auto", "cuda") == ("bf16" if native else "fp32")
    assert core.choose_precision("bf16", "mps") == "bf16" and "warning" in capsys.readouterr().out


def test_offline_svhn_says_what_is_missing(tmp_path, offline, capsys):
    flags = ["--epochs", "1", "--out", str(tmp_path / "out"), "--data-root", str(tmp_path / "data")]
    refused(capsys, lambda: q2b.main(flags), "train_32x32.mat", "test_32x32.mat", "--data synthetic")


def test_without_torchvision_only_svhn_is_missing(tmp_path, monkeypatch, capsys):
    """The runs of all scripts had no torchvision: see `nowhere`."""
    nowhere(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    refused(capsys, lambda: core.load_svhn(tmp_path), "torchvision::nms")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_pasted_into_a_notebook_waits_for_main(script, tmp_path, monkeypatch, unsaved):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel.json"])
    monkeypatch.chdir(tmp_path)
    cell = {"__name__": "__main__"}  # no __file__, as in a notebook
    exec(compile((ROOT / f"{script}.py").read_text("utf-8"), "<cell>", "exec"), cell)
    assert not list(tmp_path.iterdir())  # pasting starts nothing
    if script == "q1a":
        cell["main"](["--smoke"])
        assert (tmp_path / "results" / "smoke" / "q1a" / "report.md").exists()
        args, _ = core.parse_args(
            core.Parser("q1a"), None, cell["DEFAULTS"], cell["SMOKE"]
        )  # the kernel's flags are not ours
        assert args.epochs == cell["DEFAULTS"]["epochs"]


@pytest.mark.parametrize("given", [None, "0"])
def test_before_torch_is_imported_it_is_told_to_fall_back_where_mps_lacks_an_operator(given):
    watch = """import os, sys, types
for name in ("matplotlib", "matplotlib.pyplot"):  # which core imports first, and slowly
    sys.modules[name] = types.ModuleType(name)
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
import """
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ENABLE_MPS_FALLBACK"}
    environment |= {"PYTORCH_ENABLE_MPS_FALLBACK": given} if given else {}
    for what in (*SCRIPTS, "torch"):  # and with torch first nothing is set
        done = subprocess.run(
            [sys.executable, "-c", watch + what], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.stdout == f"{given if given or what == 'torch' else '1'}\n", what
