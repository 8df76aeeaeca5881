"""The scripts as a user runs them: what a run leaves, its numbers, --evaluate, --samples, and the flags of training."""

import copy
import importlib
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import bonus
import core
from conftest import ROOT, SCRIPTS, noise_file, results

IMAGES = ("q2a", "q2b", "bonus")


def all_in(metrics, kind):
    """Every part of nested metrics that is of this kind."""
    parts = metrics.values() if isinstance(metrics, dict) else metrics if isinstance(metrics, list) else ()
    return [metrics] * isinstance(metrics, kind) + [found for part in parts for found in all_in(part, kind)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_smoke_run_leaves_its_files_and_its_report_names_its_figures(smoke, script):
    folder, printed = smoke[0] / script, smoke[1][script]
    figures = set(re.findall(r"\]\((.*?)\)", (folder / "report.md").read_text("utf-8")))
    trainings = {path.stem for path in folder.glob("*.pt")}
    tables = {"curves.csv" if name == "checkpoint" else f"{name}_curves.csv" for name in trainings}
    files = {f"{name}.pt" for name in trainings} | tables | figures | {"metrics.json", "report.md"}
    assert {path.name for path in folder.iterdir()} == files and trainings and len(figures) >= 3
    for name in figures:
        picture = Image.open(folder / name).convert("RGB")
        assert min(picture.size) > 100 and len(picture.getcolors(2**24)) > 20, name
    for name in trainings:
        saved = core.read_checkpoint(folder / f"{name}.pt", script)
        assert saved["args"]["smoke"] is True and saved["state"].keys() == saved["weights"].keys()
    assert printed.startswith(f"{script} --epochs") and printed.count("-ELBO bits/dim") >= 2 * len(trainings)


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_are_finite_a_bound_is_its_two_terms_and_curves_end_where_it_lies(smoke, script):
    metrics = results(smoke[0], script)
    assert metrics["script"] == script and metrics["args"]["seed"] == 0 and metrics["params"] > 1000
    assert all(math.isfinite(number) for number in all_in(metrics, (int, float)))
    bounds = [found for found in all_in(metrics["final"], dict) if "recon_bpd" in found]
    assert bounds and all(b["neg_elbo_bpd"] == pytest.approx(b["kl_bpd"] + b["recon_bpd"], abs=1e-6) for b in bounds)
    for curves in (found for found in all_in(metrics["curves"], dict) if "step" in found):
        best = curves["step"].index(curves["best_step"])
        assert curves["valid"]["neg_elbo_bpd"][best] == min(curves["valid"]["neg_elbo_bpd"])
        ends = {metrics["args"]["epochs"]} | ({1} if script == "q1b" else set())  # 1B's short run: a fifth, at least 1
        assert curves["step"][0] == 0 and curves["epoch"][-1] in ends
        if script in IMAGES:  # so few images that a point of a curve sees all of validation and test
            for split, key in ((split, key) for split in core.SPLITS for key in core.CURVE_KEYS):
                assert curves[split][key][best] == pytest.approx(metrics["final"][split][key], abs=1e-5)


def test_2b_is_compared_with_2a_and_the_bonus_with_no_code_on_the_same_images(smoke):
    a, b, lossy = (results(smoke[0], script) for script in IMAGES)
    found, bits = b["against_2a"], b["against_2a"]["kl_bits"]
    for term in ("neg_elbo", "kl", "recon"):
        change = b["final"]["test"][f"{term}_bpd"] - a["final"]["test"][f"{term}_bpd"]
        assert found[term]["bpd"] == pytest.approx(change, abs=1e-5)
        assert a["curves"]["test"][f"{term}_bpd"][0] == pytest.approx(b["curves"]["test"][f"{term}_bpd"][0], abs=1e-6)
    assert found["neg_elbo"]["bpd"] == pytest.approx(found["prior_alone"]["bpd"] + found["rest"]["bpd"], abs=1e-6)
    assert found["prior_alone"]["bpd"] == pytest.approx((bits["2a_fitted_flow"] - bits["2a"]) / 3072, abs=1e-6)
    for name, metrics in (("2a", a), ("2b", b)):
        assert bits[name] / 3072 == pytest.approx(metrics["final"]["test"]["kl_bpd"], abs=1e-5)
    assert "going on from" in smoke[1]["q2b"] and "\n2a  epoch" not in smoke[1]["q2b"]  # 2a had been trained
    without, bound = lossy["no_code"], lossy["final"]["test"]["neg_elbo_bpd"]
    assert without["kl_bpd"] == 0 and without["above_bpd"] == pytest.approx(without["neg_elbo_bpd"] - bound, abs=1e-6)


@pytest.mark.parametrize("script", IMAGES)
def test_evaluate_measures_the_trained_model_on_other_images_and_trains_nothing(
    smoke, script, tmp_path, undrawn, monkeypatch
):
    monkeypatch.setattr(core, "fit", None)
    checkpoint, images = smoke[0] / script / "checkpoint.pt", np.random.RandomState(1).randint(0, 99, (9, 32, 32, 3))
    np.savez(tmp_path / "x.npz", test=images.astype(np.uint8))
    saved = core.read_checkpoint(checkpoint)
    if script == "bonus":
        model = bonus.LossyVAE(4, bonus.DEFAULTS["receptive_field"], bonus.DEFAULTS["prior"])
    else:
        model = core.ImageVAE(4, core.FlowPrior if script == "q2b" else core.StandardNormal)
    model.load_state_dict(saved["state"])
    terms = core.evaluate(model, torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.uint8))
    before = checkpoint.read_bytes()
    for run in (checkpoint, checkpoint.parent):
        flags = ["--evaluate", str(run), "--data", str(tmp_path / "x.npz"), "--out", str(tmp_path), "--device", "cpu"]
        importlib.import_module(script).main(flags)
        metrics = results(tmp_path, f"{script}/evaluate")
        assert metrics["final"]["test"] == pytest.approx(core.in_bits(terms, 3072), abs=1e-5)
    assert metrics["curves"] == saved["curves"] and metrics["args"]["latents"] == 4
    assert checkpoint.read_bytes() == before and not list(tmp_path.rglob("*.pt"))
    assert {path.name for path in (tmp_path / script).iterdir()} == {"evaluate", "evaluate.1", ".evaluate.lock"}


@pytest.mark.parametrize("script", ("q2a", "bonus"))
def test_of_more_than_a_hundred_samples_no_two_are_alike(smoke, script, tmp_path, monkeypatch):
    drawn = {}

    def draw_levels(model, z, *key, same=False):  # in place of pixels drawn one after the other, what they depend on
        levels = core.quantise(z.flatten(1).repeat(1, 12).view(-1, 3, 32, 32) / 3)
        if key[0] == "single pixels":
            assert key not in drawn
            drawn[key] = levels
        return levels

    monkeypatch.setattr(bonus.LossyVAE, "draw_levels", draw_levels)
    flags = ["--evaluate", str(smoke[0] / script), "--out", str(tmp_path), "--device", "cpu", "--samples", "205"]
    importlib.import_module(script).main(flags)
    paths = sorted((tmp_path / script / "evaluate/samples").iterdir())
    assert [path.name for path in paths] == [f"{k:04d}.png" for k in range(205)]
    images = torch.from_numpy(np.stack([Image.open(path) for path in paths])).permute(0, 3, 1, 2)
    assert len(images.unique(dim=0)) == 205 and (script == "q2a" or torch.equal(images, torch.cat([*drawn.values()])))


@pytest.mark.parametrize("script, more", [("q2a", []), ("q2b", ["--compare"]), ("bonus", [])])
def test_the_flags_of_training_reach_it_and_handout_sets_the_handouts(script, more, tmp_path, monkeypatch):
    seen = []

    def fit(model, splits, recipe, *options):
        seen.append(copy.copy(recipe))
        raise KeyboardInterrupt

    def recipe_of(*flags):
        data = ["--data", noise_file(tmp_path), "--latents", "2", "--device", "cpu", "--out", str(tmp_path)]
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(script).main([*data, *more, "--precision", "bf16", *flags])
        return seen[-1]

    monkeypatch.setattr(core, "fit", fit)
    usual = core.Recipe(20, 16, 2e-3, 0.012, "trapezoid", 0, 0, "bf16", 0.95)
    assert recipe_of() == usual and (recipe_of("--epochs", "3000").kl_warmup > 0.5) == (script != "bonus")
    flags = "--epochs 3 --batch-size 7 --lr 0.5 --muon-lr 0.25 --kl-warmup 0.125 --seed 9 --precision fp32"
    assert recipe_of(*flags.split()) == core.Recipe(3, 7, 0.5, 0.25, "trapezoid", 0.125, 9, "fp32")
    handout = core.Recipe(20, 32, 2e-4, 0.0, "constant", 0, 0, "bf16")
    assert recipe_of("--handout") == handout and recipe_of("--lr", "0.5", "--handout").lr == 0.5


def test_what_is_not_typed_follows_the_length_of_a_training():
    for flags, examples, expected in (
        ("3", 4_000, (16, 2e-3, 0.012, 0, 0.95)), ("0", 30, (16, 2e-3, 0.012, 0, 0.95)),
        ("4", 16_000, (16, 8.66e-4, 5.2e-3, 0.812, 0.978)), ("4", 65_931, (16, 4.27e-4, 2.56e-3, 0.954, 0.98)),
        ("20", 65_931, (64, 3.82e-4, 2.29e-3, 0.964, 0.98)),
        ("4 --lr 0.5 --muon-lr 0 --kl-warmup 0 --batch-size 7", 65_931, (7, 0.5, 0, 0, 0.98)),
    ):  # fmt: skip
        args = core.Parser("q2b", images=True).parse_args(f"--epochs {flags}".split())
        filled, recipe = core.image_recipe(args, examples, "fp32")
        found = dict(batch_size=recipe.batch_size, lr=recipe.lr, muon_lr=recipe.muon_lr, kl_warmup=recipe.kl_warmup)
        assert (*found.values(), round(recipe.momentum, 3)) == expected and vars(filled) == vars(args) | found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_pasted_into_a_notebook_waits_for_main(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel.json"])
    monkeypatch.chdir(tmp_path)
    cell = {"__name__": "__main__"}  # no __file__, as in a notebook
    exec(compile((ROOT / f"{script}.py").read_text("utf-8"), "<cell>", "exec"), cell)
    args, _ = core.parse_args(core.Parser(script, images=script in IMAGES), None, cell["DEFAULTS"], cell["SMOKE"])
    assert args.epochs == cell["DEFAULTS"]["epochs"] and not list(tmp_path.iterdir())
