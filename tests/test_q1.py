"""Questions 1A and 1B: their points, true densities and closed forms, where 1B starts, and what 1A says of a code."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import core
import q1a
import q1b
from conftest import train


def test_1a_points_are_the_handouts():
    first = np.random.RandomState(0).randn(100_000, 2)[0]
    assert q1a.make_points("data1")[0] == pytest.approx([1 + 5 * first[0], 2 + first[1]])
    r = math.sqrt(2) / 2
    turned = [1 + r * 5 * first[0] - r * first[1], 2 + r * 5 * first[0] + r * first[1]]
    assert q1a.make_points("data2")[0] == pytest.approx(turned)
    sizes = {name: len(x) for name, x in core.split_points("", q1a.make_points("data2"), 1).splits.items()}
    assert sizes == {"train": 72_000, "valid": 8_000, "test": 20_000}


@pytest.mark.parametrize("data", q1a.TURN)
def test_1a_floor_is_the_gaussians_cross_entropy(data):
    x, covariance = torch.from_numpy(q1a.make_points(data)), q1a.true_covariance(data)
    assert np.allclose(np.cov(x.numpy().T), covariance, atol=0.2)
    entropy = math.log(2 * math.pi * math.e) + math.log(5)  # 4.4473 nats
    assert q1a.true_neg_log_prob(data, x).mean().item() == pytest.approx(entropy, abs=0.01)
    for decoder in q1a.DECODERS:
        expected = 0 if (data, decoder) == ("data1", "diagonal") else 0.5 * math.log(25)
        assert q1a.least_kl(covariance, decoder) == pytest.approx(expected, abs=1e-6)


def test_1a_least_kl_of_unequal_variances():
    """Against a search: of the diagonal D with covariance - D singular, the one of the largest determinant."""
    (a, b), (_, c) = covariance = np.array([[4.0, 1.0], [1.0, 1.0]])
    d1 = np.linspace(0, a - b**2 / c, 200_001)[:-1]
    d2 = c - b**2 / (a - d1)
    expected = 0.5 * math.log((a * c - b**2) / (d1 * d2).max())
    assert q1a.least_kl(covariance, "diagonal") == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("cost, error, need, used", [(0.06, 0.01, 1, True), (0.04, 0, 0, False), (1, 0.3, 1, False)])
def test_1a_a_code_is_said_to_be_used_only_where_another_one_costs_more(cost, error, need, used):
    found = {"shuffling_costs_bpd": cost, "shuffling_costs_se_bpd": error, "least_kl_bpd": need}
    said = q1a.answer("x", found)
    assert ("hardly uses" in said) != used and ("takes a KL of 1.000 or more." if need else "takes no code.") in said


def test_1b_points_are_the_handouts():
    points, labels = q1b.make_points()
    assert points.shape == (99_999, 2) and np.bincount(labels).tolist() == [33_333] * 3
    for label, centre in ((0, (-1.5, 2.5)), (1, (1.5, 2.5)), (2, (0, -2 / math.pi))):
        assert points[labels == label].mean(0) == pytest.approx(centre, abs=0.01)
    first = np.array([-1.5, 2.5]) + 0.2 * np.random.RandomState(0).randn(33_333, 2)[0]
    assert (points == first).all(1).any()
    train_labels, test_labels = labels[:80_000], labels[80_000:]
    assert abs(np.bincount(train_labels) / 80_000 - np.bincount(test_labels) / 19_999).max() < 0.02


def test_1b_true_density_integrates_to_one_and_its_entropy_is_the_points_mean_cost():
    grid = torch.linspace(-3.5, 4, 76, dtype=torch.float64)
    log_p = q1b.true_log_prob(torch.cartesian_prod(grid, grid))
    assert log_p.exp().sum().item() * 0.1**2 == pytest.approx(1, abs=1e-6)
    entropy = -(log_p.exp() * log_p).sum().item() * 0.1**2
    test = core.split_points("", q1b.make_points()[0], 1).splits["test"]
    for points, good in ((test, True), (test + 0.05, False), (1.05 * test, False)):  # with controls
        nats = -q1b.true_log_prob(points)
        assert (abs(nats.mean().item() - entropy) < 3 * core.standard_error(nats)) == good


def test_1b_the_short_run_lays_the_clusters_side_by_side_along_z1():
    points, labels = q1b.make_points()
    splits = core.split_points("three clusters", points[:4500], 1).splits
    recipe = dict(muon_lr=q1b.SHORT_MUON_LR, kl_warmup=q1b.SHORT_KL_WARMUP)

    def separated(model):
        """The fraction of training points that two cuts through z1 give to their clusters."""
        train(model, splits, epochs=10, batch_size=200, lr=1.5e-3, seed=3, **recipe)
        with torch.no_grad():
            order = model.encoder(splits["train"])[0][:, 0].argsort().numpy()
        count = np.cumsum(np.eye(3)[labels[order]], 0)  # of each cluster up to a cut
        best = 0
        for a, b, c in itertools.permutations(range(3)):
            first_cut = np.maximum.accumulate(count[:, a] - count[:, b])
            best = max(best, (first_cut + count[:, b] - count[:, c]).max() + count[-1, c])
        return best / len(order)

    torch.manual_seed(3)
    start = q1b.start_model()
    assert separated(start) > 0.98
    torch.manual_seed(3)  # control: the same, but z2 has a weight from the start
    mlp = [core.GaussianMLP(q1b.HIDDEN, nn.ReLU, n) for n in (2, 1)]
    assert separated(core.VAE(*mlp, core.StandardNormal((2,)))) < 0.9


def test_1b_the_diagonal_model_starts_as_the_isotropic_one():
    start, x = q1b.start_model(), torch.randn(50, 2)
    nn.init.normal_(start.decoder.net[-1].bias)
    isotropic, diagonal = (q1b.with_decoder(start, n) for n in (1, 2))
    expected = core.evaluate(start, x)
    for model in (isotropic, diagonal):
        assert torch.allclose(core.evaluate(model, x).recon, expected.recon, atol=1e-5)
        assert torch.equal(core.evaluate(model, x).kl, expected.kl)
    assert diagonal.decoder(torch.randn(3, 2))[1].shape == (3, 2)
    diagonal.decoder.net[-1].weight.data[3] += 1  # control: the two log stds are separate weights,
    assert not torch.allclose(core.evaluate(diagonal, x).recon, expected.recon, atol=1e-2)
    for model in (isotropic, diagonal):  # and nothing is shared
        model.encoder.net[0].weight.data += 1
    assert torch.equal(core.evaluate(start, x).kl, expected.kl)
