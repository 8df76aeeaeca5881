"""Training and evaluation: every example once, the best weights, looks spread over training, steps that are skipped."""

import csv
import itertools
import json
import math
import os

import numpy as np
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import core
import q2a
import q2b
from conftest import ROOT, Call, refused, train
from core import FlowPrior, ImageVAE, StandardNormal, Terms, VAE, evaluate, evaluation_batches, fixed_noise, in_bits


def point_splits():
    x = torch.randn(300, 2) * torch.tensor([2.0, 0.5])
    return dict(zip(core.SPLITS, x.split(100), strict=True))


def point_model():
    torch.manual_seed(0)
    return VAE(core.GaussianMLP((16,), nn.SiLU), core.GaussianMLP((16,), nn.SiLU), StandardNormal((2,)))


class Watched(VAE):
    """A VAE in the plane that notes, of each training step, its batch, its noise, the KL's weight, and what is done."""

    def __init__(self):
        mlps = (core.GaussianMLP((8,), nn.SiLU) for _ in range(2))
        super().__init__(*mlps, StandardNormal((2,)))
        self.seen, self.done = [], []

    def loss(self, data, kl_weight=1.0, done=0.0):
        self.done.append(done)
        state = torch.get_rng_state()
        self.seen.append((data.clone(), torch.randn(3), kl_weight))
        torch.set_rng_state(state)
        return super().loss(data, kl_weight)


# ------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_counts_every_example_once_whatever_the_batch_size(monkeypatch):
    """Of a model without noise, as a batch's noise is its own; the last batch is short, and one process of three."""

    class Mean(nn.Module):
        def forward(self, x, generator):
            mean = x.float().mean((1, 2, 3))
            return Terms(recon=mean, kl=mean**2)

    images = torch.randint(0, 256, (800, 3, 32, 32), dtype=torch.uint8)
    places = [i for batch in evaluation_batches(images) for i in range(800)[batch]]
    assert places == list(range(800)) and len(evaluation_batches(images)) == 3
    right = images.float().mean((1, 2, 3)).double()
    for size in (None, 800, 300, 7):
        if size:
            batches = [slice(start, start + size) for start in range(0, 800, size)]
            monkeypatch.setattr(core, "evaluation_batches", lambda x, batches=batches: batches)
        terms = evaluate(Mean(), images)
        assert torch.equal(terms.recon, right) and torch.allclose(terms.kl, right**2)
    means = [part.mean() for part in right.split(300)]
    assert not torch.allclose(sum(means) / 3, right.mean(), rtol=1e-9)  # control: a mean of means is another number
    parts = []
    for rank in range(3):
        monkeypatch.setattr(core, "rank_and_world", lambda rank=rank: (rank, 3))
        monkeypatch.setattr(core, "sum_over_processes", lambda x: x)
        parts.append(evaluate(Mean(), images).recon)
    assert torch.equal(sum(parts), right) and all((part != right).any() for part in parts)


def test_an_evaluation_depends_on_its_seed_and_batch_and_leaves_the_random_state_alone(monkeypatch):
    model, x = point_model(), torch.randn(50, 2)
    monkeypatch.setattr(
        core, "evaluation_batches", lambda x: [slice(start, start + 20) for start in range(0, len(x), 20)]
    )
    state = torch.get_rng_state()
    first = evaluate(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(evaluate(model, x).neg_elbo, first.neg_elbo)
    assert torch.equal(evaluate(model, x[:40]).neg_elbo, first.neg_elbo[:40])  # a batch's noise is its own
    assert not torch.allclose(evaluate(model, x[20:40]).neg_elbo, first.neg_elbo[20:40], rtol=0.01)
    assert not torch.equal(evaluate(model, x, seed=1).neg_elbo, first.neg_elbo)
    with torch.no_grad():
        by_hand = model(x[20:40], fixed_noise("evaluation", 0, 1)).neg_elbo
    assert torch.allclose(first.neg_elbo[20:40], by_hand.double(), rtol=1e-6)


def test_the_error_of_one_draw_is_that_of_the_noise_and_not_of_the_examples_spread():
    class Noisy(nn.Module):
        def forward(self, x, generator):
            return Terms(recon=100 * x[:, 0] + 3 * torch.randn(len(x), generator=generator), kl=torch.zeros(len(x)))

    model, x = Noisy(), torch.randn(4000, 2)
    found = core.error_of_one_draw(model, x, evaluate(model, x).neg_elbo)
    assert found == pytest.approx(3 / math.sqrt(4000) / (2 * math.log(2)), rel=0.1)  # 3 nats an example, 2 dimensions


def test_of_train_as_many_examples_are_reported_as_validation_has():
    splits = {k: torch.randn(n, 2) for k, n in (("train", 500), ("valid", 30), ("test", 40))}
    model = point_model()
    terms = core.evaluate_splits(model, splits)
    for split, n in (("train", 30), ("valid", 30), ("test", 40)):
        assert torch.equal(terms[split].neg_elbo, evaluate(model, splits[split][:n]).neg_elbo)
    assert list(core.evaluate_splits(model, {**splits, "train": splits["train"][:0]})) == ["valid", "test"]


# --------------------------------------------------------------------------------------------------------- training


def test_fit_learns_reports_weight_one_and_keeps_the_best_look_on_validation():
    model, splits = point_model(), point_splits()
    curves = train(model, splits, epochs=6, kl_warmup=1.0)  # the KL's weight is under 1 throughout training
    valid = curves["valid"]["neg_elbo_bpd"]
    assert valid[-1] < valid[0] - 0.1
    best = int(np.argmin(valid))
    assert curves["best_step"] == curves["step"][best] and curves["best_epoch"] == curves["epoch"][best]
    now = in_bits(evaluate(model, splits["valid"][: core.num_looked_at(splits, 6)]), 2)
    assert now["neg_elbo_bpd"] == pytest.approx(min(valid), abs=1e-12)
    assert now["neg_elbo_bpd"] == pytest.approx(now["kl_bpd"] + now["recon_bpd"], abs=1e-9)


def test_fit_keeps_the_earlier_weights_when_validation_only_gets_worse():
    model, splits = point_model(), point_splits()
    train(model, splits, epochs=5)
    best = {k: v.clone() for k, v in model.state_dict().items()}
    splits["train"] = splits["test"] = splits["train"] * 30  # now training leads away from validation, to test
    curves = train(model, splits, epochs=1, lr=0.05, schedule="constant")
    assert curves["best_epoch"] == curves["best_step"] == 0
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())
    assert min(curves["valid"]["neg_elbo_bpd"][1:]) > curves["valid"]["neg_elbo_bpd"][0]
    assert curves["test"]["neg_elbo_bpd"][-1] < curves["test"]["neg_elbo_bpd"][0]  # whoever chose by test would not


def test_fit_of_zero_epochs_changes_nothing():
    model = point_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    curves = train(model, point_splits(), epochs=0)
    assert curves["epoch"] == curves["step"] == [0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_looks_are_spread_over_training_denser_early_from_first_to_last():
    for steps in (1000, 41_200, 10**6):
        looks = sorted(core.steps_to_look(steps))
        gaps = np.diff(looks)
        assert len(looks) == 21 and looks[0] == 0 and looks[-1] == steps
        assert (np.diff(gaps) >= -1).all() and gaps[-1] < steps / 9
    assert core.steps_to_look(0) == {0} and core.steps_to_look(3) == {0, 1, 2, 3}


def test_curves_hold_every_look_with_its_step_and_fraction_of_an_epoch():
    splits = point_splits()
    curves = train(point_model(), splits, epochs=60)  # 300 steps of 5 an epoch
    assert curves["step"] == sorted(core.steps_to_look(300)) and 18 <= len(curves["step"]) <= 21
    assert curves["epoch"] == pytest.approx([step / 5 for step in curves["step"]], abs=1e-4)
    assert any(epoch % 1 for epoch in curves["epoch"])
    for split, key in itertools.product(core.SPLITS, core.CURVE_KEYS):
        assert len(curves[split][key]) == len(curves["step"])


def test_a_curve_is_of_the_same_examples_after_resume_with_more_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "num_looked_at", lambda splits, epochs: 5 * epochs)
    model, splits, saved = point_model(), point_splits(), {"path": tmp_path / "checkpoint.pt", "run": {}}
    seen, look = set(), core.look

    def noting(now, model, splits, *rest):
        seen.add(len(splits["valid"]))
        look(now, model, splits, *rest)

    monkeypatch.setattr(core, "look", noting)
    train(model, splits, epochs=1, **saved)
    curves = train(model, splits, epochs=3, resume=True, **saved)
    assert curves["epoch"][-1] == 3 and seen == {5} and curves["examples"] == 5


def test_looks_take_a_360th_of_what_is_trained_on_at_least_32_and_no_more_than_validation_has():
    def looked_at(train, valid, epochs):
        return core.num_looked_at({"train": torch.zeros(train), "valid": torch.zeros(valid)}, epochs)

    assert looked_at(65_931, 7326, 20) == 20 * 65_931 // 360
    assert looked_at(65_931, 7326, 1000) == 7326 and looked_at(48, 4, 1) == 4 and looked_at(500, 100, 1) == 32


def test_an_epoch_sees_each_example_at_most_once_in_an_order_of_its_own():
    splits = point_splits()
    splits["train"] = splits["train"][:95]
    model = Watched()
    train(model, splits, epochs=3, batch_size=10)
    batches = [x for x, _, _ in model.seen]
    assert len(batches) == 27 and all(x.shape == (10, 2) for x in batches)  # the remainder of 5 is left out
    epochs = [torch.cat(batches[k : k + 9]) for k in (0, 9, 18)]
    assert all(len(torch.unique(epoch, dim=0)) == 90 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and len(torch.unique(torch.cat(epochs), dim=0)) > 90


def test_batches_and_noise_are_functions_of_the_seed_and_the_step_alone():
    """So that 2a and 2b see the same, and a run that was resumed too, whatever random numbers were used before."""
    seen = []
    for before, seed in ((0, 0), (1, 0), (1, 1)):
        splits, model = point_splits(), Watched()
        torch.manual_seed(before)
        torch.randn(before * 17)
        torch.manual_seed(0)
        splits = point_splits()
        torch.manual_seed(before)
        train(model, splits, epochs=2, seed=seed)
        seen.append(model.seen)
    for (x, noise, _), (x2, noise2, _) in zip(*seen[:2], strict=True):
        assert torch.equal(x, x2) and torch.equal(noise, noise2)
    for k in (0, 1):  # another seed: other batches, other noise; and every step has noise of its own
        assert not torch.equal(seen[2][0][k], seen[1][0][k])
        assert not torch.equal(seen[1][0][k], seen[1][1][k])


def test_2b_is_2a_but_for_its_prior():
    assert q2a.DEFAULTS == q2b.DEFAULTS and q2a.SMOKE == q2b.SMOKE
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    losses = []
    for prior in (StandardNormal, FlowPrior):
        torch.manual_seed(0)
        model = ImageVAE(2, prior)
        torch.manual_seed(core.seed_of("step", 0, 0))
        losses.append(model.loss(images))
    assert torch.equal(*losses)  # the first step, with the flow still the identity


def test_kl_weight_ramps_up_and_stays_at_one():
    """As 1B and --kl-warmup ask for; without such a request it is 1 throughout."""
    for changes, expected in (({"kl_warmup": 0.2}, [0, 0.5, 1, 1, 1]), ({"kl_warmup": 0.0}, [1] * 5), ({}, [1] * 5)):
        model = Watched()
        train(model, point_splits(), epochs=2, batch_size=10, **changes)  # 20 steps
        weights = [weight for _, _, weight in model.seen]
        assert [weights[k] for k in (0, 2, 4, 18, 19)] == pytest.approx(expected)
        assert model.done == pytest.approx([k / 20 for k in range(20)])
    x, model = torch.randn(5, 2), point_model()
    loss = [0.0, 0.0, 0.0]
    for k, weight in enumerate((0.0, 0.5, 1.0)):
        torch.manual_seed(0)
        loss[k] = model.loss(x, weight).item()
    assert loss[1] == pytest.approx((loss[0] + loss[2]) / 2) and loss[0] != pytest.approx(loss[2])


def test_a_warm_up_of_the_kl_changes_the_training_loss_and_no_reported_bound():
    """At a learning rate of 0, so that the weights are the same: only the KL's weight differs."""

    class Noting(Watched):
        def loss(self, data, kl_weight=1.0, done=0.0):
            loss = super().loss(data, kl_weight)
            self.losses = [*getattr(self, "losses", []), loss.item()]
            return loss

    losses, curves = {}, {}
    for warmup in (None, 0.5):
        torch.manual_seed(0)
        model = Noting()
        curves[warmup] = train(model, point_splits(), epochs=2, batch_size=10, lr=0.0, kl_warmup=warmup)  # 20 steps
        losses[warmup] = np.array(model.losses)
    assert all(curves[None][split] == curves[0.5][split] for split in core.SPLITS)
    differ = losses[None] != losses[0.5]
    assert differ[:10].all() and not differ[10:].any()


def test_one_cycle_rises_to_its_peak_and_falls_to_zero():
    rates = [core.SCHEDULES["one-cycle"](step / 1000) for step in range(1001)]
    assert max(rates) == rates[100] == 1 and rates[0] == 0 and rates[-1] == pytest.approx(0)
    assert all(b > a for a, b in itertools.pairwise(rates[:101]))
    assert all(b < a for a, b in itertools.pairwise(rates[100:]))


def test_the_trapezoid_rises_stays_and_falls_to_zero_and_constant_is_constant():
    rates = [core.SCHEDULES["trapezoid"](step / 1000) for step in range(1001)]
    assert rates[0] == rates[-1] == 0 and rates[25] == pytest.approx(0.5) and max(rates) == 1
    assert all(rate == 1 for rate in rates[50:300]) and rates[650] == pytest.approx(0.5)
    assert {core.SCHEDULES["constant"](step / 10) for step in range(11)} == {1.0}


def test_both_optimisers_follow_the_schedule_and_share_the_weights_out(monkeypatch):
    """Muon has the kernels between hidden layers, Adam all else; frozen weights belong to neither."""
    model = ImageVAE(4, FlowPrior)
    model.prior.requires_grad_(False)
    adam, muon = core.make_optimisers(model, 1e-3, 0.02)
    shared = [{id(p) for p in optimiser.param_groups[0]["params"]} for optimiser in (adam, muon)]
    learned = {name: p for name, p in model.named_parameters() if not name.startswith("prior")}
    assert not shared[0] & shared[1] and shared[0] | shared[1] == {id(p) for p in learned.values()}
    for name, p in learned.items():
        hidden = p.ndim == 4 and min(p.shape[:2]) >= 16 and p.shape[2] > 1
        assert (id(p) in shared[1]) == hidden, name
    assert len(core.make_optimisers(model, 1e-3, 0.0)) == 1
    rates, make, wide = [], core.make_optimisers, VAE(*(core.GaussianMLP((64, 64), nn.SiLU) for _ in range(2)),
                                                      StandardNormal((2,)))  # fmt: skip

    def noting(*args):
        optimisers = make(*args)
        optimisers[0].register_step_pre_hook(
            lambda *_: rates.append([optimiser.param_groups[0]["lr"] for optimiser in optimisers])
        )
        return optimisers

    monkeypatch.setattr(core, "make_optimisers", noting)
    train(wide, point_splits(), epochs=4, lr=1e-3, muon_lr=0.02, schedule="trapezoid")  # 20 steps
    expected = [core.SCHEDULES["trapezoid"](step / 20) for step in range(20)]
    assert [of_adam for of_adam, _ in rates] == pytest.approx([1e-3 * rate for rate in expected])
    assert [of_muon for _, of_muon in rates] == pytest.approx([0.02 * rate for rate in expected])


def test_muons_update_has_singular_values_near_one_and_the_gradients_singular_vectors():
    x = torch.randn(20, 50, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1, 50, dtype=torch.float64))
    x = torch.randn(20, 1, dtype=torch.float64) @ torch.randn(1, 50, dtype=torch.float64) + x
    before, after = torch.linalg.svdvals(x), torch.linalg.svdvals(core.orthogonalise(x[None])[0])
    assert before[0] / before[-1] > 10 and after.min() > 0.4 and after.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    rotated = u.T @ core.orthogonalise(x[None])[0] @ v.T
    assert (rotated - torch.diag(rotated.diagonal())).abs().max() < 1e-6
    for shape in ((64, 128, 3, 3), (128, 64, 3, 3), (64, 64)):  # a wide, a tall and a square kernel
        kernel = torch.zeros(shape, requires_grad=True)
        kernel.grad = torch.randn(shape)
        core.Muon([kernel], lr=0.1).step()
        (a, b), moved = shape[:2], kernel.detach()
        assert ((moved * kernel.grad).sum() < 0) and moved.isfinite().all()
        values = torch.linalg.svdvals(moved.transpose(0, 1).flatten(1) if a > b else moved.flatten(1))
        assert 0.5 * 0.1 < values.median() / max(1, a / b) ** 0.5 < 1.5 * 0.1
    still = torch.ones(64, 64, requires_grad=True)  # no gradient yet: nothing to divide by
    still.grad = torch.zeros(64, 64)
    core.Muon([still], lr=0.1).step()
    assert torch.equal(still.detach(), torch.ones(64, 64))


def test_gradients_are_clipped_to_norm_one_and_a_step_without_a_finite_one_is_taken_with_zeros():
    model, noted = point_model(), []

    class Optimiser(torch.optim.SGD):
        def step(self, closure=None):
            noted.append([p.grad.clone() for p in model.parameters()])
            return super().step(closure)

    optimiser = Optimiser(model.parameters(), lr=0.1)
    finite = core.train_step(model, [optimiser], 100 * torch.randn(20, 2), "fp32")
    assert finite.item() is True
    assert torch.cat([g.flatten() for g in noted[0]]).norm().item() == pytest.approx(1, abs=1e-4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for value in (float("nan"), float("inf")):
        x = torch.randn(20, 2)
        x[3, 1] = value
        assert core.train_step(model, [optimiser], x, "fp32").item() is False
        assert all((g == 0).all() for g in noted[-1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def tiny_model(poison):
    """A VAE in the plane whose bound is not finite at the steps that poison(step) names."""

    class Poisoned(VAE):
        steps = 0

        def forward(self, x, generator=None):
            terms = super().forward(x, generator)
            if generator is None:  # in training
                self.steps += 1
                if poison(self.steps):
                    terms = Terms(terms.recon * float("nan" if self.steps % 2 else "inf"), terms.kl)
            return terms

    return Poisoned(core.GaussianMLP((8,), nn.SiLU), core.GaussianMLP((8,), nn.SiLU), StandardNormal((2,)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_without_a_finite_gradient_are_skipped_and_counted(precision, tmp_path, capsys):
    splits = {k: torch.randn(n, 2) for k, n in (("train", 400), ("valid", 20), ("test", 20))}
    few = dict(epochs=2, batch_size=10, lr=1e-2, precision=precision)  # 80 steps
    curves = train(tiny_model(lambda step: step in (3, 4, 50)), splits, **few, path=tmp_path / "a.pt")
    assert curves["skipped_steps"] == 3 and "3 steps skipped so far" in capsys.readouterr().out
    model = tiny_model(lambda step: step > 60)
    words = ("10 steps in a row", "step 70")
    refused(capsys, lambda: train(model, splits, **few, path=tmp_path / "b.pt"), *words, status=1)
    assert all(p.isfinite().all() for p in model.parameters())
    kept = torch.load(tmp_path / "b.pt", weights_only=True)["progress"]
    assert kept["step"] == 40 and all(p.isfinite().all() for p in kept["weights"].values())
    model, few_steps = tiny_model(lambda step: True), dict(epochs=20, batch_size=400, precision=precision)
    refused(capsys, lambda: train(model, splits, **few_steps), "10 steps in a row", status=1)  # one step an epoch
    spread = train(tiny_model(lambda step: step % 10 < 9), splits, **few)  # never ten in a row
    assert spread["skipped_steps"] == 72


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_points_that_are_not_finite_stop_a_run_and_not_the_weights(value, capsys):
    """In the training set their steps are skipped; in an evaluated one no bound can be told, and the run says so."""

    def made(split):
        splits = {k: torch.randn(n, 2) for k, n in (("train", 200), ("valid", 20), ("test", 20))}
        splits[split][-1] = value
        return point_model(), splits

    model, splits = made("train")
    assert train(model, splits, epochs=2, batch_size=10, lr=1e-3)["skipped_steps"] == 2  # one batch an epoch has it
    assert all(p.isfinite().all() for p in model.parameters())
    model, splits = made("valid")
    refused(capsys, lambda: train(model, splits, epochs=2, batch_size=10, lr=1e-3), "by step 0", status=1)


def test_checkpoints_come_after_every_epoch_and_every_minute(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(core, "save_checkpoint", lambda path, saved: steps.append(saved["progress"]["step"]))
    train(point_model(), point_splits(), epochs=3, path=tmp_path / "x.pt")
    assert steps == [0, 5, 10, 15]
    steps.clear()
    clock = iter(range(0, 10**6, 25))  # each look at the clock is 25 seconds later
    monkeypatch.setattr(core.time, "monotonic", lambda: next(clock))
    train(point_model(), point_splits(), epochs=3, path=tmp_path / "x.pt")
    assert set(steps) > {0, 5, 10, 15} and core.KEEP_SECONDS <= 60


# ------------------------------------------------------------------------------------------------- curves as a table


def table_of(path):
    """A table of curves, by column."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {column: [float(row[column]) for row in rows] for column in rows[0]}


def columns_of(curves):
    """What the table of these curves has to hold."""
    bounds = {f"{s}_{key}": curves[s][key] for s, key in itertools.product(core.SPLITS, core.CURVE_KEYS)}
    return {"step": curves["step"], "epoch": curves["epoch"], **bounds}


def test_the_table_of_curves_grows_by_a_row_at_each_look_and_can_be_followed(tmp_path, monkeypatch):
    """As by `tail -f`, which keeps the file open that it found."""
    table, look, followed, lines = tmp_path / "curves.csv", core.look, [], []

    def noting(now, *args):
        lines.append(len(table.read_text().splitlines()) if table.exists() else 0)
        if lines[-1] and not followed:
            followed.append(os.open(table, os.O_RDONLY))
        look(now, *args)

    monkeypatch.setattr(core, "look", noting)
    curves = train(point_model(), point_splits(), path=tmp_path / "checkpoint.pt")  # 15 steps
    looks = len(curves["step"])
    assert looks > 10 and lines == [0, *range(2, looks + 1)]  # the first line is the head
    assert os.read(followed[0], 10**6).decode() == table.read_text()
    os.close(followed[0])
    assert table_of(table) == columns_of(curves)  # every digit
    text = table.read_text()
    table.write_text(text[:-5] + str(int(text[-5] == "0")) + text[-4:])
    assert table_of(table) != columns_of(curves)  # control: one of the last digits


def test_a_side_trainings_table_has_its_name_and_an_earlier_runs_rows_are_not_kept(tmp_path):
    table = tmp_path / "short_run_curves.csv"
    table.write_text("step,epoch\n0,0.0\n")
    curves = train(point_model(), point_splits(), path=tmp_path / "short_run.pt")
    assert table_of(table) == columns_of(curves)
    assert {path.name for path in tmp_path.iterdir()} == {"short_run.pt", table.name}
    train(point_model(), point_splits())  # without a checkpoint there is no table
    assert len(list(tmp_path.iterdir())) == 2


def test_a_resumed_runs_table_has_every_row_once(tmp_path, monkeypatch):
    """It goes on from a checkpoint that is earlier than the table's last row."""
    path, step, steps = tmp_path / "checkpoint.pt", core.train_step, []

    def interrupted(*args):
        steps.append(0)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(core, "train_step", interrupted)
        train(point_model(), point_splits(), path=path)
    kept = torch.load(path, weights_only=True)["progress"]["step"]
    assert table_of(tmp_path / "curves.csv")["step"][-1] > kept == 5
    curves = train(point_model(), point_splits(), path=path, resume=True)
    assert table_of(tmp_path / "curves.csv") == columns_of(curves)
    assert curves["step"] == sorted(core.steps_to_look(15))


def test_a_full_disk_costs_rows_of_the_table_for_a_time_and_not_the_run(tmp_path, monkeypatch, capsys):
    whole, tries = core.write_whole, []

    def full_at_first(path, write):
        tries.append(path.name)
        if path.name == "curves.csv" and tries.count("curves.csv") < 4:
            raise OSError(28, "No space left on device")
        whole(path, write)

    monkeypatch.setattr(core, "write_whole", full_at_first)
    curves = train(point_model(), point_splits(), path=tmp_path / "checkpoint.pt")
    assert capsys.readouterr().err.count("No space left on device") == 3
    assert table_of(tmp_path / "curves.csv") == columns_of(curves)


def test_precision_and_products(monkeypatch):
    """bf16 is of training steps alone: in an evaluation every product is fp32."""
    kinds = []

    class Noting(VAE):
        def posterior(self, x, generator=None):
            kinds.append((generator is None, (x @ x.new_ones(2, 1)).dtype))
            return super().posterior(x, generator)

    model = Noting(core.GaussianMLP((8,), nn.SiLU), core.GaussianMLP((8,), nn.SiLU), StandardNormal((2,)))
    train(model, point_splits(), epochs=1, precision="bf16")
    assert set(kinds) == {(True, torch.bfloat16), (False, torch.float32)}
    deaf = VAE(Call(lambda x: (x * 0, x * 0)), Call(lambda z: (z, z * 0)), StandardNormal((2,)))
    assert evaluate(deaf, torch.randn(4, 2)).recon.dtype == torch.float64


@pytest.mark.parametrize("late", [[1.0] * 10, [1.0 + 0.2 * k for k in range(10)]], ids=["level", "rising"])
def test_axes_of_curves_hold_the_second_half_of_training_and_no_early_spike(late):
    values = {key: [50.0, 30.0, *[2.0] * 8, *late] for key in core.CURVE_KEYS}
    curves = {"step": [(k + 1) ** 2 for k in range(20)], **{split: values for split in core.SPLITS}}
    fig, axes = plt.subplots(1, 3)
    core.draw_curves(axes, curves, {"floor": (0.5, 0.6)})
    limits = [ax.get_ylim() for ax in axes]
    plt.close(fig)
    assert all(low < min(late) and max(late) < high < 10 for low, high in limits) and limits[0][0] < 0.5


def test_no_label_of_curves_is_cut(monkeypatch, tmp_path):
    """Of published curves whose ticks change with the room that they get. Control: axes that begin at the edge."""
    curves = json.loads((ROOT / "results/published/q2b_svhn_subset/metrics.json").read_text("utf-8"))["curves"]

    def least_x():
        core.plot_curves(curves, "2b: flow prior\nbits/dim", tmp_path / "curves.png")
        (fig,) = drawn
        return min(ax.yaxis.label.get_window_extent().x0 for ax in fig.axes)

    drawn, subplots = [], plt.subplots
    monkeypatch.setattr(plt, "close", lambda fig: drawn.append(fig))
    assert least_x() >= 0
    drawn.clear()
    monkeypatch.setattr(plt, "subplots", lambda *args, layout, **more: subplots(*args, gridspec_kw={"left": 0}, **more))
    assert least_x() < 0
