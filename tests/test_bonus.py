"""The bonus: mixtures that sum to 1, what a pixel may see, and samples that do not depend on the order of drawing."""

import itertools
import math

import pytest
import torch
from torch import nn

import bonus
from bonus import LocalPixelCNN, LossyVAE, logistic_log_prob, mixture_log_prob, mixture_sample
from core import (
    FlowPrior, MaskedConv2d, MaskedResidual, Noise, StandardNormal, bits_per_dim, bounded_log_std, evaluate, in_bits,
    kl_per_position, quantise, wavefront_slope, wavefronts,
)  # fmt: skip
from conftest import arguments

LEVELS = torch.arange(256)


def mixture_params(*shape, spread=1.0):
    """Random mixture parameters, [B, 100, ...]."""
    torch.manual_seed(4)
    return spread * torch.randn(shape[0], 100, *shape[1:])


def tiny_pixelcnn(receptive_field=1, latents=2):
    """In float64, its last layer no longer zero."""
    torch.manual_seed(0)
    net = LocalPixelCNN(latents, receptive_field).double()
    nn.init.normal_(net.rest[-1].weight)
    return net


# --------------------------------------------------------------------------------------- the pixel's distribution


@pytest.mark.parametrize("log_scale", [-7.0, -5.0, -3.0, -1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("mu", [-30.0, -1.5, -1.0, -0.3, 0.0, 0.77, 1.0, 4.0])
def test_all_256_levels_of_a_logistic_sum_to_one_in_fp32(mu, log_scale):
    log_p = logistic_log_prob(LEVELS, torch.tensor(mu), torch.tensor(log_scale))
    assert log_p.dtype == torch.float32 and log_p.isfinite().all() and (log_p <= 0).all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    if mu == 0.77 and log_scale > 0:  # control: without the tails mass is missing
        assert log_p[1:-1].exp().sum() < 0.99


def test_logistic_log_prob_is_the_difference_of_cdfs_and_edges_take_the_tails():
    mu, log_scale = torch.tensor(0.1).double(), torch.tensor(-1.0).double()
    edges = torch.sigmoid((torch.arange(1, 256).double() / 128 - 1 - mu) / log_scale.exp())
    expected = torch.diff(edges, prepend=torch.zeros(1).double(), append=torch.ones(1).double()).log()
    assert torch.allclose(logistic_log_prob(LEVELS.double(), mu, log_scale), expected, atol=1e-10)


@pytest.mark.parametrize("log_scale", [-7.0, -2.0, 3.0])
@pytest.mark.parametrize("mu", [-1000.0, -1.0, 0.3, 1000.0])
def test_gradients_at_the_extremes_are_finite_and_point_home(mu, log_scale):
    m, s = torch.tensor(mu, requires_grad=True), torch.tensor(log_scale, requires_grad=True)
    for level in (0, 1, 128, 254, 255):
        gradients = torch.autograd.grad(logistic_log_prob(torch.tensor(level), m, s), (m, s))
        assert all(g.isfinite() for g in gradients)
        if mu == 1000 and level < 255:
            assert gradients[0] < 0  # a mean far above is drawn down, however far


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_all_colours_of_a_pixel_sum_to_one(spread):
    """The joint distribution of R, G and B, on 16 levels: 4,096 colours."""
    levels = torch.tensor(list(itertools.product(range(16), repeat=3))).reshape(-1, 3, 1, 1)
    params = mixture_params(1, 1, 1, spread=spread).double()
    log_p = mixture_log_prob(levels, params.expand(len(levels), -1, -1, -1), num_levels=16)
    assert log_p.shape == (4096,) and log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    wrong = mixture_log_prob(levels.flip(1), params.expand(len(levels), -1, -1, -1), num_levels=16)
    assert not torch.allclose(wrong, log_p, atol=0.1)  # the order of the colours matters


def test_uniform_mixture_is_8_bits_per_dim():
    params = torch.zeros(1, 100, 2, 2)
    params[:, 40:70] = 1e4  # scales at their upper bound: e^3 on a range of 2
    levels = torch.randint(1, 255, (1, 3, 2, 2))
    assert -bits_per_dim(mixture_log_prob(levels, params), 12).item() > 8  # tails hold the rest
    step, scale = 2 / 256, math.exp(bounded_log_std(torch.tensor(1e4)).item())
    assert mixture_log_prob(levels, params).item() == pytest.approx(12 * math.log(step / (4 * scale)), rel=1e-2)


def test_samples_follow_log_prob():
    """Red by its own distribution, level by level; all three colours by the mean of log P against its sum."""
    params = mixture_params(1, 1, 1).double()
    params[:, 10:] *= 0.3
    params[:, 40:70] += 1.5  # wide enough for sums by importance
    n = 20_000
    noise = Noise.fixed(torch.arange(n), 0).uniform(13, 1, 1).double() + 2.0**-25
    x = mixture_sample(params.expand(n, -1, -1, -1), noise)
    levels = ((x + 1) * 128 - 0.5).round().long()
    assert torch.equal((levels + 0.5) / 128 - 1, x) and levels.min() >= 0 and levels.max() <= 255
    logits, mu, log_scale, _ = bonus.split_params(params)
    red = logistic_log_prob(LEVELS.double()[None], mu[0, :, 0, 0], log_scale[0, :, 0, 0])  # (K, 256)
    p_red = torch.logsumexp(torch.log_softmax(logits, 1)[0, :, 0] + red, 0).exp()
    counts = torch.bincount(levels[:, 0].flatten(), minlength=256)
    big = p_red * n > 20
    chi2 = ((counts - n * p_red) ** 2 / (n * p_red))[big].sum().item()
    assert abs(chi2 - big.sum().item()) < 5 * math.sqrt(2 * big.sum().item())
    # the sum over all 256^3 colours of P log P, by importance from uniform ones
    log_p = mixture_log_prob(levels, params.expand(n, -1, -1, -1))
    uniform = torch.randint(0, 256, (200_000, 3, 1, 1))
    log_q = mixture_log_prob(uniform, params.expand(200_000, -1, -1, -1))
    terms = 256.0**3 * log_q.exp() * log_q
    se = math.hypot(log_p.std().item() / n**0.5, terms.std().item() / 200_000**0.5)
    assert abs(log_p.mean().item() - terms.mean().item()) < 4 * se < 0.3


# ------------------------------------------------------------------------------------------------- what a pixel sees


def seen_by(net, row, column):
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    out = net(x, net.features(torch.randn(1, 2, 8, 8, dtype=torch.float64)))[0, :, row, column].sum()
    return torch.autograd.grad(out, x)[0].abs().sum((0, 1)) > 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_receptive_field_is_exactly_as_large_as_its_name_says(n):
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[16 - n : 16, 16 - n : 16 + n + 1] = True
    expected[16, 16 - n : 16] = True
    assert torch.equal(seen_by(tiny_pixelcnn(n), 16, 16), expected)  # the farthest is seen, the next is not


def test_a_pixel_sees_the_code_but_not_itself_nor_the_future():
    net = tiny_pixelcnn()
    z = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    out = net(torch.rand(1, 3, 32, 32).double(), net.features(z))[0, :, 5, 5].sum()
    assert torch.autograd.grad(out, z)[0].abs().sum() > 0
    assert not seen_by(net, 5, 5).flatten()[5 * 32 + 5 :].any()
    net.first = nn.Conv2d(3, bonus.WIDTH, 3, padding=1).double()  # control: without the mask the future is seen
    assert seen_by(net, 5, 5)[6, 6]


def test_colours_see_each_other_in_the_order_r_g_b():
    params = mixture_params(1, 1, 1).double()

    def p_of(levels):  # log p(R), log p(G|R), log p(B|R,G) cannot be told apart in a joint: marginalise on 16 levels
        grid = torch.arange(16)
        blue = torch.stack([torch.full((16,), levels[0]), torch.full((16,), levels[1]), grid], 1).reshape(16, 3, 1, 1)
        return torch.logsumexp(mixture_log_prob(blue, params.expand(16, -1, -1, -1), 16), 0)  # log p(R, G)

    green = torch.stack([p_of((5, g)) for g in range(16)])
    red_only = logistic_log_prob(torch.tensor(5), *(t[0, :, 0, 0, 0] for t in bonus.split_params(params)[1:3]), 16)
    log_p_red = torch.logsumexp(torch.log_softmax(bonus.split_params(params)[0], 1)[0, :, 0, 0] + red_only, 0)
    assert torch.logsumexp(green, 0).item() == pytest.approx(log_p_red.item(), abs=1e-9)  # R depends on no other colour
    other = torch.stack([p_of((12, g)) for g in range(16)])
    assert not torch.allclose(green.softmax(0), other.softmax(0), atol=0.01)  # control: G does depend on R


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
            t, s = flow.shift_and_scale(plain)
            plain[:, :, i, j] = t[:, :, i, j] + s[:, :, i, j].exp() * eps[:, :, i, j]
    assert torch.allclose(z, plain, atol=1e-4)


@pytest.mark.parametrize("receptive_field", [1, 2])
def test_pixels_along_anti_diagonals_are_those_in_raster_order(receptive_field):
    torch.manual_seed(0)
    net = LocalPixelCNN(2, receptive_field)
    nn.init.normal_(net.rest[-1].weight, 0, 0.2)
    z, i = torch.randn(2, 2, 8, 8), torch.arange(2)
    levels = net.sample(z, Noise.fixed(i, 0))
    assert levels.dtype == torch.uint8 and levels.float().std() > 10
    assert torch.equal(levels, net.sample(z, Noise.fixed(i, 0), slope=32))
    slope = wavefront_slope(net)
    assert slope == receptive_field + 1
    assert not torch.equal(levels, net.sample(z, Noise.fixed(i, 0), slope=slope - 1))  # control
    assert not torch.equal(levels, net.sample(z, Noise.fixed(i, 1)))


def test_log_prob_of_model_samples_matches_the_entropy_that_the_model_states():
    """The mean of -log P over samples equals the mean of the mixtures' own entropies at the contexts seen."""
    torch.manual_seed(1)
    net = LocalPixelCNN(0, 1)
    nn.init.normal_(net.rest[-1].weight, 0, 0.05)
    n = 8
    levels = net.sample(torch.zeros(n, 0, 8, 8), Noise.fixed(torch.arange(n), 0))
    x = (levels + 0.5) / 128 - 1
    with torch.no_grad():
        params = net(x, net.features(torch.zeros(n, 0, 8, 8)))
        nats = -mixture_log_prob(levels, params).mean().item()
        again = mixture_sample(params.double(), torch.rand(n, 13, 32, 32).double().clamp(1e-9, 1 - 1e-9))
        entropy = -mixture_log_prob(((again + 1) * 128 - 0.5).round(), params).mean().item()
    assert nats == pytest.approx(entropy, rel=0.01)
    assert -mixture_log_prob(255 - levels, params).mean().item() > 1.02 * nats  # control: other levels fit worse


# --------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("latents, prior", [(2, "flow"), (2, "normal"), (0, "flow")])
def test_bound_is_a_code_length_of_the_levels(latents, prior):
    torch.manual_seed(0)
    model = LossyVAE(latents, 1, prior)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    terms = evaluate(model, images)
    assert terms.recon.shape == terms.kl.shape == (5,)
    assert (terms.kl == 0).all() if latents == 0 else (terms.kl > 0).all()
    assert 8 < in_bits(terms, 3072)["neg_elbo_bpd"] < 20  # noise costs 8 bits/dim and more, whatever the model
    single = evaluate(model, images, batch_size=2)
    assert torch.allclose(single.neg_elbo, terms.neg_elbo, rtol=1e-5)


def test_kl_per_position_adds_up_to_the_kl():
    torch.manual_seed(0)
    for prior in (StandardNormal, lambda shape: FlowPrior(shape, 8)):
        model = LossyVAE(2, 1, "normal")
        model.prior = prior((2, 8, 8))
        for parameter in model.prior.parameters():
            nn.init.normal_(parameter, 0, 0.2)
        images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
        total = sum(map(sum, kl_per_position(model, images)))
        assert total == pytest.approx(evaluate(model, images).kl.mean().item() / math.log(2), rel=1e-5)


def test_nearest_training_image_of_a_training_image_is_itself():
    train = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(bonus.nearest(train[[4, 0]], train), train[[4, 0]])


def test_free_bits_leave_a_kl_below_them_uncharged():
    from core import fit

    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    splits = {"train": images, "valid": images[:4], "test": images[:4]}
    gradients = []
    for free_bits in (0.0, 8.0):
        model = LossyVAE(2, 1, "flow")
        fit(model, splits, arguments(epochs=1, batch_size=10, lr=1e-3), free_bits=free_bits)
        gradients.append(model.prior.net[-1].weight.grad.abs().max().item())
    assert gradients[0] > 0 and gradients[1] == 0  # only the KL moves the prior


def test_the_blind_term_is_in_training_alone_and_sees_no_neighbours():
    torch.manual_seed(0)
    x, z = LossyVAE(2, 1, "normal").to_x(torch.randint(0, 256, (3, 3, 32, 32))), torch.randn(3, 2, 8, 8)
    models = {}
    for blind in (0.0, 2.0):
        torch.manual_seed(1)
        models[blind] = LossyVAE(2, 1, "normal", blind)
        torch.nn.init.normal_(models[blind].decoder.rest[-1].weight, std=0.05)
    model = models[2.0]
    with torch.no_grad():
        assert torch.equal(model.eval().log_p_x(x, z), models[0.0].eval().log_p_x(x, z))
        seeing, both = model.log_p_x(x, z), model.train().log_p_x(x, z)
        assert torch.equal(models[0.0].train().log_p_x(x, z), seeing)
    from_z_alone = mixture_log_prob(quantise(x), model.decoder.rest(model.decoder.features(z)))
    assert torch.allclose(both, seeing + 2 * from_z_alone, rtol=1e-5) and ((from_z_alone - seeing).abs() > 1).all()


def test_a_code_is_said_to_be_used_only_where_taking_it_away_costs():
    torch.manual_seed(0)
    brightness = torch.randint(20, 230, (40, 1, 1, 1))
    levels = (brightness + torch.randint(-9, 10, (40, 3, 32, 32))).to(torch.uint8)
    model = LossyVAE(1, 1, "normal").eval()
    found = bonus.cost_of_another_code(model, levels)  # untrained: the decoder does not hear z
    assert abs(found["another_code_costs_bpd"]) < 0.001 + 4 * found["another_code_costs_se_bpd"]

    class Telling(torch.nn.Module):  # z is the image's mean, and the decoder's means are z
        def forward(self, x):
            mean = x.mean((1, 2, 3), keepdim=True).expand(-1, 1, 8, 8)
            return mean, torch.full_like(mean, -6.0)

    model.encoder = Telling()
    model.log_p_x = lambda x, z: -1000 * (x - z.mean((1, 2, 3), keepdim=True)).abs().mean((1, 2, 3))
    found = bonus.cost_of_another_code(model, levels)
    assert found["another_code_costs_bpd"] > 0.001 + 4 * found["another_code_costs_se_bpd"]


def test_sampled_colours_follow_the_colours_before_them():
    """All coefficients near 1, noise in R alone: G = R and B = R + G, up to a level or two."""
    params = torch.zeros(1, 10, 10, 1, 1, dtype=torch.float64)
    params[:, 4, :], params[:, 5:7, :], params[:, 7:, :] = 0.0, -6.0, 9.0
    u = Noise.fixed(torch.arange(500), 0).uniform(13, 1, 1).double() + 2.0**-25
    r, g, b = mixture_sample(params.flatten(1, 2).expand(500, -1, -1, -1), u)[..., 0, 0].T
    inside = (r.abs() < 0.4) & (u[:, -2:, 0, 0] - 0.5).abs().amax(1).lt(0.45)
    assert inside.sum() > 200 and r[inside].std() > 0.05
    assert (g - r)[inside].abs().max() < 0.03 and (b - r - g)[inside].abs().max() < 0.03
