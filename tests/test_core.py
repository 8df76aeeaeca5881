"""Properties of core.py: in float64 where the mathematics is exact, each beside a control that shows it can fail."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import core
from bonus import LossyVAE
from conftest import Call
from core import FlowPrior, ImageVAE, MaskedConv2d, StandardNormal, VAE, bits_per_dim, evaluate, fixed_noise


def test_normal_log_prob_is_torch_distributions_one_number_an_example_and_integrates_to_one():
    x, mu, log_std = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    expected = Independent(Normal(mu, log_std.exp()), 2).log_prob(x)
    assert torch.allclose(core.normal_log_prob(x, mu, log_std), expected, rtol=1e-12) and expected.shape == (5,)
    one = log_std[..., :1]  # one std for several dimensions
    assert torch.equal(core.normal_log_prob(x, mu, one), core.normal_log_prob(x, mu, one.expand_as(x)))
    grid = torch.linspace(-12, 12, 201, dtype=torch.float64)
    mu, log_std = torch.tensor([[[0.3, -0.5]], [[0.2, -0.4]]]).double()
    p = core.normal_log_prob(torch.cartesian_prod(grid, grid), mu, log_std).exp()
    assert p.sum().item() * (grid[1] - grid[0]).item() ** 2 == pytest.approx(1, abs=1e-9)


def test_standard_normal_is_n01_and_its_kl_to_itself_is_zero():
    z, prior = torch.randn(7, 3, 2, dtype=torch.float64), StandardNormal((3, 2))
    expected = Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    assert torch.allclose(prior.log_prob(z), expected, rtol=1e-12)
    for log_std, right in ((0.0, True), (0.5, False)):  # control: a log-variance of 1 where 0 is meant
        encoder = Call(lambda x, log_std=log_std: (torch.zeros_like(x), torch.full_like(x, log_std)))
        kl = evaluate(VAE(encoder, Call(lambda z: (z, z)), StandardNormal((2,))), torch.randn(50, 2)).kl
        assert (kl == 0).all() if right else (kl != 0).all()


def test_bounded_log_std_is_smooth_increasing_and_lets_the_right_answers_in():
    raw = (0.03 * torch.arange(-2000, 2001).double()).requires_grad_()  # 0 is the middle one
    y = core.bounded_log_std(raw)
    (slope,) = torch.autograd.grad(y.sum(), raw)
    assert y.min() >= -7 and y.max() <= 3 and (y.diff() >= 0).all() and (slope.diff().abs() < 0.01).all()
    assert y[2000].item() == 0 and slope[2000].item() == 1
    for log_std in (math.log(1 / (128 * math.sqrt(12))), math.log(5)):  # of dequantisation, and of 1A's long axis
        at = (y - log_std).abs().argmin()
        assert (y[at] - log_std).abs() < 0.05 and slope[at] > 0.1  # reached where it still learns


def test_noise_is_its_keys_alone_and_without_a_generator_the_global_ones():
    keys = [("evaluation", 0, 0), ("evaluation", 1, 0), ("evaluation", 0, 1), ("evaluation", 0), ("step", 0, 0), (0, 0)]
    streams = []
    for key in (*keys, keys[0]):
        torch.randn(1)  # the global generator has no part in it
        streams.append(core.noise(torch.randn, (50_000,), "cpu", fixed_noise(*key)))
    correlations = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0)
    assert correlations[:-1, :-1].abs().max() < 0.025  # 50,000 numbers: standard deviation .0045
    assert torch.equal(streams[0], streams[-1]) and correlations[0, -1] > 0.99
    assert core.seed_of("a", 1, 23) != core.seed_of("a", 12, 3)
    torch.manual_seed(7)
    assert torch.equal(core.noise(torch.rand, (2, 3), "cpu"), torch.rand(2, 3, generator=torch.manual_seed(7)))


def test_uniform_over_256_levels_is_exactly_8_bits_per_dim():
    log_p_x = torch.full((4,), -3072 * math.log(2), dtype=torch.float64)  # density 1/2 on [-1, 1] in each dimension
    bits = -bits_per_dim(core.density_to_levels(log_p_x, 3072), 3072)
    assert torch.allclose(bits, torch.full((4,), 8.0).double(), rtol=1e-12)
    assert -bits_per_dim(log_p_x, 3072)[0] == pytest.approx(1)  # without the change of scale: 1 bit, 7 off


def test_quantise_inverts_dequantise_for_every_level_and_u():
    levels = torch.arange(256).repeat(200, 1)
    u = torch.rand(levels.shape)
    u[0], u[1] = 0, 1 - 2**-16
    x = core.dequantise(levels, u)
    assert torch.equal(core.quantise(x).long(), levels) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(core.bin_centres(levels), core.dequantise(levels, 0.5))
    assert not torch.equal(((x + 1) * 128).round().clamp(0, 255).long(), levels)  # control: rounding is not the inverse


def test_levels_bound_holds_and_is_a_probability():
    """Sum over the levels of exp(E_u log p(v)) is at most 1, and near 1 for a density much wider than a level."""
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    x = core.dequantise(torch.arange(256)[:, None].double(), u)  # (256, 64)
    for log_std, low in ((-2.0, 0.999), (-4.5, 0.9), (-6.0, 0.0)):
        log_p = core.normal_log_prob(x.reshape(-1, 1), torch.tensor(0.1).double(), torch.tensor(log_std).double())
        total = core.density_to_levels(log_p, 1).reshape(256, 64).mean(1).exp().sum().item()
        assert low <= total <= 1 + 1e-6


def test_with_the_exact_posterior_every_sample_gives_log_p_and_the_encoders_gradient_has_no_noise():
    """z ~ N(0, I), x = w z + noise / 2: the posterior's variance is 1 / (1 + 4 w^2). Control: stds e^.5 too wide."""
    w = torch.tensor([2.0, 0.7]).double()
    truth, variance = Normal(0.0, (w**2 + 0.25).sqrt()), 1 / (1 + 4 * w**2)
    for spread, exact in ((0.0, True), (0.5, False)):
        log_std, x = (variance.log() / 2 + spread).requires_grad_(), truth.sample((50,))
        encoder = Call(lambda x, log_std=log_std: (4 * w * variance * x, log_std.expand_as(x)))
        model = VAE(encoder, Call(lambda z: (w * z, torch.full_like(z, math.log(0.5)))), StandardNormal((2,)))
        for seed in range(3):
            neg_elbo = model(x, fixed_noise(seed)).neg_elbo
            assert torch.allclose(-neg_elbo, truth.log_prob(x).sum(1), atol=1e-5) == exact
            (gradient,) = torch.autograd.grad(neg_elbo.sum(), log_std)
            assert (gradient.abs().max() < 1e-3) == exact


def test_every_term_of_the_image_model_is_one_number_an_example_in_nats():
    model, noise = ImageVAE(4, StandardNormal), fixed_noise(0)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    terms = model(images, fixed_noise(0))
    assert terms.recon.shape == terms.kl.shape == (3,)
    x = core.dequantise(images, torch.rand(3, 3, 32, 32, generator=noise))
    mu, log_std = model.encoder(x)
    z = mu + log_std.exp() * torch.randn(3, 4, 8, 8, generator=noise)
    kl = (Normal(mu, log_std.exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum((1, 2, 3))
    assert torch.allclose(terms.kl, kl, rtol=1e-4) and (kl > 1).all()
    mu, log_std = model.decoder(z)
    by_hand = -Normal(128 * (mu + 1), 128 * log_std.exp()).log_prob(128 * (x + 1)).sum((1, 2, 3))  # in grey levels
    assert torch.allclose(terms.recon, by_hand, rtol=1e-4)
    torch.manual_seed(0)
    loss = model.loss(images, 0.3)
    torch.manual_seed(0)
    recon, kl = model(images)
    assert loss.item() == pytest.approx((recon + 0.3 * kl).mean().item() / 3072 / math.log(2), rel=1e-6)


def test_gated_block_is_x_plus_a_sigmoid_b_and_the_stack_has_five():
    block, x = core.GatedResidualBlock(6).double(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    h = block.conv2(torch.relu(block.conv1(torch.relu(x))))
    assert torch.allclose(block(x), x + h[:, :6] / (1 + torch.exp(-h[:, 6:])))
    stack = core.residual_stack(8)
    assert sum(isinstance(m, core.GatedResidualBlock) for m in stack) == 5
    assert stack(torch.randn(1, 8, 4, 4)).min() == 0  # it ends in a relu


def test_means_and_log_stds_of_encoder_and_decoder_are_apart_and_means_have_both_signs():
    model = ImageVAE(4, StandardNormal)
    raw = torch.atanh(model.encoder(core.dequantise(torch.randint(256, (2, 3, 32, 32)), 0.5))[1] / -7) * -7
    assert (raw + 2).abs().max() < 0.3  # log stds start near -2, before their bound
    for net, x, shape in ((model.encoder, (2, 3, 32, 32), (2, 4, 8, 8)), (model.decoder, (2, 4, 8, 8), (2, 3, 32, 32))):
        weight, channels = net.net[-1].weight, shape[1]
        nn.init.normal_(weight)
        mu, log_std = net(torch.randn(x))
        assert mu.shape == log_std.shape == shape and mu.min() < 0 < mu.max()
        out = 1 if weight.shape[1] == 2 * channels else 0  # a transposed convolution has its outputs second
        for t, used in (
            (mu, [True] * channels + [False] * channels),
            (log_std, [False] * channels + [True] * channels),
        ):
            (gradient,) = torch.autograd.grad(t.sum(), weight, retain_graph=True)
            assert (gradient.transpose(0, out).flatten(1).abs().sum(1) > 0).tolist() == used


def trained_flow(*latent_shape, strength=0.3):
    """A flow in float64 whose last layer is no longer zero, as after training."""
    torch.manual_seed(0)
    flow = FlowPrior(latent_shape, 8).double()
    for parameter in flow.net[-1].parameters():
        nn.init.normal_(parameter, 0, strength)
    return flow


def sees(function, channels, height, position):
    """[height * height] booleans: which input positions the output at a position depends on."""
    x = torch.randn(1, channels, height, height, dtype=torch.float64, requires_grad=True)
    output = function(x).flatten(2)[0, :, position].sum()
    return torch.autograd.grad(output, x)[0].abs().sum((0, 1)).flatten() > 0


def test_masks_are_literally_these_and_leave_the_weights_alone():
    assert core.causal_mask("A", 3).tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert core.causal_mask("B", 3).tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert core.causal_mask("A", 5)[2].tolist() == [1, 1, 0, 0, 0]
    conv = MaskedConv2d("A", 2, 2, 3)
    before = conv.weight.detach().clone()
    conv(torch.randn(1, 2, 4, 4))
    assert torch.equal(conv.weight, before) and (before != 0).all()


def test_flow_sees_its_past_neighbours_and_never_the_future():
    flow = trained_flow(2, 5, 5)
    for position in range(25):
        seen = sees(lambda z: torch.cat(flow.mean_and_log_std(z), 1), 2, 5, position)
        assert not seen[position:].any()
        if position >= 6 and position % 5:
            assert seen[position - 1] and seen[position - 5] and seen[position - 6]
    free = nn.Conv2d(2, 2, 3, padding=1).double()  # control: without a mask the future is seen
    assert sees(free, 2, 5, 12)[13]
    for mask_type, itself in (("A", False), ("B", True)):
        assert sees(MaskedConv2d(mask_type, 2, 2, 3).double(), 2, 5, 12)[12] == itself


def test_flow_inverts_and_its_log_det_is_autograds_for_each_example():
    flow = trained_flow(2, 4, 4)
    eps = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    z = flow.eps_to_z(eps)
    back, log_det = flow.z_to_eps(z)
    assert torch.allclose(back, eps, atol=1e-10) and not torch.allclose(z, eps, atol=0.1) and log_det.shape == (3,)
    for b in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z: flow.z_to_eps(z)[0], z[b : b + 1]).reshape(32, 32)
        assert log_det[b].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-9)
    assert log_det.abs().min() > 0.1  # control: there is something to get wrong


def test_flow_density_integrates_to_one_and_samples_follow_it():
    flow = trained_flow(1, 1, 2, strength=0.5)  # two positions in a row: a density in the plane
    grid = torch.linspace(-12, 12, 161, dtype=torch.float64)
    cell = (grid[1] - grid[0]).item() ** 2
    log_p = flow.log_prob(torch.cartesian_prod(grid, grid).reshape(-1, 1, 1, 2)).detach()
    at_samples = flow.log_prob(flow.eps_to_z(torch.randn(10_000, 1, 1, 2).double())).detach()
    assert log_p.exp().sum().item() * cell == pytest.approx(1, abs=1e-6)
    neg_entropy = (log_p.exp() * log_p).sum().item() * cell
    assert abs(at_samples.mean().item() - neg_entropy) < 4 * core.standard_error(at_samples) < 0.1


def test_the_flows_inverse_is_sampling_in_raster_order_in_as_many_passes_as_its_masks_are_deep():
    flow, passes = trained_flow(2, 8, 8), []
    eps, plain = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.zeros(5, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for i, j in itertools.product(range(8), range(8)):  # the textbook's way: one whole pass a position
            t, s = flow.mean_and_log_std(plain)
            plain[:, :, i, j] = t[:, :, i, j] + s[:, :, i, j].exp() * eps[:, :, i, j]
    once = flow.mean_and_log_std
    flow.mean_and_log_std = lambda z: passes.append(z) or once(z)
    assert torch.allclose(flow.eps_to_z(eps), plain, rtol=0, atol=1e-12)
    assert len(passes) == 23  # the longest chain has 22 links, each to the right, or down and to the left; and a last
    assert not torch.allclose(passes[14], plain, rtol=0, atol=1e-12)  # control: fewer would not do


def test_2b_starts_exactly_where_2a_does():
    models = []
    for prior in (StandardNormal, FlowPrior):
        torch.manual_seed(0)
        models.append(ImageVAE(4, prior))
    a, b = models
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert all(torch.equal(*terms) for terms in zip(*(evaluate(m, images) for m in models), strict=True))


WRONG = {  # without its log-determinant, of another variance, not its inverse
    "z_to_eps": lambda self, z: (FlowPrior.z_to_eps(self, z)[0], z.new_zeros(len(z))),
    "log_prob": lambda self, z: FlowPrior.log_prob(self, z * math.exp(-0.5)),
    "eps_to_z": lambda self, eps: FlowPrior.eps_to_z(self, -eps),
}


def test_a_wrong_prior_is_found_by_the_runs_own_check():
    flow = FlowPrior((2, 8, 8), 8)
    nn.init.normal_(flow.net[-1].weight, 0, 0.1)
    assert core.check_prior(flow) < 1e-9 and core.check_prior(StandardNormal((2, 8, 8))) < 1e-9
    for name, wrong in WRONG.items():
        flow.__class__ = type("Wrong", (FlowPrior,), {name: wrong})
        assert core.check_prior(flow) > 0.01, name


MODELS = {"2a": (ImageVAE, 2, StandardNormal), "2b": (ImageVAE, 2, FlowPrior), "bonus": (LossyVAE, 2, 2, "flow")}


def test_nothing_that_draws_builds_a_graph():
    model, z = ImageVAE(2, FlowPrior), torch.randn(2, 2, 8, 8)
    drawn = *model.sample(2), *model.decode(z), *evaluate(model, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert not any(x.requires_grad for x in drawn) and model.decoder(z)[0].requires_grad  # control


@pytest.mark.parametrize("name", MODELS)
def test_bounds_stay_finite_whatever_the_images(name):
    contrast, centre = torch.linspace(0, 3, 9)[:, None, None, None], 256 * torch.rand(9, 3, 1, 1)
    x = (centre + 256 * contrast * (torch.rand(9, 3, 32, 32) - 0.5)).floor().clamp(0, 255).to(torch.uint8)
    x[-3:] = torch.stack([0 * x[0], 0 * x[0] + 255, 255 * (x[-1] % 2)])
    kind, *sizes = MODELS[name]
    model = kind(*sizes)
    optimisers = core.make_optimisers(model, 2e-3, 0.012)
    for some in x.split(3):
        core.train_step(model, optimisers, some, "fp32")
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(t.isfinite().all() and t.shape == (9,) and t.dtype == torch.float64 for t in evaluate(model, x))
