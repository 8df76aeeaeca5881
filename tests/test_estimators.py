"""Every estimate against its true value, on models whose numbers are known.

In the plane: z ~ N(0, I), x ~ N(A z + B, diag S^2), and a normal q(z|x) that is not the posterior. Then p(x) is normal,
and log p(x|z) and log w are quadratic in q's noise: 5 x 5 Gauss-Hermite nodes give their mean and variance exactly.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import bonus
import core
import q1a
import q1b
import q2b
from conftest import Call

BITS = 2 * math.log(2)  # nats of one bit per dimension, in the plane
A, B = torch.tensor([[1.0, 0.3], [-0.4, 0.8]]).double(), torch.tensor([0.5, -1.0]).double()
S, GAIN, STD = (torch.tensor(values).double() for values in ([0.7, 0.5], [[0.7, -0.2], [0.1, 0.5]], [0.75, 0.6]))
TRUTH = MultivariateNormal(B, A @ A.T + torch.diag(S**2))


def q(x):
    return Normal((x - B) @ GAIN + 0.1, STD.expand(len(x), 2))


def log_p_x(x, z):
    return Normal(z @ A.T + B, S).log_prob(x).sum(-1)


def log_w(x, z):
    return log_p_x(x, z) + Normal(0.0, 1.0).log_prob(z).sum(-1) - q(x).log_prob(z).sum(-1)


def moments(f, x):
    """Mean and variance of f(x, z) over z ~ q(z|x), each [N]."""
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(5))
    weights = torch.cartesian_prod(weights, weights).prod(1)[:, None] / (2 * math.pi)
    values = f(x, q(x).mean + STD * torch.cartesian_prod(nodes, nodes)[:, None])  # (25, N)
    mean = (weights * values).sum(0)
    return mean, (weights * (values - mean) ** 2).sum(0)


@pytest.fixture
def model():
    encoder = Call(lambda x: (q(x).mean, q(x).stddev.log()))
    return core.VAE(encoder, Call(lambda z: (z @ A.T + B, S.log().expand(len(z), 2))), core.StandardNormal((2,)))


@pytest.fixture
def batches_of_two(monkeypatch):
    monkeypatch.setattr(core, "EVALUATION_SIZE", 2 * 3072 + 1)


def test_log_weights_have_the_moments_of_log_w_and_their_exponential_is_p_of_x_on_average(model):
    x = TRUTH.sample((30,))
    found, (mean, variance) = q1b.log_weights(model, x, 10_000), moments(log_w, x)
    assert ((found.mean(0) - mean).abs() < 5 * (variance / 10_000).sqrt()).all()
    assert (found.var(0) / variance - 1).abs().max() < 0.15
    w = (found - TRUTH.log_prob(x)).exp()  # of mean 1
    assert ((w.mean(0) - 1).abs() < 5 * w.std(0) / 100).all() and (TRUTH.log_prob(x) - mean).min() > 0.05
    # each draw has its own noise, at each point: the error of the mean over both is as stated
    stated = q1b.with_errors("", found)["_mc_se_bpd"]
    assert len(found.unique()) > 299_000 and found.mean(1).std().item() / 100 / BITS == pytest.approx(stated, rel=0.05)


def test_both_bounds_of_the_same_draws_have_their_own_expectations_and_errors(model):
    """Of IWAE-K, against four times as many draws of torch.distributions."""
    x = TRUTH.sample((12,))
    z, floor = q(x).sample((40_000,)), -q1b.true_log_prob(x)
    decoder = Call(lambda z: (z @ A.T + B + 0.1, S.log().expand(len(z), 2)))  # of another model
    found = q1b.compare_bounds(model, core.VAE(model.encoder, decoder, model.prior), x)
    own, other = (log_w(x, z) - log_p_x(x, z) + log_p_x(x - shift, z) for shift in (0, 0.1))

    def expected(groups):
        """Mean, error over points, and error of q1b's draws, in bits. [G, N] nats."""
        of_draws = (groups.var(0).sum() * 4 / len(groups)).sqrt() / 12
        return [t.item() / BITS for t in (groups.mean(), groups.mean(0).std() / 12**0.5, of_draws)]

    in_groups = {k: own.unflatten(0, (-1, k)) for k in (1, 2, 10, 100)}  # (G, k, N)
    neg_iwae, neg_elbo = {k: math.log(k) - w.logsumexp(1) for k, w in in_groups.items()}, -in_groups[100].mean(1)
    bounds = {"neg_elbo": neg_elbo, "neg_iwae100": neg_iwae[100], "elbo_gap": neg_elbo - neg_iwae[100]}
    of_other = other.unflatten(0, (-1, 100))
    bounds["neg_elbo_minus_diagonal"] = neg_elbo + of_other.mean(1)
    bounds["neg_iwae100_minus_diagonal"] = neg_iwae[100] - math.log(100) + of_other.logsumexp(1)
    for name, groups in (bounds | {"neg_iwae100_minus_floor": neg_iwae[100] - floor}).items():
        mean, se, of_draws = expected(groups)
        assert abs(found[f"{name}_bpd"] - mean) < 5 * of_draws, name
        assert found[f"{name}_se_bpd"] == pytest.approx(se, rel=0.05), name
        assert found[f"{name}_mc_se_bpd"] == pytest.approx(of_draws, rel=0.25), name
    assert abs(found["neg_elbo_bpd"] + moments(log_w, x)[0].mean().item() / BITS) < 5 * found["neg_elbo_mc_se_bpd"]
    assert found["floor_bpd"] == pytest.approx(floor.mean().item() / BITS)
    draws = q1b.log_weights(model, x, 10_000)
    means = [q1b.iwae(draws.unflatten(0, (-1, k)).movedim(1, 0)).mean().item() / -BITS for k in in_groups]
    for mean, groups in zip(means, neg_iwae.values(), strict=True):
        assert abs(mean - expected(groups)[0]) < 5 * expected(groups)[2]
    assert means[0] - means[1] > 10 * expected(neg_iwae[1])[2]  # control: K = 1 and K = 2 are told apart


def test_bounds_of_points_are_exact_up_to_the_stated_error_of_the_draws(model):
    """2,500 points: two whole splits and a half."""
    x = TRUTH.sample((2500,))
    (log_p, variance), kl, floor = moments(log_p_x, x), kl_divergence(q(x), Normal(0.0, 1.0)).sum(1), -TRUTH.log_prob(x)
    terms, of_draws = core.evaluate_points(model, x)
    off = (-log_p - terms.recon) / (variance / 64).sqrt()
    assert abs(off.mean()) < 5 / 50 and off.std().item() == pytest.approx(1, abs=0.07) and off.abs().max() < 6
    assert of_draws == pytest.approx((variance.sum() / 64).sqrt().item() / 2500, rel=0.05)
    assert len(core.evaluate_points(model, x[:1].expand(2500, 2))[0].recon.unique()) == 2500  # each its own noise
    found, noise, error = core.bounds_of_points(model, x, floor), (variance / 64).mean(), 5 * of_draws / BITS
    exact = {"neg_elbo": kl - log_p, "kl": kl, "recon": -log_p, "floor": floor, "excess": kl - log_p - floor}
    for name, nats in exact.items():
        assert found[f"{name}_bpd"] == pytest.approx(nats.mean().item() / BITS, abs=error), name
        if name not in ("recon", "floor"):
            se = ((nats.var() + noise * (name != "kl")) / 2500).sqrt().item() / BITS
            assert found[f"{name}_se_bpd"] == pytest.approx(se, rel=0.05), name
    assert found["neg_elbo_mc_se_bpd"] == pytest.approx(of_draws / BITS)
    assert found["excess_bpd"] > 10 * error  # control: the bound is not tight


def test_of_several_batches_posteriors_are_what_evaluate_charges_for(batches_of_two):
    """Five images: two batches of two, and one of one. The flow is not the identity."""
    model, images = core.ImageVAE(2, core.FlowPrior), torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    for layer in (model.prior.net[-1], model.encoder.net[-1]):
        nn.init.normal_(layer.weight, 0, 0.1)
    terms, parts = core.evaluate(model, images), list(core.posteriors(model, images))
    with torch.no_grad():
        recon = torch.cat([-model.log_p_x(x, z) for x, z, _, _ in parts])
        kl = [Normal(m, s.exp()).log_prob(z).sum((1, 2, 3)) - model.prior.log_prob(z) for _, z, m, s in parts]
    assert len(parts) == 3 and torch.allclose(recon.double(), terms.recon, rtol=1e-6)
    assert torch.allclose(torch.cat(kl).double(), terms.kl, rtol=1e-5)


def test_every_image_is_decoded_from_anothers_code_also_in_a_last_batch_of_one(batches_of_two):
    """z is the image's grey, the decoder's cost the squared distance: so each image's cost tells whose z it had."""
    grey = torch.tensor([10, 20, 60, 140, 230])
    model = bonus.LossyVAE(1, 1, "normal")
    model.encoder = Call(lambda x: (x[:, :1, :8, :8], torch.full_like(x[:, :1, :8, :8], -20.0)))
    model.log_p_x = lambda x, z: -(128**2) * (x[:, 0, 0, 0] - z[:, 0, 0, 0]) ** 2
    found = bonus.cost_of_another_code(model, grey.to(torch.uint8)[:, None, None, None].expand(5, 3, 32, 32))
    costs = (grey - grey[[1, 0, 3, 2, 3]]).double() ** 2 / (3072 * math.log(2))
    assert found["another_code_costs_bpd"] == pytest.approx(costs.mean().item(), rel=1e-4)
    assert found["another_code_costs_se_bpd"] == pytest.approx(costs.std().item() / 5**0.5, rel=1e-4)


def test_1b_codes_are_described_latent_by_latent_and_label_by_label():
    labels, log_std, x = np.arange(600) % 3, torch.tensor([-3.0, -2.0]).expand(600, 2), torch.randn(600, 2)
    model = core.VAE(Call(lambda x: (x, log_std)), Call(lambda z: (z, z / 2)), core.StandardNormal((2,)))
    z, found = q1b.describe_codes(model, x, labels)
    kl = kl_divergence(Normal(x, log_std.exp()), Normal(0.0, 1.0)).mean(0) / math.log(2)
    assert found["kl_per_latent_bits"] == pytest.approx(kl.tolist(), rel=1e-5)
    for mine, said in zip((np.sort(z[k::3], 0) for k in range(3)), found["of_labels"], strict=True):
        assert mine[4, 0] < said["z1"][0] < mine[5, 0] and mine[194, 0] < said["z1"][1] < mine[195, 0]  # 2.5 % outside
        assert said["decoder_stds"] == pytest.approx(np.exp(mine[99:101] / 2).mean(0), rel=1e-5)


def test_1a_what_is_measured_of_a_code_is_what_its_model_says():
    """q's mean is linear in x: so KL, the costs of other codes and r^2 follow from the data's moments."""
    x, covariance = torch.from_numpy(q1a.make_points("data2")[:4000]), torch.from_numpy(q1a.true_covariance("data2"))
    gain, noise = torch.tensor([[0.15, -0.04], [0.1, 0.12]]).double(), torch.tensor([0.8, 0.6]).double()
    mean, floor = (x - B) @ gain, q1a.true_neg_log_prob("data2", x)
    model = core.VAE(
        Call(lambda x: ((x - B) @ gain, noise.log().expand(len(x), 2))),
        Call(lambda z: (z.double() @ (4 * A).T + B, 0 * z + S.log())), core.StandardNormal((2,)),
    )  # fmt: skip
    found, (terms, of_draws) = q1a.measure(model, "data2", "diagonal", x), core.evaluate_points(model, x)
    kl = kl_divergence(Normal(mean, noise), Normal(0.0, 1.0)).mean(0) / math.log(2)
    assert found["kl_per_latent_bits"] == pytest.approx(kl.tolist(), rel=1e-6)

    def decoder_term(squares):  # from squared distances of x from the decoder's means, [..., 2]
        return ((squares / (2 * S**2) + S.log() + 0.5 * math.log(2 * math.pi)).sum(-1) / BITS).mean().item()

    decoded, spread = mean @ (4 * A).T + B, ((4 * A * noise) ** 2).sum(1)  # of the mean of z, and z's variance decoded
    posterior = decoder_term((x - decoded) ** 2 + spread)
    shuffled = decoder_term((x[:, None] - decoded) ** 2 + spread)  # all pairs
    cost, error = found["shuffling_costs_bpd"], found["shuffling_costs_se_bpd"]
    assert abs(cost - (shuffled - posterior)) < 4 * error < 0.3 * cost
    variances, axes = torch.linalg.eigh(covariance)
    k = kl.argmax()  # the latent whose r^2 are given
    with_axes, variance = axes.T @ covariance @ gain[:, k], gain[:, k] @ covariance @ gain[:, k] + noise[k] ** 2
    assert found["axes_r2"][::-1] == pytest.approx((with_axes**2 / variances / variance).tolist(), abs=0.01)
    paired = (terms.neg_elbo - floor).std().item() / 4000**0.5
    errors = found["excess_se_bpd"], found["neg_elbo_mc_se_bpd"]
    assert errors == pytest.approx((paired / BITS, of_draws / BITS))
    model.decoder = Call(lambda z: (z, torch.tensor([0.5, 0.0]) * z))  # a std is a mean of exp, not exp of a mean
    of_z = (0.5 * mean[:, 0] + 0.125 * noise[0] ** 2).exp().mean().item()
    assert q1a.measure(model, "data2", "diagonal", x)["decoder_stds"] == pytest.approx([of_z, 1], rel=0.03)


def test_neighbours_correlations_are_those_of_a_process_that_has_them():
    """To the right 0.6 in one channel and -0.6 in the other, below 0.3 in both; size and mean do not matter."""
    z = torch.randn(3000, 2, 8, 8)
    for k in range(1, 8):
        z[..., k] = torch.tensor([0.6, -0.6])[:, None] * z[..., k - 1] + 0.8 * z[..., k]
    for k in range(1, 8):
        z[:, :, k] = 0.3 * z[:, :, k - 1] + 0.91**0.5 * z[:, :, k]
    assert q2b.neighbour_correlation(3 * z + 5) == pytest.approx({"right": 0.6, "below": 0.3}, abs=0.02)


def test_2b_is_compared_with_2a_term_by_term_and_the_noise_of_its_codes_is_white(monkeypatch):
    """All terms are known. 2a's codes are white noise, 2b's what its flow makes of it."""
    names = ("2a", "2a_fitted_flow", "2b")
    terms = {name: core.Terms(*(1000 * torch.rand(2, 500).double())) for name in names}
    models = [core.ImageVAE(4, lambda shape: core.FlowPrior(shape, 16)) for _ in names]
    nn.init.normal_(models[2].prior.net[-1].weight, 0, 0.4)
    for model in models:
        codes = model.prior.eps_to_z(torch.randn(500, 4, 8, 8))
        model.encoder = Call(lambda x, codes=codes: (codes[: len(x)], torch.full_like(codes, -9.0)[: len(x)]))
    monkeypatch.setattr(q2b, "evaluate", lambda model, x: terms[names[models.index(model)]])
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8)
    found = q2b.compare(*models, images, terms["2b"])
    for what, term, before, after in (
        ("neg_elbo", "neg_elbo", "2a", "2b"), ("kl", "kl", "2a", "2b"), ("recon", "recon", "2a", "2b"),
        ("prior_alone", "kl", "2a", "2a_fitted_flow"), ("rest", "neg_elbo", "2a_fitted_flow", "2b"),
    ):  # fmt: skip
        change = (getattr(terms[after], term) - getattr(terms[before], term)) / (3072 * math.log(2))
        assert found[what] == pytest.approx({"bpd": change.mean().item(), "se_bpd": change.std().item() / 500**0.5})
    assert found["kl_bits"] == pytest.approx({k: t.kl.mean().item() / math.log(2) for k, t in terms.items()})
    chance, correlation = found["correlation_by_chance"], found["correlation"]
    for name in ("2a: z", "2b: ε"):
        assert np.mean(list(correlation[name].values())) == pytest.approx(chance, rel=0.75), name
    assert min(correlation["2b: z"].values()) > 3 * chance  # control


@pytest.mark.parametrize("change, words", [
    (-0.3, "lowers it by 0.3000 ± 0.0100"), (0.3, "raises it by 0.3000 ± 0.0100"),
    (-0.019, "does not measurably change it (-0.0190 ± 0.0100)"), (0.019, "does not measurably change it (+0.0190"),
    (0.021, "raises it"), (-0.021, "lowers it"), (0.0, "does not measurably change it"),
])  # fmt: skip
def test_a_changes_words_follow_its_sign_and_two_standard_errors(change, words):
    assert q2b.change_of("it", {"bpd": change, "se_bpd": 0.01}).startswith(words)
