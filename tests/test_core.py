"""Properties of core.py: in float64 where the mathematics is exact, each beside a control that shows it can fail."""

import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import core
from core import (
    VAE, ConvDecoder, FlowPrior, GatedResidualBlock, ImageVAE, MaskedConv2d, MaskedResidual, StandardNormal,
    bits_per_dim, bounded_log_std, causal_mask, density_to_levels, dequantise, evaluate, fixed_noise, iwae,
    kl_per_position, normal_log_prob, quantise, residual_stack, wavefront_slope, wavefronts,
)  # fmt: skip
from conftest import ROOT, Call

# --------------------------------------------------------------------------------------------------------- helpers


def trained_flow(*latent_shape, strength=0.3):
    """A flow in float64 whose last layer is no longer zero, as after training."""
    torch.manual_seed(0)
    flow = FlowPrior(latent_shape or (2, 4, 4), 8).double()
    nn.init.normal_(flow.net[-1].weight, 0, strength)
    nn.init.normal_(flow.net[-1].bias, 0, strength)
    return flow


class FullCovariance(nn.Module):
    """A linear-Gaussian model: z ~ N(0, I), x = W z + sigma noise, with its exact posterior as the encoder."""

    def __init__(self, spread=0.0):
        super().__init__()
        torch.manual_seed(1)
        q, _ = torch.linalg.qr(torch.randn(3, 2, dtype=torch.float64))
        self.w, self.sigma = q * torch.tensor([2.0, 0.7]), 0.5  # orthogonal columns: the posterior is diagonal
        precision = 1 + (self.w**2).sum(0) / self.sigma**2
        self.gain, self.post_log_std = self.w.T / self.sigma**2 / precision[:, None], -0.5 * precision.log() + spread
        self.truth = MultivariateNormal(
            torch.zeros(3, dtype=torch.float64), self.w @ self.w.T + self.sigma**2 * torch.eye(3, dtype=torch.float64)
        )

    def model(self):
        def encoder(x):
            return x @ self.gain.T, self.post_log_std.expand(len(x), 2)

        def decoder(z):
            return z @ self.w.T, torch.full((len(z), 1), math.log(self.sigma), dtype=z.dtype)

        return VAE(Call(encoder), Call(decoder), StandardNormal((2,)))


def log_weights(model, x, k):
    return torch.stack([-model(x, fixed_noise(seed)).neg_elbo for seed in range(k)])


# --------------------------------------------------------------------------------------------------- distributions


def test_normal_log_prob_is_torch_distributions_and_one_number_an_example():
    x, mu, log_std = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    expected = Independent(Normal(mu, log_std.exp()), 2).log_prob(x)
    assert torch.allclose(normal_log_prob(x, mu, log_std), expected, rtol=1e-12)
    assert normal_log_prob(x, mu, log_std).shape == (5,)


def test_normal_log_prob_broadcasts_a_scalar_std_to_every_dimension():
    x, mu = torch.randn(2, 5, 2, dtype=torch.float64)
    one = torch.randn(5, 1, dtype=torch.float64)
    assert torch.equal(normal_log_prob(x, mu, one), normal_log_prob(x, mu, one.expand(5, 2)))


def test_normal_log_prob_integrates_to_one():
    grid = torch.linspace(-12, 12, 601, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    log_p = normal_log_prob(x, torch.tensor([[0.3, -0.5]]).double(), torch.tensor([[0.2, -0.4]]).double())
    assert log_p.exp().sum().item() * (grid[1] - grid[0]).item() ** 2 == pytest.approx(1, abs=1e-9)


def test_standard_normal_is_n01_and_its_kl_to_itself_is_zero():
    z = torch.randn(7, 3, 2, dtype=torch.float64)
    prior = StandardNormal((3, 2))
    expected = Independent(Normal(torch.zeros(3, 2).double(), torch.ones(3, 2).double()), 2).log_prob(z)
    assert torch.allclose(prior.log_prob(z), expected, rtol=1e-12)
    wrong = normal_log_prob(z, torch.zeros_like(z), torch.full_like(z, 0.5))  # control: log-variance 1 where 0 is meant
    assert not torch.allclose(wrong, expected, rtol=0.01)
    samples = prior.sample(20_000, fixed_noise(3))
    assert samples.mean().abs() < 0.02 and (samples.var() - 1).abs() < 0.02
    for log_std, right in ((0.0, True), (0.5, False)):  # control: log-variance 1 again
        encoder = Call(lambda x, log_std=log_std: (torch.zeros_like(x), torch.full_like(x, log_std)))
        kl = evaluate(VAE(encoder, Call(lambda z: (z, z)), StandardNormal((2,))), torch.randn(50, 2)).kl
        assert (kl == 0).all() if right else (kl != 0).all()


def test_sampled_kl_agrees_with_the_closed_form():
    mu, log_std = torch.tensor([0.5, -1.0]), torch.tensor([-0.7, 0.3])
    model = VAE(Call(lambda x: (mu.expand(len(x), 2), log_std.expand(len(x), 2))),
                Call(lambda z: (z, torch.zeros_like(z))), StandardNormal((2,)))  # fmt: skip
    kl = evaluate(model, torch.zeros(50_000, 2)).kl
    exact = kl_divergence(Normal(mu, log_std.exp()), Normal(0.0, 1.0)).sum().item()
    se = kl.std().item() / math.sqrt(len(kl))
    assert abs(kl.mean().item() - exact) < 4 * se < 0.1 * exact


def test_bounded_log_std_is_smooth_increasing_and_lets_the_right_answers_in():
    raw = torch.linspace(-60, 60, 4001, dtype=torch.float64, requires_grad=True)
    y = bounded_log_std(raw)
    (slope,) = torch.autograd.grad(y.sum(), raw)
    assert y.min() >= -7 and y.max() <= 3 and (y.diff() >= 0).all()
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (at_zero,) = torch.autograd.grad(bounded_log_std(zero).sum(), zero)
    assert bounded_log_std(zero).item() == 0 and at_zero.item() == 1
    assert (slope.diff().abs() < 0.01).all()  # no kink anywhere
    dequantisation, data_1a = math.log(1 / (128 * math.sqrt(12))), math.log(5)
    for log_std in (dequantisation, data_1a):  # reached with a slope that still learns
        at = (y - log_std).abs().argmin()
        assert (y[at] - log_std).abs() < 0.05 and slope[at] > 0.1


# ------------------------------------------------------------------------------------------------ bounds and units


def test_uniform_over_256_levels_is_exactly_8_bits_per_dim():
    log_p_x = torch.full((4,), -3072 * math.log(2), dtype=torch.float64)  # density 1/2 on [-1, 1] in each dimension
    assert torch.allclose(
        -bits_per_dim(density_to_levels(log_p_x, 3072), 3072), torch.full((4,), 8.0).double(), rtol=1e-12
    )
    assert -bits_per_dim(log_p_x, 3072)[0] == pytest.approx(1)  # without the change of scale: 1 bit, 7 off


def test_bits_per_dim_of_vdvaes_example():
    assert bits_per_dim(2.6364, 1) == pytest.approx(3.80, abs=0.005)


def test_quantise_inverts_dequantise_for_every_level_and_u():
    levels = torch.arange(256).repeat(200, 1)
    u = torch.rand(levels.shape)
    u[0], u[1] = 0, 1 - 2**-16
    x = dequantise(levels, u)
    assert torch.equal(quantise(x).long(), levels) and x.min() >= -1 and x.max() <= 1
    assert not torch.equal(((x + 1) * 128).round().clamp(0, 255).long(), levels)  # control: rounding is not the inverse


def test_levels_bound_holds_and_is_a_probability():
    """Sum over the levels of exp(E_u log p(v)) is at most 1, and near 1 for a density much wider than a level."""
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    x = dequantise(torch.arange(256)[:, None].double(), u)  # (256, 64)
    for mu, log_std, low in ((0.1, -2.0, 0.999), (0.1, -4.5, 0.9), (0.1, -6.0, 0.0)):
        log_p = normal_log_prob(x.reshape(-1, 1), torch.tensor(mu).double(), torch.tensor(log_std).double())
        total = density_to_levels(log_p, 1).reshape(256, 64).mean(1).exp().sum().item()
        assert low <= total <= 1 + 1e-6


def test_elbo_iwae_and_log_p_are_in_order_on_a_linear_gaussian_model():
    exact = FullCovariance(spread=0.5)  # a posterior that is too wide, so that no bound is tight
    x = exact.truth.sample((200,))
    log_w, log_p = log_weights(exact.model(), x, 400), exact.truth.log_prob(x)
    elbo, bounds = log_w.mean(0), {k: iwae(log_w[:k]) for k in (1, 10, 400)}
    assert torch.equal(bounds[1], log_w[0])
    assert (elbo <= bounds[400]).all()  # Jensen, point by point on the same samples
    assert elbo.mean() < bounds[10].mean() < bounds[400].mean() < log_p.mean() + 0.01
    assert bounds[400].mean() == pytest.approx(log_p.mean().item(), abs=0.02)
    assert elbo.mean() < log_p.mean() - 0.3


def test_with_the_exact_posterior_every_single_sample_gives_log_p():
    exact = FullCovariance()
    x = exact.truth.sample((50,))
    for seed in range(3):
        terms = exact.model()(x, fixed_noise(seed))
        assert torch.allclose(-terms.neg_elbo, exact.truth.log_prob(x), atol=1e-5)
    wide = FullCovariance(spread=0.5).model()(x, fixed_noise(0))
    assert not torch.allclose(-wide.neg_elbo, exact.truth.log_prob(x), atol=0.1)


def test_with_the_exact_posterior_the_encoders_gradient_has_no_noise():
    for spread, noisy in ((0.0, False), (0.5, True)):
        exact = FullCovariance(spread)
        exact.post_log_std.requires_grad_()
        x = exact.truth.sample((20,))
        exact.model()(x, fixed_noise(0)).neg_elbo.sum().backward()
        assert (exact.post_log_std.grad.abs().max() > 1e-3) == noisy


def test_every_term_of_the_image_model_is_one_number_an_example_in_nats():
    model = ImageVAE(4, StandardNormal)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    terms = model(images, fixed_noise(0))
    assert terms.recon.shape == terms.kl.shape == (3,)
    noise = fixed_noise(0)
    x = dequantise(images, torch.rand(3, 3, 32, 32, generator=noise))
    mu, log_std = model.encoder(x)
    z = mu + log_std.exp() * torch.randn(3, 4, 8, 8, generator=noise)
    log_ratio = Independent(Normal(mu, log_std.exp()), 3).log_prob(z) - Independent(
        Normal(0 * mu, 1 + 0 * mu), 3
    ).log_prob(z)
    assert torch.allclose(terms.kl, log_ratio, rtol=1e-4) and (terms.kl > 1).all()
    mu, log_std = model.decoder(z)
    assert log_std.shape == (3, 3, 32, 32)
    by_hand = -Independent(Normal(128 * (mu + 1), 128 * log_std.exp()), 3).log_prob(128 * (x + 1))  # in grey levels
    assert torch.allclose(terms.recon, by_hand, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- noise


def test_fixed_noise_depends_on_its_key_only():
    def noise(*key):
        return torch.randn(100, 3, 4, generator=fixed_noise(*key))

    first = noise("evaluation", 5, 0)
    torch.manual_seed(1)  # the global generator has no part in it
    assert torch.equal(noise("evaluation", 5, 0), first)
    others = [("evaluation", 6, 0), ("evaluation", 5, 1), ("evaluation", 0, 5), ("step", 5, 0), ("evaluation", 5)]
    assert not any(torch.equal(noise(*key), first) for key in others)
    again = fixed_noise("evaluation", 5, 0)
    assert not torch.equal(*(torch.randn(100, generator=again) for _ in range(2)))  # a generator goes on
    assert core.seed_of("a", 1, 23) != core.seed_of("a", 12, 3)


def test_noise_of_different_keys_is_uncorrelated_and_that_of_one_key_the_same():
    keys = [("evaluation", 0, 0), ("evaluation", 1, 0), ("evaluation", 0, 1), ("samples",), ("step", 0, 0), (0, 0)]
    again = [*keys, keys[0]]
    streams = [core.noise(torch.randn, (1000, 50), "cpu", fixed_noise(*key)).flatten() for key in again]
    correlations = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0)
    assert correlations[:-1, :-1].abs().max() < 0.025  # 50,000 numbers: standard deviation .0045
    assert torch.equal(streams[0], streams[-1]) and correlations[0, -1] > 0.99


def test_noise_of_training_is_the_global_generators_and_processes_share_it_out(monkeypatch):
    def noise():
        torch.manual_seed(7)
        return core.noise(torch.randn, (2, 3), "cpu")

    whole = torch.randn(4, 3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise(), whole[:2])
    for rank in (0, 1):  # every second example of a batch of four is this process's
        monkeypatch.setattr(core, "rank_and_world", lambda rank=rank: (rank, 2))
        assert torch.equal(noise(), whole[rank::2])
    fixed = core.noise(torch.randn, (2, 3), "cpu", fixed_noise(0))
    assert torch.equal(fixed, torch.randn(2, 3, generator=fixed_noise(0)))  # of an evaluation: the whole batch's


# ---------------------------------------------------------------------------------------------------------- blocks


def test_gated_block_is_x_plus_a_sigmoid_b():
    block = GatedResidualBlock(6).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    h = block.conv2(torch.relu(block.conv1(torch.relu(x))))
    assert torch.allclose(block(x), x + h[:, :6] / (1 + torch.exp(-h[:, 6:])))
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    assert torch.equal(block(x), x)  # a residual: with its branch at zero, the identity


def test_residual_stack_has_five_blocks_and_ends_in_relu():
    stack = residual_stack(8)
    assert sum(isinstance(m, GatedResidualBlock) for m in stack) == 5
    assert stack(torch.randn(1, 8, 4, 4)).min() == 0


def test_encoder_mean_takes_both_signs_and_shapes_are_same_convolutions():
    model = ImageVAE(4, StandardNormal)
    nn.init.normal_(model.encoder.net[-1].weight)
    mu, log_std = model.encoder(torch.randn(2, 3, 32, 32))
    assert mu.shape == log_std.shape == (2, 4, 8, 8) and mu.min() < 0 < mu.max()
    assert all(t.shape == (2, 3, 32, 32) for t in model.decoder(mu))


def test_decoder_mean_and_log_std_come_from_different_channels():
    decoder = ConvDecoder(4)
    weight = decoder.net[-1].weight
    mu, log_std = decoder(torch.randn(1, 4, 8, 8))
    (from_mu,), (from_log_std,) = (torch.autograd.grad(t.sum(), weight, retain_graph=True) for t in (mu, log_std))
    used = [g.abs().sum((0, 2, 3)) > 0 for g in (from_mu, from_log_std)]
    assert used[0].tolist() == [True] * 3 + [False] * 3 and used[1].tolist() == [False] * 3 + [True] * 3


# -------------------------------------------------------------------------------------------------- masks and flow


def test_masks_are_literally_these():
    assert causal_mask("A", 3).tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert causal_mask("B", 3).tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert causal_mask("A", 5)[2].tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="mask_type"):
        causal_mask("C", 3)


def sees(function, channels, height, position):
    """[height * height] booleans: which input positions the output at a position depends on."""
    x = torch.randn(1, channels, height, height, dtype=torch.float64, requires_grad=True)
    output = function(x).flatten(2)[0, :, position].sum()
    return torch.autograd.grad(output, x)[0].abs().sum((0, 1)).flatten() > 0


def test_flow_sees_its_past_neighbours_and_never_the_future():
    flow = trained_flow(2, 5, 5)
    for position in range(25):
        seen = sees(lambda z: torch.cat(flow.mean_and_log_std(z), 1), 2, 5, position)
        assert not seen[position:].any()
        if position >= 6 and position % 5:
            assert seen[position - 1] and seen[position - 5] and seen[position - 6]
    free = nn.Conv2d(2, 2, 3, padding=1).double()  # control: without a mask the future is seen
    assert sees(free, 2, 5, 12)[13]
    assert not sees(MaskedConv2d("A", 2, 2, 3).double(), 2, 5, 12)[12]
    assert sees(MaskedConv2d("B", 2, 2, 3).double(), 2, 5, 12)[12]


def test_masked_convolution_keeps_its_weights():
    conv = MaskedConv2d("A", 2, 2, 3)
    before = conv.weight.detach().clone()
    conv(torch.randn(1, 2, 4, 4))
    assert torch.equal(conv.weight, before) and (before != 0).all()


def test_flow_inverts_and_its_log_dets_cancel():
    flow = trained_flow()
    eps = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    z = flow.eps_to_z(eps)
    back, log_det = flow.z_to_eps(z)
    assert torch.allclose(back, eps, atol=1e-10) and not torch.allclose(z, eps, atol=0.1)
    jacobian = torch.autograd.functional.jacobian(lambda e: inverse_with_gradient(flow, e), eps[:1])
    assert log_det.shape == (3,)
    assert torch.linalg.slogdet(jacobian.reshape(32, 32))[1].item() == pytest.approx(-log_det[0].item(), abs=1e-9)


def inverse_with_gradient(flow, eps):
    """`eps_to_z` with autograd: a fixed point after as many rounds as there are positions."""
    z = torch.zeros_like(eps)
    for _ in range(16):
        t, s = flow.mean_and_log_std(z)
        z = t + s.exp() * eps
    return z


def test_flow_log_det_is_autograds_for_each_example():
    flow = trained_flow()
    z = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    _, log_det = flow.z_to_eps(z)
    for b in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z: flow.z_to_eps(z)[0], z[b : b + 1]).reshape(32, 32)
        assert log_det[b].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-9)
    assert log_det.abs().min() > 0.1  # control: there is something to get wrong


def test_flow_density_integrates_to_one_and_samples_follow_it():
    flow = trained_flow(1, 1, 2, strength=0.5)  # two positions in a row: a density in the plane
    grid = torch.linspace(-15, 15, 401, dtype=torch.float64)
    cell = (grid[1] - grid[0]).item() ** 2
    with torch.no_grad():
        log_p = flow.log_prob(torch.cartesian_prod(grid, grid).reshape(-1, 1, 1, 2))
        assert log_p.exp().sum().item() * cell == pytest.approx(1, abs=1e-6)
        z = flow.sample(40_000, fixed_noise(0)).double()
        at_samples = flow.log_prob(z)
    neg_entropy = (log_p.exp() * log_p).sum().item() * cell
    se = at_samples.std().item() / 200
    assert abs(at_samples.mean().item() - neg_entropy) < 4 * se < 0.05


def test_2b_starts_exactly_where_2a_does():
    """That both see the same batches too is in test_training.py."""
    torch.manual_seed(0)
    a = ImageVAE(4, StandardNormal)
    torch.manual_seed(0)
    b = ImageVAE(4, FlowPrior)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    terms_a, terms_b = (evaluate(m, images) for m in (a, b))
    assert torch.equal(terms_a.recon, terms_b.recon) and torch.equal(terms_a.kl, terms_b.kl)
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(b.prior.z_to_eps(z)[0], z) and torch.equal(b.prior.z_to_eps(z)[1], torch.zeros(2))


# ---------------------------------------------------------------------------------------------------------- sampling


def test_slopes_are_derived_from_the_masks():
    assert [wavefront_slope(MaskedConv2d("A", 1, 1, k)) for k in (1, 3, 5, 7)] == [1, 2, 3, 4]
    assert wavefront_slope(FlowPrior((2, 8, 8), 8)) == 2
    assert (
        wavefront_slope(nn.Sequential(MaskedConv2d("A", 1, 1, 3), MaskedResidual(1), MaskedConv2d("B", 1, 1, 5))) == 3
    )
    assert [len(wavefronts(32, 32, k)) for k in (2, 3, 4, 32)] == [94, 125, 156, 1024]
    assert [len(wavefronts(8, 8, k)) for k in (2, 8)] == [22, 64]
    raster = [(i.item(), j.item()) for i, j in wavefronts(3, 4, 4)]
    assert raster == [(i, j) for i in range(3) for j in range(4)]


def test_masked_convolution_at_positions_is_the_whole_one_there():
    conv = MaskedConv2d("B", 3, 5, 5).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    i, j = torch.tensor([0, 3, 5]), torch.tensor([6, 2, 0])
    assert torch.allclose(conv.at(x, i, j)[..., 0], conv(x)[:, :, i, j], atol=1e-12)


def loud_flow():
    torch.manual_seed(0)
    flow = FlowPrior((2, 8, 8), 16)
    nn.init.normal_(flow.net[-1].weight, 0, 0.3)
    return flow


def test_flow_samples_along_anti_diagonals_are_those_in_raster_order_bit_for_bit():
    flow = loud_flow()
    eps = torch.randn(5, 2, 8, 8)
    z = flow.eps_to_z(eps)
    assert torch.equal(z, flow.eps_to_z(eps, slope=8))
    assert (flow.z_to_eps(z)[0] - eps).abs().max() < 1e-4
    assert not torch.allclose(z, flow.eps_to_z(eps, slope=1), atol=0.01)  # control: a slope too small is wrong
    plain = torch.zeros_like(eps)  # the textbook's way: one whole pass a position
    with torch.no_grad():
        for i, j in itertools.product(range(8), range(8)):
            t, s = flow.mean_and_log_std(plain)
            plain[:, :, i, j] = t[:, :, i, j] + s[:, :, i, j].exp() * eps[:, :, i, j]
    assert torch.allclose(z, plain, atol=1e-4)


@pytest.mark.parametrize("prior", [StandardNormal, FlowPrior])
def test_kl_per_position_adds_up_to_the_kl_and_finds_the_positions_that_pay(prior):
    model = ImageVAE(2, prior)
    for parameter in model.prior.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    found = kl_per_position(model, images)
    assert found.shape == (8, 8)
    assert found.sum().item() == pytest.approx(evaluate(model, images).kl.mean().item() / math.log(2), rel=1e-5)
    for parameter in model.prior.parameters():
        nn.init.zeros_(parameter)  # the flow is the identity now, and the posterior the prior but at one position:
    mu, log_std = torch.zeros(2, 2, 8, 8).unbind()
    mu[:, 3, 5] = 2.0
    model.encoder = Call(lambda x: (mu.expand(len(x), -1, -1, -1), log_std.expand(len(x), -1, -1, -1)))
    found = kl_per_position(model, images)
    assert found[3, 5] > 1 and found.abs().sum() == found[3, 5]


@pytest.mark.parametrize("mistake", ["log-determinant dropped", "wrong variance"])
def test_a_wrong_prior_is_found_by_the_runs_own_check(mistake):
    class Dropped(FlowPrior):
        def z_to_eps(self, z):
            eps, log_det = super().z_to_eps(z)
            return eps, 0 * log_det

    class Wide(FlowPrior):
        def log_prob(self, z):
            return super().log_prob(z * math.exp(-0.5))

    right = FlowPrior((2, 8, 8), 8)
    nn.init.normal_(right.net[-1].weight, 0, 0.1)
    wrong = {"log-determinant dropped": Dropped, "wrong variance": Wide}[mistake]((2, 8, 8), 8)
    wrong.load_state_dict(right.state_dict())
    gaps = [core.check_prior(prior) for prior in (right, wrong, StandardNormal((2, 8, 8)))]
    assert gaps[0] < 1e-9 and gaps[1] > 0.1 and gaps[2] < 1e-9
    metrics = json.loads((ROOT / "results/published/q2b_synthetic_4000/metrics.json").read_text("utf-8"))
    metrics["curves"]["skipped_steps"] = 3
    texts = [core.bounds_text(metrics | {"check_prior_nats": gap}, colours_apart=True) for gap in gaps]
    assert ["CHECK FAILED" in text for text in texts] == [False, True, False]
    assert all("not finite: 3." in " ".join(text.split()) for text in texts)  # the steps that were skipped
    untrained = metrics | {"final": {"test": metrics["final"]["test"] | {"neg_elbo_bpd": 8.1}}}
    assert ["too little to be of use" in core.bounds_text(m, True) for m in (metrics, untrained)] == [False, True]
    without = {name: value for name, value in metrics.items() if name not in ("check_prior_nats", "test_codecs_bpd")}
    assert "differs by nan" in core.bounds_text(without, colours_apart=True)  # the report's first lines say why
