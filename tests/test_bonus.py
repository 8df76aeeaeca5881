"""The bonus: mixtures that sum to 1, what a pixel may see, the bound, and what is said of a code."""

import itertools
import math

import pytest
import torch
from torch import nn

import bonus
from bonus import LocalPixelCNN, LossyVAE, logistic_log_prob, mixture_log_prob, mixture_sample
from core import bits_per_dim, evaluate, fixed_noise, in_bits, quantise


def mixture_params(spread=1.0):
    torch.manual_seed(4)
    return spread * torch.randn(1, 100, 1, 1).double()


def tiny_pixelcnn(receptive_field):
    net = LocalPixelCNN(2, receptive_field).double()
    nn.init.normal_(net.rest[-1].weight)  # no longer zero
    return net


@pytest.mark.parametrize("log_scale", [-7.0, -5.0, -3.0, -1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("mu", [-30.0, -1.5, -1.0, -0.3, 0.0, 0.77, 1.0, 4.0])
def test_all_256_levels_of_a_logistic_sum_to_one_in_fp32(mu, log_scale):
    log_p = logistic_log_prob(torch.arange(256), torch.tensor(mu), torch.tensor(log_scale))
    assert log_p.dtype == torch.float32 and log_p.isfinite().all() and (log_p <= 0).all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert mu != 0.77 or log_scale <= 0 or log_p[1:-1].exp().sum() < 0.99  # control: without the tails mass is missing


def test_logistic_log_prob_is_the_difference_of_cdfs_and_edges_take_the_tails():
    mu, log_scale = torch.tensor(0.1).double(), torch.tensor(-1.0).double()
    edges = torch.sigmoid((torch.arange(1, 256).double() / 128 - 1 - mu) / log_scale.exp())
    expected = torch.diff(edges, prepend=torch.zeros(1).double(), append=torch.ones(1).double()).log()
    assert torch.allclose(logistic_log_prob(torch.arange(256).double(), mu, log_scale), expected, atol=1e-10)


@pytest.mark.parametrize("log_scale", [-7.0, -2.0, 3.0])
@pytest.mark.parametrize("mu", [-1000.0, -1.0, 0.3, 1000.0])
def test_gradients_at_the_extremes_are_finite_and_point_home(mu, log_scale):
    m, s = torch.tensor(mu, requires_grad=True), torch.tensor(log_scale, requires_grad=True)
    for level in (0, 1, 128, 254, 255):
        gradients = torch.autograd.grad(logistic_log_prob(torch.tensor(level), m, s), (m, s))
        assert all(g.isfinite() for g in gradients)
        home = {0: -1, 255: 1}.get(level, math.copysign(1, (level + 0.5) / 128 - 1 - mu))
        at_home = (level, mu) in ((0, -1000.0), (255, 1000.0))  # far out in the tail of its own level
        assert gradients[0] * home > 0 or (at_home and gradients[0].abs() < 1e-9)  # drawn to its level, however far


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_all_colours_of_a_pixel_sum_to_one(spread):
    levels = torch.tensor(list(itertools.product(range(16), repeat=3))).reshape(-1, 3, 1, 1)  # 4,096 colours
    params = mixture_params(spread)
    log_p = mixture_log_prob(levels, params.expand(len(levels), -1, -1, -1), num_levels=16)
    assert log_p.shape == (4096,) and log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    wrong = mixture_log_prob(levels.flip(1), params.expand(len(levels), -1, -1, -1), num_levels=16)
    assert not torch.allclose(wrong, log_p, atol=0.1)  # the order of the colours matters


def test_samples_follow_log_prob():
    """Then the gradient of log P at samples has mean 0, for each of the mixture's 100 parameters."""
    params, n = mixture_params(0.4), 20_000
    params[:, 10:40].clamp_(-0.8, 0.8)  # away from the ends, where a scale hardly matters
    params[:, 40:70] -= 1.5  # scales of about two levels
    u = torch.rand(n, 13, 1, 1).double() + 2.0**-25

    def off(drawn_from):
        """The largest of the mean gradients, in standard errors."""
        levels, each = quantise(mixture_sample(drawn_from.expand(n, -1, -1, -1), u)), params.repeat(n, 1, 1, 1)
        (scores,) = torch.autograd.grad(mixture_log_prob(levels, each.requires_grad_()).sum(), each)
        return (n**0.5 * scores.mean(0) / scores.std(0)).abs().max()

    assert off(params) < 4.5
    for k, change in enumerate([0.3, *3 * [0.005], *6 * [0.2]]):  # controls: each kind of parameter, of all components
        other = params.clone()
        other[:, 10 * k :][:, :10:2] += change
        assert off(other) > 6, k


def seen_by(net, row, column):
    """Which pixels a pixel's parameters depend on, and whether they depend on the code."""
    x, z = (torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 32, 32), (1, 2, 8, 8)))
    of_x, of_z = torch.autograd.grad(net(x, net.features(z))[0, :, row, column].sum(), (x, z))
    return of_x.abs().sum((0, 1)) > 0, of_z.any()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_pixel_sees_the_code_and_just_the_pixels_before_it_in_its_receptive_field(n):
    net, expected = tiny_pixelcnn(n), torch.zeros(32, 32, dtype=torch.bool)
    expected[16 - n : 16, 16 - n : 16 + n + 1] = True
    expected[16, 16 - n : 16] = True
    seen, code_is_seen = seen_by(net, 16, 16)
    assert torch.equal(seen, expected) and code_is_seen
    at = net.at  # control: the neighbours of the pixel below
    net.at = lambda x, features, i, j: at(x, features, (i + 1).clamp(max=31), j)
    assert not torch.equal(seen_by(net, 16, 16)[0], expected)


@pytest.mark.parametrize("n", [1, 3])
def test_neighbours_are_as_they_are_defined(n):
    """Each pixel by hand: differences from the average of left and above, which neighbours exist, the average."""
    net, x, i32 = LocalPixelCNN(0, n), torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.arange(32)
    seen = net.neighbours(x, i32[:, None], i32)
    assert seen.shape == (2, net.first.in_channels, 32, 32)
    places = [(a, b) for a in range(-n, 1) for b in range(-n, n + 1) if (a, b) < (0, 0)]  # before it in raster order
    for i, j in [(0, 0), (0, 1), (0, 31), (1, 0), (2, 2), (5, 30), (16, 16), (31, 0), (31, 31)]:
        near = [x[:, :, i + a, j + b] for a, b in ((0, -1), (-1, 0)) if min(i + a, j + b) >= 0]
        average = sum(near) / len(near) if near else torch.zeros(2, 3).double()
        inside = torch.tensor([i + a >= 0 and 0 <= j + b < 32 for a, b in places])
        differences = torch.zeros(2, 3, len(places)).double()
        for k, (a, b) in enumerate(places):
            if inside[k]:
                differences[:, :, k] = bonus.GAIN * (x[:, :, i + a, j + b] - average)
        expected = torch.cat([differences.flatten(1), inside.expand(2, -1), average], 1)
        assert torch.allclose(seen[:, :, i, j], expected, atol=1e-12)


@pytest.mark.parametrize("latents, prior", [(2, "flow"), (2, "normal"), (0, "flow")])
def test_bound_is_a_code_length_of_the_levels(latents, prior):
    """Uniform noise costs 8 bits/dim and more, whatever the model."""
    model = LossyVAE(latents, 1, prior)
    nn.init.normal_(model.decoder.rest[-1].weight, 0, 0.05)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    terms = evaluate(model, images)
    assert (terms.kl == 0).all() if latents == 0 else (terms.kl > 0).all()
    assert 8 < in_bits(terms, 3072)["neg_elbo_bpd"] < 20
    with torch.no_grad():
        x = model.to_x(images)
        z, _, _ = model.posterior(x, fixed_noise("evaluation", 0, 0))
        params = model.decoder(x, model.decoder.features(z))
        assert torch.allclose(terms.recon, -mixture_log_prob(images, params).double(), rtol=1e-6)


def test_training_minimises_the_bound_and_a_fading_term_that_sees_no_neighbours():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for blind, done, kl_weight in ((0.0, 0.0, 0.3), (2.0, 0.0, 1.0), (2.0, 0.25, 0.3), (2.0, 1.0, 1.0)):
        torch.manual_seed(1)
        model = LossyVAE(2, 1, "flow", blind)
        nn.init.normal_(model.decoder.rest[-1].weight, std=0.05)
        torch.manual_seed(2)
        loss = model.loss(images, kl_weight, done)
        torch.manual_seed(2)
        recon, kl = model(images)
        torch.manual_seed(2)
        z, _, _ = model.posterior(model.to_x(images))
        from_z_alone = -mixture_log_prob(images, model.decoder.rest(model.decoder.features(z)))
        expected = recon + kl_weight * kl + blind * (1 - done) * from_z_alone
        assert loss.item() == pytest.approx(bits_per_dim(expected.mean().item(), 3072), rel=1e-5)
        assert ((from_z_alone - recon).abs() > 1).all()  # control


def test_the_table_says_that_the_kl_falls_only_where_it_clearly_does():
    def rows(*kls, error=0.01):
        each = {"epochs": 1, "neg_elbo_bpd": 4.0, "neg_elbo_se_bpd": 0.1, "recon_bpd": 3.0, "kl_se_bpd": error}
        return [each | {"receptive_field": k, "kl_bpd": kl} for k, kl in enumerate(kls, 1)]

    assert "the less goes into z" in bonus.table_text(rows(0.3, 0.2, 0.1))
    for unclear in (rows(0.1, 0.2, 0.3), rows(0.3, 0.1, 0.2), rows(0.3, 0.2, 0.1, error=0.2)):
        assert "No sign" in bonus.table_text(unclear)


def test_a_code_is_said_to_be_used_and_to_pay_only_where_it_clearly_is_and_does():
    def said(cost, error, above):
        return bonus.code_text({
            "args": {"blind": 1.0}, "final": {"test": {"neg_elbo_bpd": 4.0, "kl_bpd": 1.0, "recon_bpd": 3.0}},
            "another_code_costs_bpd": cost, "another_code_costs_se_bpd": error,
            "no_code": {"neg_elbo_bpd": 4.0 + above, "above_bpd": above, "above_se_bpd": 0.01},
        })  # fmt: skip

    for cost, error, used in ((0.1, 0.01, True), (0.1, 0.05, False), (0.0005, 0.0, False), (-0.1, 0.01, False)):
        assert ("**The code is used**" in said(cost, error, 0.1)) == used
    for above, words in ((0.1, "is worse**"), (-0.1, "is better**"), (0.01, "is as good**"), (-0.01, "is as good**")):
        assert words in said(0.1, 0.01, above)
