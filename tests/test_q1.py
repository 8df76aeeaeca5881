"""Questions 1A and 1B: their points, true densities and closed forms, and what the experiments say of known models."""

import argparse
import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import core
import q1a
import q1b
from conftest import Call

# -------------------------------------------------------------------------------------------------------- the points


def test_1a_points_are_the_handouts():
    first = np.random.RandomState(0).randn(100_000, 2)[0]
    assert q1a.make_points("data1")[0] == pytest.approx([1 + 5 * first[0], 2 + first[1]])
    r = math.sqrt(2) / 2
    turned = [1 + r * 5 * first[0] - r * first[1], 2 + r * 5 * first[0] + r * first[1]]
    assert q1a.make_points("data2")[0] == pytest.approx(turned)


@pytest.mark.parametrize("data", q1a.TURN)
def test_1a_floor_is_the_gaussians_cross_entropy(data):
    x = torch.from_numpy(q1a.make_points(data))
    assert torch.from_numpy(np.cov(x.T.numpy())).allclose(torch.from_numpy(q1a.true_covariance(data)), atol=0.2)
    entropy = math.log(2 * math.pi * math.e) + math.log(5)  # 4.4473 nats
    assert q1a.true_neg_log_prob(data, x).mean().item() == pytest.approx(entropy, abs=0.01)


@pytest.mark.parametrize("data", q1a.TURN)
@pytest.mark.parametrize("decoder", q1a.DECODERS)
def test_1a_least_kl(data, decoder):
    expected = 0 if (data, decoder) == ("data1", "diagonal") else 0.5 * math.log(25)
    assert q1a.least_code(q1a.true_covariance(data), decoder)[1] == pytest.approx(expected, abs=1e-6)


def test_1a_least_kl_of_unequal_variances():
    """Against a search: of the diagonal D with covariance - D singular, the one of the largest determinant."""
    (a, b), (_, c) = covariance = np.array([[4.0, 1.0], [1.0, 1.0]])
    d1 = np.linspace(0, a - b**2 / c, 200_001)[:-1]
    d2 = c - b**2 / (a - d1)
    best = (d1 * d2).argmax()
    stds, kl = q1a.least_code(covariance, "diagonal")
    assert np.square(stds) == pytest.approx([d1[best], d2[best]], abs=1e-4)
    assert kl == pytest.approx(0.5 * math.log((a * c - b**2) / (d1 * d2)[best]), abs=1e-8)


def test_1b_points_are_the_handouts():
    points, labels = q1b.make_points()
    assert points.shape == (99_999, 2) and np.bincount(labels).tolist() == [33_333] * 3
    for label, centre in ((0, (-1.5, 2.5)), (1, (1.5, 2.5)), (2, (0, -2 / math.pi))):
        assert points[labels == label].mean(0) == pytest.approx(centre, abs=0.01)
    rand = np.random.RandomState(0)
    a = np.array([-1.5, 2.5]) + 0.2 * rand.randn(33_333, 2)
    assert (points == a[0]).all(1).any()
    train, test = labels[:80_000], labels[80_000:]
    assert abs(np.bincount(train) / len(train) - np.bincount(test) / len(test)).max() < 0.02


def test_1b_true_density_integrates_to_one_and_fits_its_points_best():
    grid = torch.linspace(-3.5, 4, 151, dtype=torch.float64)
    p = q1b.true_log_prob(torch.cartesian_prod(grid, grid)).exp()
    assert p.sum().item() * 0.05**2 == pytest.approx(1, abs=1e-6)
    test = core.split_points("", q1b.make_points()[0]).splits["test"]
    assert core.bits_per_dim(-q1b.true_log_prob(test).mean().item(), 2) == pytest.approx(0.955, abs=0.001)
    assert core.bits_per_dim(-q1b.true_log_prob(test[:100]).mean().item(), 2) == pytest.approx(0.985, abs=0.001)
    assert q1b.true_log_prob(test + 0.1).mean() < q1b.true_log_prob(test).mean() - 0.05


# --------------------------------------------------------------------------------------------------- 1A: experiments


def test_information_bounds_close_on_the_truth_where_it_is_known():
    """x ~ N(0, 25), z = posterior of a linear-Gaussian model: I(x; z) = ln 5; a deaf posterior tells nothing."""
    x = 5 * torch.randn(4000, 1)
    mu, log_std = x / 5 * math.sqrt(24 / 25), torch.full_like(x, -math.log(5))
    z = mu + log_std.exp() * torch.randn_like(mu)
    lower, upper = q1a.information_bounds(z, mu, log_std)
    se = lower.std().item() / math.sqrt(4000)
    assert lower.shape == (4000,) and lower.mean() <= upper.mean() < lower.mean() + 0.02
    assert lower.mean().item() == pytest.approx(math.log(5), abs=4 * se) and 4 * se < 0.1
    few = q1a.information_bounds(z[:3], mu[:3], log_std[:3])
    assert few[0].mean() <= math.log(3) < upper.mean() + 0.5  # from few examples the lower bound is capped
    deaf = q1a.information_bounds(torch.randn(50, 2), torch.zeros(50, 2), torch.zeros(50, 2))
    assert deaf[0].abs().max() < 1e-9 and deaf[1].abs().max() < 1e-9


def test_q1a_says_that_the_code_is_used_only_where_taking_it_away_costs():
    points = torch.from_numpy(q1a.make_points("data2")[:4000]).float()
    log_p = -q1a.true_neg_log_prob("data2", points)
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


def test_1a_variance_explained_by_a_code_is_of_its_draws_not_of_its_means():
    covariance = q1a.true_covariance("data2")
    x = torch.from_numpy(q1a.make_points("data2")[:4000]).float()
    along = (x - torch.tensor([1.0, 2.0])) @ torch.tensor([0.5**0.5, 0.5**0.5]) / 5  # the long axis, variance 1

    def r2(scale, log_std):
        mu = torch.stack([along * scale, torch.zeros(len(x))], 1)
        model = core.VAE(Call(lambda x: (mu, torch.full((len(x), 2), log_std))), Call(lambda z: (z, z)),
                         core.StandardNormal((2,)))  # fmt: skip
        return q1a.explained_variance(model, x, covariance)

    exact = r2(1.0, -3.0)
    assert exact["long_axis_r2"] == pytest.approx(1 / (1 + math.exp(-6)), abs=0.01) and exact["short_axis_r2"] < 0.01
    assert r2(1e-3, 0.0)["long_axis_r2"] < 0.01  # a mean that is linear in x but far smaller than its noise


def test_points_are_evaluated_with_the_kl_in_closed_form_and_many_draws():
    encoder, decoder = Call(lambda x: (0.5 * x, torch.full_like(x, -0.5))), Call(lambda z: (2 * z, 0 * z))
    model, x = core.VAE(encoder, decoder, core.StandardNormal((2,))), torch.randn(1500, 2)
    terms, of_draws = core.evaluate_points(model, x)
    with torch.no_grad():
        mu, log_std = model.encoder(x)
    exact = kl_divergence(Normal(mu, log_std.exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(terms.kl, exact.double(), atol=1e-5)
    draws = [core.evaluate(model, x, seed=seed) for seed in range(64)]
    means = torch.stack([draw.recon.mean() for draw in draws])
    assert of_draws == pytest.approx(means.std().item() / 8, rel=0.5)  # 64 draws against as many single ones
    assert abs(terms.recon.mean() - means.mean()) < 4 * math.hypot(of_draws, means.std().item() / 8)
    assert terms.recon.shape == (1500,) and 0 < of_draws < 0.01


# --------------------------------------------------------------------------------------------------- 1B: experiments


def test_1b_bounds_of_more_samples_are_no_lower_on_the_same_samples():
    mlp = [core.GaussianMLP((8,), torch.nn.ReLU) for _ in range(2)]
    model, x = core.VAE(*mlp, core.StandardNormal((2,))), torch.randn(10, 2)
    found = q1b.compare_bounds(model, x)
    floor = -q1b.true_log_prob(x).mean().item() / (2 * math.log(2))
    above = dict(zip(found["iwae_k"], found["neg_iwae_minus_floor_bpd"], strict=True))
    for few, more in ((1, 2), (2, 10), (1, 5), (10, 100), (100, 1000), (20, 200)):  # whole groups: Jensen holds exactly
        assert above[more] < above[few]
    assert found["neg_elbo_bpd"] == pytest.approx(above[1] + floor)
    assert found["neg_iwae100_bpd"] == pytest.approx(above[100] + floor)
    assert found["elbo_gap_bpd"] == pytest.approx(above[1] - above[100])
    assert 1 <= found["effective_samples_of_100"] <= 100


def test_1b_the_short_run_lays_the_clusters_side_by_side_along_z1(tmp_path):
    points, labels = q1b.make_points()
    splits = core.split_points("three clusters", points[:6000]).splits
    settings = dict(epochs=50, batch_size=200, lr=1.5e-3, seed=1, resume=False)

    def separated(model):
        """The fraction of training points that two cuts through z1 give to their clusters."""
        order = model.encoder(splits["train"])[0][:, 0].argsort().numpy()
        count = np.cumsum(np.eye(3)[labels[order]], 0)  # of each cluster up to a cut
        best = 0
        for a, b, c in itertools.permutations(range(3)):
            first_cut = np.maximum.accumulate(count[:, a] - count[:, b])
            best = max(best, (first_cut + count[:, b] - count[:, c]).max() + count[-1, c])
        return best / len(order)

    run = q1b.short_run(splits, argparse.Namespace(**settings, device="cpu"), tmp_path / "short_run.pt")
    assert separated(run) > 0.98
    torch.manual_seed(1)  # control: the same, but z2 has a weight from the start
    mlp = [core.GaussianMLP(q1b.HIDDEN, torch.nn.ReLU, n) for n in (2, 1)]
    control, rates = core.VAE(*mlp, core.StandardNormal((2,))), dict(muon_lr=q1b.SHORT_MUON_LR)
    path = tmp_path / "control.pt"
    core.fit(control, splits, **settings | {"epochs": 10}, **rates, kl_warmup=q1b.SHORT_KL_WARMUP, path=path, run={})
    assert separated(control) < 0.9


def test_1b_the_diagonal_model_starts_as_the_isotropic_one():
    torch.manual_seed(0)
    mlp = [core.GaussianMLP(q1b.HIDDEN, torch.nn.ReLU, n) for n in (2, 1)]
    start, x = core.VAE(*mlp, core.StandardNormal((2,))), torch.randn(50, 2)
    bounds = [core.evaluate(q1b.with_decoder(start, n), x) for n in (1, 2)]
    assert torch.allclose(bounds[0].recon, bounds[1].recon, atol=1e-5) and torch.equal(bounds[0].kl, bounds[1].kl)
    diagonal = q1b.with_decoder(start, 2)
    assert diagonal.decoder(torch.randn(3, 2))[1].shape == (3, 2)
    diagonal.decoder.net[-1].weight.data[3] += 1  # control: the two log stds are separate weights
    assert not torch.allclose(core.evaluate(diagonal, x).recon, bounds[0].recon, atol=1e-2)


def test_1b_a_torn_cluster_is_counted_and_codes_that_are_the_prior_miss_it_by_nothing():
    torch.manual_seed(0)
    labels, x = np.repeat([0, 1, 2], 1000), 0.1 * torch.randn(3000, 2)
    x[:500, 0] += 3  # half of cluster 0 lies elsewhere

    class Encoder(torch.nn.Module):
        def __init__(self, log_std):
            super().__init__()
            self.log_std = log_std

        def forward(self, x):
            return x, torch.full_like(x, self.log_std)

    def look(log_std, x):
        decoder = core.GaussianMLP((8,), torch.nn.ReLU)
        return q1b.look_at_codes(core.VAE(Encoder(log_std), decoder, core.StandardNormal((2,))), x, labels)

    z, found = look(-3, x)
    assert z.shape == (3000, 2) and found["pieces_of_clusters"] == [2, 1, 1]
    assert found["marginal_kl_bpd"] > 1  # far from the prior
    found = look(-1, math.sqrt(1 - math.exp(-2)) * torch.randn(3000, 2))[1]
    assert abs(found["marginal_kl_bpd"]) < 0.05 and found["marginal_kl_se_bpd"] < 0.05  # with the noise, N(0, I)
