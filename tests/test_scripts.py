"""The scripts as a user runs them: the real commands, the files they leave, bad input, and the notebook route."""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import core
import readme_table

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("q1a", "q1b", "q2a", "q2b", "bonus")
FIGURES = {
    "q1a": {"curves", "samples", "evidence"}, "q1b": {"curves", "samples", "latents", "iwae"},
    "q2a": {"curves", "samples", "interpolations", "reconstructions"},
    "q2b": {"curves", "samples", "interpolations", "reconstructions", "experiments", "samples_2a_2b"},
    "bonus": {"curves", "samples", "interpolations", "reconstructions", "lossy", "neighbours", "receptive_fields"},
}  # fmt: skip
BOUND = {"neg_elbo_bpd", "neg_elbo_se_bpd", "kl_bpd", "recon_bpd"}


def run(*command, folder=ROOT, **environment):
    environment = {**os.environ, "MPLBACKEND": "agg", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The results folder of one --smoke run of every script, by the command that the README gives, and its output."""
    out = tmp_path_factory.mktemp("out")

    def run_all(scripts):
        return {s: run(f"{s}.py", "--smoke", "--device", "cpu", "--out", out, OMP_NUM_THREADS="1") for s in scripts}

    with ThreadPoolExecutor(2) as pool:  # 2b compares itself with 2a, which has to be there first
        first, second = pool.map(run_all, (("q2a", "q2b", "q1a"), ("bonus", "q1b")))
    for done in (first | second).values():
        assert done.returncode == 0, done.stderr
    return out / "smoke", {script: done.stdout for script, done in (first | second).items()}


def results(folder, script):
    return json.loads((folder / script / "metrics.json").read_text("utf-8"))


def numbers(value):
    """All numbers in a nested structure of metrics."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_run_leaves_all_its_files(smoke, script):
    folder, outputs = smoke
    names = {path.name for path in (folder / script).iterdir()}
    own = {"metrics.json", "report.md", "checkpoint.pt", "progress"}
    assert names == own | {f"{name}.png" for name in FIGURES[script]}
    assert all(path.stat().st_size < 1_000_000 for path in (folder / script).glob("*.png"))
    first, *rest = outputs[script].splitlines()
    assert first.startswith(script) and "--device cpu" in first and "--seed 0" in first
    assert sum(line.startswith("epoch") for line in rest) >= 2
    report = (folder / script / "report.md").read_text("utf-8")
    assert {match for match in re.findall(r"\((\w+)\.png\)", report)} == FIGURES[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_say_what_ran_on_what_and_are_finite(smoke, script):
    metrics = results(smoke[0], script)
    images = {"test_kl_per_position_bits", "check_prior_nats", "test_codecs_bpd"}
    codes = {"receptive_fields", "another_code_costs_bpd", "another_code_costs_se_bpd"}
    more = {"q2a": images, "q2b": images | {"against_2a"}, "bonus": images | codes}
    assert set(metrics) - more.get(script, set()) == {
        "script", "args", "data", "env", "params", "seconds", "curves", "final",
    }  # fmt: skip
    assert metrics["script"] == script and metrics["args"]["seed"] == 0
    assert {"torch", "device", "python"} <= set(metrics["env"])
    described = metrics["data"]["data1"] if script == "q1a" else metrics["data"]
    assert {"name", "train", "valid", "test", "sha256"} <= set(described)
    assert all(math.isfinite(n) for n in numbers(metrics))


def check_bound(bound):
    assert bound["neg_elbo_bpd"] == pytest.approx(bound["kl_bpd"] + bound["recon_bpd"], abs=1e-6)
    assert set(bound) >= BOUND


def test_metrics_of_q1a(smoke):
    final = results(smoke[0], "q1a")["final"]
    assert set(final) == {f"{data}_{decoder}" for data in ("data1", "data2") for decoder in ("diagonal", "isotropic")}
    for bound in final.values():
        check_bound(bound)
        assert bound["neg_elbo_bpd"] > bound["floor_bpd"] - 0.01


def test_q1a_says_that_the_code_is_used_only_where_taking_it_away_costs():
    import q1a

    points = torch.from_numpy(q1a.make_points("data2")[:4000]).float()
    log_p = -q1a.cross_entropy("data2", points)
    axis = torch.tensor([0.5**0.5, 0.5**0.5])
    along = (points - torch.tensor([1.0, 2.0])) @ axis  # the long axis, std 5: the exact posterior is known

    def encoder(x):  # the exact posterior for decoder noise 1: z1 = the long axis / 5, with std 1/5
        mu = torch.stack([(x - torch.tensor([1.0, 2.0])) @ axis * 24**0.5 / 25, torch.zeros(len(x))], 1)
        return mu, torch.tensor([[-math.log(5), 0.0]]).expand(len(x), 2)

    def decoder(z):
        return torch.tensor([1.0, 2.0]) + 24**0.5 * z[:, :1] * axis, torch.zeros(len(z), 1)

    def deaf(x):
        return torch.zeros(len(x), 2), torch.zeros(len(x), 2)

    assert along.std() > 4.8
    for listens, function in ((True, encoder), (False, deaf)):
        model = core.VAE(Call(function), Call(decoder), core.StandardNormal((2,)))
        found = q1a.look_into_code(model, points, log_p)
        found |= {"long_axis_r2": 0.0, "short_axis_r2": 0.0, "least_kl_bpd": 1.16}
        assert ("does not use" in q1a.answer("x", found)) != listens
        lower, upper = found["information_bpd"]
        if listens:  # the estimators against the closed form
            exact = math.log2(25) / 4
            assert lower - 4 * found["information_se_bpd"] <= exact <= upper + 4 * found["information_se_bpd"]
            assert abs(found["kl_same_points_bpd"] - exact) < 0.05 and upper - lower < 0.01
            assert abs(found["neg_iwae64_minus_floor_bpd"]) < 1e-5  # the bound is tight
            assert found["decoder_stds"] == [1.0]
        else:
            assert lower == pytest.approx(0, abs=1e-9) and upper == pytest.approx(0, abs=1e-9)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_metrics_of_q1b(smoke):
    final = results(smoke[0], "q1b")["final"]
    assert set(final) == {"diagonal", "isotropic"}
    for model in final.values():
        check_bound(model["train"])
        check_bound(model["test"])
        first = model["first100"]
        assert {"neg_elbo_bpd", "neg_elbo_se_bpd", "neg_iwae100_bpd", "neg_iwae100_se_bpd", "floor_bpd"} <= set(first)
        assert first["neg_iwae100_bpd"] <= first["neg_elbo_bpd"]
        assert model["test"]["neg_elbo_bpd"] > model["test"]["floor_bpd"]


@pytest.mark.parametrize("script", ("q2a", "q2b", "bonus"))
def test_metrics_of_question_2(smoke, script):
    metrics = results(smoke[0], script)
    assert "synthetic" in metrics["data"]["name"]
    assert metrics["curves"]["epoch"] == list(range(metrics["args"]["epochs"] + 1))
    best = metrics["curves"]["best_epoch"]
    for split in core.SPLITS:
        check_bound(metrics["final"][split])
        for key in core.CURVE_KEYS:
            assert len(metrics["curves"][split][key]) == len(metrics["curves"]["epoch"])
            assert metrics["curves"][split][key][best] == pytest.approx(metrics["final"][split][key], abs=1e-5)
    assert "synthetic" in (smoke[0] / script / "report.md").read_text("utf-8")


def test_bonus_compares_receptive_fields_on_one_budget(smoke):
    metrics = results(smoke[0], "bonus")
    rows = metrics["receptive_fields"]
    assert [(r["receptive_field"], r["latents"]) for r in rows] == [(1, 4), (2, 4), (3, 4), (3, 0)]
    assert rows[-1]["kl_bpd"] == 0 and all(r["kl_bpd"] > 0 for r in rows[:-1])
    report = (smoke[0] / "bonus" / "report.md").read_text("utf-8")
    for r in rows:
        check_bound(r)
        assert f"| {r['neg_elbo_bpd']:.4f} ±" in report
    import bonus

    rising = [{**r, "kl_bpd": kl} for r, kl in zip(rows, (0.1, 0.2, 0.3, 0), strict=True)]
    falling = [{**r, "kl_bpd": kl} for r, kl in zip(rows, (0.3, 0.2, 0.1, 0), strict=True)]
    noisy = [{**r, "kl_se_bpd": 0.2} for r in falling]
    sure = [[{**r, "kl_se_bpd": 0.01} for r in some] for some in (falling, rising)]
    assert "falls in every row" in bonus.table_text(sure[0])
    assert all("does not clearly fall" in bonus.table_text(some) for some in (sure[1], noisy))


@pytest.mark.parametrize("script", ("q2a", "q2b", "bonus"))
def test_evaluate_gives_the_trained_models_bound_on_any_file_and_trains_nothing(smoke, script, tmp_path):
    module, checkpoint = __import__(script), smoke[0] / script / "checkpoint.pt"
    reported, before = results(smoke[0], script), checkpoint.read_bytes()
    args = core.parse_args(script, ["--smoke", "--out", str(tmp_path)], core.IMAGE_DEFAULTS, core.IMAGE_SMOKE, True)[0]
    test = core.load_images(args).splits["test"].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "test.npz", test=test)  # the one split that is needed
    flags = ["--data", str(tmp_path / "test.npz"), "--out", str(tmp_path), "--device", "cpu", "--evaluate"]
    module.main([*flags, str(checkpoint)])
    metrics = json.loads((tmp_path / script / "evaluate" / "metrics.json").read_text("utf-8"))
    expected = reported["final"]["test"]["neg_elbo_bpd"]
    assert metrics["final"]["test"]["neg_elbo_bpd"] == pytest.approx(expected, abs=1e-5)
    assert checkpoint.read_bytes() == before and {p.name for p in (tmp_path / script).iterdir()} == {"evaluate"}
    np.savez(tmp_path / "test.npz", test=test[:, ::-1, :, ::-1] // 2)  # control: other images have another bound
    module.main([*flags, str(checkpoint)])
    metrics = json.loads((tmp_path / script / "evaluate" / "metrics.json").read_text("utf-8"))
    assert abs(metrics["final"]["test"]["neg_elbo_bpd"] - expected) > 0.01


def test_evaluate_refuses_what_is_no_checkpoint_of_this_script(smoke, tmp_path, capsys):
    import q2a

    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    for path, culprit in ((tmp_path / "broken.pt", "broken.pt"), (smoke[0] / "q2b" / "checkpoint.pt", "q2b")):
        with pytest.raises(SystemExit) as stop:
            q2a.main(["--evaluate", str(path), "--data", "synthetic", "--limit", "20", "--out", str(tmp_path)])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and culprit in message


def test_2b_report_compares_with_2a_of_the_same_arguments_only(smoke, tmp_path):
    import q2b

    report = (smoke[0] / "q2b" / "report.md").read_text("utf-8")
    assert "change against 2a" in report and "(experiments.png)" in report
    a, b = (results(smoke[0], script) for script in ("q2a", "q2b"))
    for key in core.CURVE_KEYS:  # both start at the same bound
        assert a["curves"]["test"][key][0] == pytest.approx(b["curves"]["test"][key][0], abs=1e-6)
    found = b["against_2a"]
    expected = b["final"]["test"]["neg_elbo_bpd"] - a["final"]["test"]["neg_elbo_bpd"]
    assert found["neg_elbo"]["bpd"] == pytest.approx(expected, abs=1e-5)
    assert found["neg_elbo"]["bpd"] == pytest.approx(found["kl"]["bpd"] + found["recon"]["bpd"], abs=1e-6)
    assert found["neg_elbo"]["bpd"] == pytest.approx(found["prior_alone"]["bpd"] + found["rest"]["bpd"], abs=1e-6)
    args = argparse.Namespace(**b["args"])
    assert q2b.load_2a(args, b["data"], smoke[0] / "q2a")[0] is not None
    for wrong, culprit in ((argparse.Namespace(**{**b["args"], "lr": 0.5}), "lr"), (args, "data")):
        model, reason = q2b.load_2a(wrong, {}, smoke[0] / "q2a")
        assert model is None and culprit in reason and "not compared" in reason
    assert "no results of 2a" in q2b.load_2a(args, b["data"], tmp_path)[1]


def test_verdict_of_2b_follows_the_measurements():
    import q2b

    def found(total, alone):
        changes = {"neg_elbo": total, "prior_alone": alone, "rest": total - alone, "kl": total / 2, "recon": total / 2}
        return {k: {"bpd": v, "se_bpd": 0.01} for k, v in changes.items()}

    assert "lowers −ELBO" in q2b.verdict(found(-0.3, -0.1)) and "The rest, -0.2" in q2b.verdict(found(-0.3, -0.1))
    assert "raises −ELBO" in q2b.verdict(found(0.3, 0.0))
    assert "does not measurably change −ELBO" in q2b.verdict(found(-0.01, 0.0))


def test_without_training_or_with_a_deaf_encoder_2b_claims_no_difference(smoke, tmp_path):
    """Zero epochs: both models are the same. A deaf encoder: z tells nothing, and both priors are as good."""
    import q2b

    args = argparse.Namespace(**{**results(smoke[0], "q2b")["args"], "epochs": 0, "clock": core.Clock()})
    splits = {k: torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8) for k in core.SPLITS}
    for deaf in (False, True):
        models = []
        for make in (q2b.make_2a, q2b.make_model):
            torch.manual_seed(0)
            models.append(make(args))
            if deaf:
                for parameter in models[-1].encoder.net[-1].parameters():
                    torch.nn.init.zeros_(parameter)
        found = q2b.experiments(args, *models, splits, None)
        assert "does not measurably change −ELBO" in q2b.verdict(found)
        assert "does not remove" in q2b.report(found)
        if deaf:
            assert found["2b"]["information_bits"] == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("mistake", ["log-determinant dropped", "wrong variance"])
def test_a_wrong_prior_is_found_by_the_runs_own_check(mistake, smoke):
    class Dropped(core.FlowPrior):
        def z_to_eps(self, z):
            eps, log_det = super().z_to_eps(z)
            return eps, 0 * log_det

    class Wide(core.FlowPrior):
        def log_prob(self, z):
            return super().log_prob(z * math.exp(-0.5))

    torch.manual_seed(0)
    right = core.FlowPrior((2, 8, 8), 8)
    torch.nn.init.normal_(right.net[-1].weight, 0, 0.1)
    wrong = {"log-determinant dropped": Dropped, "wrong variance": Wide}[mistake]((2, 8, 8), 8)
    wrong.load_state_dict(right.state_dict())
    metrics = results(smoke[0], "q2b")
    reports = [
        core.image_report("x", {**metrics, "check_prior_nats": core.check_prior(p)}) for p in (right, wrong)
    ]  # fmt: skip
    assert core.check_prior(right) < 1e-9 and "CHECK FAILED" not in reports[0]
    assert core.check_prior(wrong) > 0.1 and "CHECK FAILED" in reports[1]


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(smoke, tmp_path, one_thread):
    """Of q2b; of question 1 the next test says the same."""
    import q2b

    for name, seed in (("same", 0), ("other", 1)):
        q2b.main(["--smoke", "--device", "cpu", "--seed", str(seed), "--out", str(tmp_path / name)])
    first = results(smoke[0], "q2b")
    assert results(tmp_path / "same" / "smoke", "q2b")["final"] == first["final"]
    assert results(tmp_path / "same" / "smoke", "q2b")["curves"] == first["curves"]
    assert results(tmp_path / "other" / "smoke", "q2b")["final"] != first["final"]


def test_several_seeds_are_the_runs_of_each_seed_with_mean_and_deviation(smoke, tmp_path, capfd):
    import q1a

    q1a.main(["--smoke", "--seeds", "2", "--out", str(tmp_path)])
    assert "seed 1: " in capfd.readouterr().out
    folder = tmp_path / "smoke" / "q1a"
    both, second = (json.loads((f / "metrics.json").read_text("utf-8")) for f in (folder, folder / "seed_1"))
    alone = results(smoke[0], "q1a")
    assert both["final"] == alone["final"] == both["seeds"]["0"] and both["seeds"]["1"] == second["final"]
    values = [both["seeds"][k]["data2_diagonal"]["neg_elbo_bpd"] for k in "01"]
    assert values[0] != values[1]
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    row = next(
        line for line in (folder / "report.md").read_text("utf-8").split("## 2 seeds")[1].splitlines()
        if line.startswith("| data2_diagonal")
    )  # fmt: skip
    assert row.startswith(f"| data2_diagonal | {mean:.4f} ± {deviation:.4f} |")
    assert "seeds" not in (folder / "seed_1" / "report.md").read_text("utf-8")


def test_checkpoint_loads_safely_and_gives_the_reported_bound(smoke):
    checkpoint = torch.load(smoke[0] / "q2b" / "checkpoint.pt", weights_only=True)
    model = core.ImageVAE(checkpoint["args"]["latents"], core.FlowPrior)
    model.load_state_dict(checkpoint["state"])
    args = core.parse_args(
        "q2b",
        ["--smoke", "--device", "cpu", "--out", str(smoke[0].parent)],
        core.IMAGE_DEFAULTS,
        core.IMAGE_SMOKE,
        True,
    )[0]
    bound = core.evaluate_splits(model, core.load_images(args).splits)["test"]
    assert bound["neg_elbo_bpd"] == pytest.approx(results(smoke[0], "q2b")["final"]["test"]["neg_elbo_bpd"], abs=1e-5)


def test_offline_svhn_says_what_is_missing(tmp_path):
    done = run(
        "q2b.py", "--epochs", 1, "--out", tmp_path / "out", "--data-root", tmp_path / "data",
        https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9",
    )  # fmt: skip
    last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(last) == 1
    assert all(word in last[0] for word in ("train_32x32.mat", "test_32x32.mat", "--data synthetic"))


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        core.write_whole(path, write)
    assert path.read_text("utf-8") == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_pasted_into_a_notebook_waits_for_main(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel.json"])
    monkeypatch.chdir(tmp_path)
    cell = {"__name__": "__main__"}  # no __file__, as in a notebook
    exec(compile((ROOT / f"{script}.py").read_text("utf-8"), "<cell>", "exec"), cell)
    assert not list(tmp_path.iterdir())  # pasting starts nothing
    if script == "q1a":
        cell["main"](["--smoke"])
        assert (tmp_path / "results" / "smoke" / "q1a" / "report.md").exists()
        args, _ = core.parse_args("q1a", None, cell["DEFAULTS"], cell["SMOKE"])  # the kernel's own flags are not ours
        assert args.epochs == cell["DEFAULTS"]["epochs"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("given, seen", [(None, "1"), ("0", "0")])
def test_before_torch_is_imported_it_is_told_to_fall_back_where_mps_lacks_an_operator(script, given, seen):
    watch = """import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
import """
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ENABLE_MPS_FALLBACK"}
    environment |= {"PYTORCH_ENABLE_MPS_FALLBACK": given} if given else {}
    for what, expected in ((script, seen), ("torch", str(given))):  # and with torch first nothing is set
        command = [sys.executable, "-c", watch + what]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout == f"{expected}\n"


def test_every_command_in_the_readme_parses(monkeypatch):
    monkeypatch.setattr(core, "make_folder", lambda path: path)
    import bonus
    import q2b

    commands = re.findall(r"python (q\w+|bonus)\.py([^`\n#&|]*)", (ROOT / "README.md").read_text("utf-8"))
    assert {script for script, _ in commands} >= set(SCRIPTS)
    for script, flags in commands:
        flags = [] if "…" in flags else shlex.split(flags)
        more = {"bonus": bonus.flags, "q2b": q2b.flags}.get(script, lambda add: None)
        core.parse_args(script, flags, {}, {}, images=not script.startswith("q1"), more=more)
    with pytest.raises(SystemExit):
        core.parse_args("q2b", ["--epoch", "1"], {}, {}, images=True)


def test_results_table_of_the_readme_is_the_published_results():
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = list(readme_table.rows())
    assert len(lines) >= 6
    for line in lines:
        assert line in readme, f"README.md lacks the row {line}"


def test_tests_and_files_named_in_the_readme_exist_and_its_sizes_are_about_right():
    readme = (ROOT / "README.md").read_text("utf-8")
    source = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", readme))
    assert len(names) > 12 and all(f"def {name}(" in source for name in names)
    for path in re.findall(r"\((results/[^)]*\.png)\)", readme):
        assert (ROOT / path).exists()
    sizes = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M)
    assert {name for name, _ in sizes} == {path.name for path in ROOT.glob("*.py")}
    for name, lines in sizes:
        assert int(lines) == pytest.approx(len((ROOT / name).read_text("utf-8").splitlines()), rel=0.05, abs=9)
