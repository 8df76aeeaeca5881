"""Training and evaluation: every example once, what a step is given, the best weights, curves."""

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

import core
import q2b
from conftest import refused, tiny_networks, train
from core import FlowPrior, ImageVAE, StandardNormal, VAE, evaluate, fixed_noise


def point_splits():
    return dict(zip(core.SPLITS, (torch.randn(300, 2) * torch.tensor([2.0, 0.5])).split(100), strict=True))


def point_model(*hidden):
    torch.manual_seed(0)
    return VAE(*(core.GaussianMLP(hidden or (8,), nn.SiLU) for _ in range(2)), StandardNormal((2,)))


def given(model, splits, **changes):
    """A training whose steps do nothing: of each, its batch, noise, KL weight, what is done, rates and momentum."""
    steps = []

    def step(model, optimisers, x, precision, kl_weight, done):
        groups = [some.param_groups[0] for some in optimisers]
        steps.append((x, torch.randn(3), kl_weight, done, [*(g["lr"] for g in groups), groups[-1].get("momentum")]))

    with patch.object(core, "train_step", step):
        train(model, splits, **changes)
    return [list(column) for column in zip(*steps, strict=True)]


def test_evaluation_counts_every_example_once_whatever_the_batch_size(monkeypatch):
    images = torch.randint(0, 256, (800, 3, 32, 32), dtype=torch.uint8)
    right = images.float().mean((1, 2, 3)).double()
    assert [len(batch) for batch in core.evaluation_batches(images)] == [341, 341, 118]
    for size in (341, 800, 300, 7):  # of a model without noise, as a batch's noise is its own
        monkeypatch.setattr(core, "EVALUATION_SIZE", size * 3072)
        terms = evaluate(lambda x, generator: (x.float().mean((1, 2, 3)), x.float().mean((1, 2, 3)) ** 2), images)
        assert torch.equal(terms.recon, right) and torch.allclose(terms.kl, right**2)


def test_the_noise_of_an_evaluation_is_its_seeds_and_its_batchs(monkeypatch):
    model, x = point_model(), torch.randn(50, 2)
    monkeypatch.setattr(core, "EVALUATION_SIZE", 40)  # 20 points
    state, first = torch.get_rng_state(), evaluate(model, x).neg_elbo
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    for k, some in enumerate(x.split(20)):
        assert torch.allclose(first[20 * k :][:20].float(), model(some, fixed_noise("evaluation", 0, k)).neg_elbo)
    for other in (evaluate(model, x.roll(20, 0)).neg_elbo.roll(-20, 0), evaluate(model, x, seed=1).neg_elbo):
        assert not torch.allclose(other, first, rtol=0.01)


def test_bounds_of_images_are_of_all_of_validation_and_test_and_as_much_of_train():
    model, x = ImageVAE(1, StandardNormal), torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    whole = {"train": x[:4], "valid": x[4:6], "test": x[6:]}
    alone = whole | {"train": x[:0], "valid": x[:0]}
    for splits, parts in ((whole, whole | {"train": x[:2]}), (alone, {"test": x[6:]})):
        of_test, found = core.measure_images(model, splits)
        assert found["final"] == {split: core.in_bits(evaluate(model, some), 3072) for split, some in parts.items()}
    assert torch.equal(of_test.kl, evaluate(model, x[6:]).kl) and 7 < found["test_codecs_bpd"]["PNG"] < 10


def test_fit_keeps_the_weights_that_are_best_on_validation():
    """First training helps; then it leads away from validation, towards test: whoever chose by test would take it."""
    model, splits = point_model(), point_splits()
    curves = train(model, splits, epochs=6, kl_warmup=1.0)
    valid = curves["valid"]["neg_elbo_bpd"]
    best = int(np.argmin(valid))
    assert valid[-1] < valid[0] - 0.1
    assert curves["best_step"] == curves["step"][best] and curves["best_epoch"] == curves["epoch"][best]
    few = splits["valid"][: curves["examples"]]
    now = core.in_bits(evaluate(model, few), 2)
    assert now["neg_elbo_bpd"] == pytest.approx(min(valid), abs=1e-12)  # the KL's weight in it is 1
    splits["train"] = splits["test"] = splits["train"] * 30
    curves = train(model, splits, epochs=1, lr=0.05, schedule="constant")
    assert curves["best_epoch"] == curves["best_step"] == 0 and core.in_bits(evaluate(model, few), 2) == now
    assert curves["test"]["neg_elbo_bpd"][-1] < curves["test"]["neg_elbo_bpd"][0]


def test_an_epoch_sees_each_example_at_most_once_in_an_order_of_its_own():
    splits = point_splits()
    batches, *_ = given(point_model(), splits | {"train": splits["train"][:95]}, batch_size=10)
    assert len(batches) == 27 and all(x.shape == (10, 2) for x in batches)  # the remainder of 5 is left out
    epochs = [torch.cat(batches[k : k + 9]) for k in (0, 9, 18)]
    assert all(len(torch.unique(epoch, dim=0)) == 90 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and len(torch.unique(torch.cat(epochs), dim=0)) > 90


def test_batches_and_noise_belong_to_the_seed_and_the_step_so_that_2a_and_2b_train_on_the_same(monkeypatch):
    tiny_networks(monkeypatch.setattr)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8).split([12, 2, 2])
    (x, noise, *_), (x2, noise2, *_), (x3, noise3, *_) = (
        given(ImageVAE(1, prior), dict(zip(core.SPLITS, images, strict=True)), epochs=2, batch_size=4, seed=seed)
        for prior, seed in ((StandardNormal, 0), (FlowPrior, 0), (FlowPrior, 1))
    )
    for k in range(6):
        assert torch.equal(x[k], x2[k]) and torch.equal(noise[k], noise2[k])
        assert not torch.equal(x[k], x3[k]) and not torch.equal(noise[k], noise3[k])  # another seed: others
    assert len(torch.stack(noise).unique()) == 18  # every step has its own


def test_the_kls_weight_warms_up_in_training():
    for warmup, expected in ((0.5, [min(1, 2 * (step + 0.5) / 20) for step in range(20)]), (None, [1] * 20)):
        _, _, weights, done, _ = given(point_model(), point_splits(), epochs=2, batch_size=10, kl_warmup=warmup)
        assert weights == pytest.approx(expected) and done == pytest.approx([(step + 0.5) / 20 for step in range(20)])


def test_schedules_rise_to_one_stay_and_fall_to_zero():
    rates = {name: np.array([f(k / 1000) for k in range(1001)]) for name, f in core.SCHEDULES.items()}
    for rate, first, last in ((rates["one-cycle"], 100, 100), (rates["trapezoid"], 50, 300)):
        assert rate[0] == 0 and rate[-1] == pytest.approx(0) and rate.max() == 1 and (rate[first : last + 1] == 1).all()
        assert (np.diff(rate[: first + 1]) > 0).all() and (np.diff(rate[last:]) < 0).all()
    assert rates["trapezoid"][[25, 650]] == pytest.approx(0.5) and rates["one-cycle"][[50, 550]] == pytest.approx(0.5)
    assert (rates["constant"] == 1).all()


def test_muon_has_the_hidden_kernels_adam_the_rest_and_both_follow_the_schedule():
    model = ImageVAE(8, FlowPrior)
    model.prior.requires_grad_(False)
    shared = [{id(p) for p in some.param_groups[0]["params"]} for some in core.make_optimisers(model, 1e-3, 0.02)]
    for name, p in model.named_parameters():
        hidden, learned = p.ndim == 4 and min(p.shape[:2]) >= 16 and p.shape[2] > 1, not name.startswith("prior")
        assert [id(p) in of_one for of_one in shared] == [learned and not hidden, learned and hidden], name
    assert len(core.make_optimisers(model, 1e-3, 0.0)) == 1
    changes = dict(epochs=4, lr=1e-3, muon_lr=0.02, schedule="trapezoid", momentum=0.9)
    *_, rates = given(point_model(16, 16), point_splits(), **changes)
    expected = [core.SCHEDULES["trapezoid"]((step + 0.5) / 20) for step in range(20)]
    assert np.allclose(rates, [[1e-3 * x, 0.02 * x, 0.9] for x in expected]) and expected[0] > 0  # the first moves too


def test_gradients_are_clipped_to_norm_one():
    model, x = point_model(), torch.randn(20, 2)
    loss = model.loss
    for scale, clipped in ((1e3, True), (1e-3, False)):
        model.loss = lambda *args, scale=scale: scale * loss(*args)
        core.train_step(model, [], x, "fp32")
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert norm == pytest.approx(1, abs=1e-4) if clipped else 0 < norm < 0.1


def test_bf16_is_of_training_steps_alone():
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model, kinds = point_model(), set()
        model.encoder.net[0].register_forward_hook(lambda _, x, y, kinds=kinds: kinds.add((y.requires_grad, y.dtype)))
        train(model, point_splits(), epochs=1, precision=precision)
        assert kinds == {(True, dtype), (False, torch.float32)}


def test_a_training_that_diverges_ends_in_one_line_and_its_checkpoint_is_there(tmp_path, capsys):
    splits, path = point_splits(), tmp_path / "checkpoint.pt"
    splits["train"][90] = float("inf")  # no curve is of it
    refused(capsys, lambda: train(point_model(), splits, path=path), "diverged by step", "--lr", status=1)
    saved = core.read_checkpoint(path)
    assert saved["step"] == 0 and all(x.isfinite().all() for x in saved["state"].values())


def test_curves_are_spread_over_training_denser_early_from_first_to_last():
    sizes = ((200, 20), (1, 33), (0, 20))
    with patch.object(core, "train_step"):
        at, few, none = (train(point_model(), point_splits(), epochs=n, batch_size=k)["step"] for n, k in sizes)
    gaps = np.diff(at)
    assert (at[0], at[-1], len(at)) == (0, 1000, 21) and (np.diff(gaps) >= -1).all() and gaps[-1] < 111
    assert few == [0, 1, 2, 3] and none == [0]


def test_curves_and_their_table_hold_every_evaluation_once(tmp_path):
    """Also of a run that goes on from a checkpoint which is earlier than the table's last row."""
    path, table = tmp_path / "short.pt", tmp_path / "short_curves.csv"
    whole = train(point_model(), point_splits(), epochs=60)  # 300 steps, 5 an epoch
    interrupted = patch.object(core, "train_step", side_effect=[None] * 200 + [KeyboardInterrupt])
    with interrupted, pytest.raises(KeyboardInterrupt):
        train(point_model(), point_splits(), epochs=60, path=path)
    assert core.read_checkpoint(path)["step"] == 0 and table.read_text().count("\n") > 15
    curves = train(point_model(), point_splits(), epochs=60, path=path, resume=True)
    assert curves | {"seconds": 0} == whole | {"seconds": 0} and len(curves["step"]) > 17
    expected = {"step": curves["step"], "epoch": [round(step / 5, 4) for step in curves["step"]]}
    expected |= {f"{s}_{key}": curves[s][key] for s, key in itertools.product(core.SPLITS, core.CURVE_KEYS)}
    found = np.genfromtxt(table, delimiter=",", names=True)
    assert {column: found[column].tolist() for column in found.dtype.names} == expected  # every digit


def test_a_curve_is_of_a_360th_of_what_is_trained_on_and_of_the_same_examples_after_resume(tmp_path):
    splits = dict(zip(core.SPLITS, torch.randn(4000, 2).split([3600, 300, 100]), strict=True))
    for epochs, resume, examples in ((1, False, 32), (90, False, 300), (5, False, 50), (90, True, 50)):  # 32 to all
        options = dict(epochs=epochs, batch_size=3600, path=tmp_path / "checkpoint.pt", resume=resume)
        curves = train(point_model(), splits, **options)
        at_first = core.in_bits(evaluate(point_model(), splits["valid"][:examples]), 2)["neg_elbo_bpd"]
        assert curves["examples"] == examples and curves["valid"]["neg_elbo_bpd"][0] == at_first


def test_the_flow_that_is_fitted_to_2a_is_all_that_learns_and_2a_stays_as_it_is():
    a = ImageVAE(2, StandardNormal)
    before = {k: v.clone() for k, v in a.state_dict().items()}
    fitted, images = q2b.with_fitted_flow(a), torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    train(fitted, dict.fromkeys(core.SPLITS, images), epochs=1, batch_size=4, lr=0.01, muon_lr=0.01)
    after = fitted.state_dict()
    assert all(torch.equal(after[k], v) and torch.equal(a.state_dict()[k], v) for k, v in before.items())
    assert fitted.prior.net[-1].weight.abs().max() > 0  # the flow has learnt
    assert all(p.requires_grad for p in a.parameters()) and isinstance(a.prior, StandardNormal)
