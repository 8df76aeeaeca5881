"""The bonus: mixtures that sum to 1, what a pixel may see, and samples that do not depend on the order of drawing."""

import argparse
import itertools
import math

import pytest
import torch
from torch import nn

import bonus
from conftest import noise_file
from bonus import LocalPixelCNN, LossyVAE, logistic_log_prob, mixture_log_prob, mixture_sample
from core import MaskedConv2d, bits_per_dim, evaluate, fixed_noise, in_bits, quantise, wavefront_slope

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
        home = -1 if level == 0 else 1 if level == 255 else math.copysign(1, (level + 0.5) / 128 - 1 - mu)
        at_home = (level, mu) in ((0, -1000.0), (255, 1000.0))  # far out in the tail of its own level
        assert gradients[0] * home > 0 or (at_home and gradients[0].abs() < 1e-9)  # drawn to its level, however far


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_all_colours_of_a_pixel_sum_to_one(spread):
    """The joint distribution of R, G and B, on 16 levels: 4,096 colours."""
    levels = torch.tensor(list(itertools.product(range(16), repeat=3))).reshape(-1, 3, 1, 1)
    params = mixture_params(1, 1, 1, spread=spread).double()
    log_p = mixture_log_prob(levels, params.expand(len(levels), -1, -1, -1), num_levels=16)
    assert log_p.shape == (4096,) and log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    wrong = mixture_log_prob(levels.flip(1), params.expand(len(levels), -1, -1, -1), num_levels=16)
    assert not torch.allclose(wrong, log_p, atol=0.1)  # the order of the colours matters


def test_a_mixture_that_is_uniform_over_the_levels_is_8_bits_per_dim():
    """A logistic so wide that all bins but the two with the tails are alike; its own inner mass taken off, 8 bits.

    Two levels, each half of a logistic whose middle is at 0, are 1 bit exactly: the bins with the tails.
    """
    params = torch.zeros(1, 100, 2, 2, dtype=torch.float64)
    assert -bits_per_dim(mixture_log_prob(torch.randint(0, 2, (1, 3, 2, 2)), params, num_levels=2), 12).item() == (
        pytest.approx(1, abs=1e-12)
    )
    params[:, 40:70] = 1e4  # scales at their upper bound: e^3 on a range of 2
    levels = torch.randint(1, 255, (1, 3, 2, 2))
    scale = math.exp(3)
    inner = math.log(2 * torch.sigmoid(torch.tensor(254 / 256 / scale).double()).item() - 1)  # log P(1..254)
    nats = mixture_log_prob(levels, params).item() - 12 * inner  # given that no level is an edge
    assert -bits_per_dim(nats, 12) - math.log2(254 / 256) == pytest.approx(8, abs=1e-3)


def test_samples_follow_log_prob():
    """Red by its own distribution, level by level; all three colours by the mean of log P against its sum."""
    params = mixture_params(1, 1, 1).double()
    params[:, 10:] *= 0.3
    params[:, 40:70] += 1.5  # wide enough for sums by importance
    n = 20_000
    noise = torch.rand(n, 13, 1, 1, generator=fixed_noise(0)).double() + 2.0**-25
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
    net.first.kernel = lambda: net.first.weight  # control: without the mask the future is seen
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


@pytest.mark.parametrize("receptive_field", [1, 2])
def test_pixels_along_anti_diagonals_are_those_in_raster_order(receptive_field):
    torch.manual_seed(0)
    net = LocalPixelCNN(2, receptive_field)
    nn.init.normal_(net.rest[-1].weight, 0, 0.2)
    z, u, other = torch.randn(2, 2, 8, 8), *torch.rand(2, 2, 13, 32, 32)
    levels = net.sample(z, u)
    assert levels.dtype == torch.uint8 and levels.float().std() > 10
    assert torch.equal(levels, net.sample(z, u, slope=32))
    slope = wavefront_slope(net)
    assert slope == receptive_field + 1
    assert not torch.equal(levels, net.sample(z, u, slope=slope - 1))  # control
    assert not torch.equal(levels, net.sample(z, other))


def test_log_prob_of_model_samples_matches_the_entropy_that_the_model_states():
    """The mean of -log P over samples equals the mean of the mixtures' own entropies at the contexts seen."""
    torch.manual_seed(1)
    net = LocalPixelCNN(0, 1)
    nn.init.normal_(net.rest[-1].weight, 0, 0.05)
    n = 32
    levels = net.sample(torch.zeros(n, 0, 8, 8), torch.rand(n, 13, 32, 32))
    x = (levels + 0.5) / 128 - 1
    with torch.no_grad():
        params = net(x, net.features(torch.zeros(n, 0, 8, 8)))
        nats = -mixture_log_prob(levels, params)  # [n]
        again = mixture_sample(params.double(), torch.rand(n, 13, 32, 32).double().clamp(1e-9, 1 - 1e-9))
        entropy = -mixture_log_prob(((again + 1) * 128 - 0.5).round(), params)
    error = math.hypot(nats.std().item(), entropy.std().item()) / math.sqrt(n)
    assert abs(nats.mean().item() - entropy.mean().item()) < 4 * error < 0.03 * entropy.mean().item()
    assert (
        -mixture_log_prob(255 - levels, params).mean().item() > nats.mean().item() + 4 * error
    )  # control: others fit worse


# --------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("latents, prior", [(2, "flow"), (2, "normal"), (0, "flow")])
def test_bound_is_a_code_length_of_the_levels(latents, prior):
    """The decoder term is minus the log-probability of the image's own levels, from z and the pixels before each.

    A pixel's factor sums to 1 over all colours (above); here, another last pixel changes the last factor alone. Uniform
    noise costs 8 bits/dim and more, whatever the model.
    """
    model = LossyVAE(latents, 1, prior)
    nn.init.normal_(model.decoder.rest[-1].weight, 0, 0.05)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    terms = evaluate(model, images)
    assert terms.recon.shape == terms.kl.shape == (5,)
    assert (terms.kl == 0).all() if latents == 0 else (terms.kl > 0).all()
    assert 8 < in_bits(terms, 3072)["neg_elbo_bpd"] < 20
    with torch.no_grad():
        x = model.to_x(images)
        z, _, _ = model.posterior(x, fixed_noise("evaluation", 0, 0))
        by_hand = -mixture_log_prob(images, model.decoder(x, model.decoder.features(z)))
        assert torch.allclose(terms.recon, by_hand.double(), rtol=1e-6)
        params = model.decoder(x[:1], model.decoder.features(z[:1]))[..., -1:, -1:]
        other = images[:1].clone()
        other[..., -1, -1] += 100  # modulo 256
        changed = model.log_p_x(model.to_x(other), z[:1]) - model.log_p_x(x[:1], z[:1])
        factors = [mixture_log_prob(some[..., -1:, -1:], params) for some in (images[:1], other)]
        assert torch.allclose(changed, factors[1] - factors[0], atol=1e-2) and changed.abs() > 0.1


def test_nearest_training_image_of_a_training_image_is_itself():
    train = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(bonus.nearest(train[[4, 0]], train), train[[4, 0]])


def test_nearest_by_blocks_is_nearest_in_one_go(monkeypatch):
    train = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    samples = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    whole, split = bonus.nearest(samples, train), torch.Tensor.split
    distances = torch.cdist(samples.flatten(1).double(), train.flatten(1).double())
    assert torch.equal(whole, train[distances.argmin(1)])
    for block in (1, 7, 49):
        monkeypatch.setattr(torch.Tensor, "split", lambda x, size, dim=0, block=block: split(x, block, dim))
        assert torch.equal(bonus.nearest(samples, train), whole)


def test_free_bits_leave_a_kl_below_them_uncharged():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    gradients = []
    for free_bits in (0.0, 8.0):
        model = LossyVAE(2, 1, "flow", free_bits=free_bits)
        model.loss(images).backward()
        gradients.append(model.prior.net[-1].weight.grad.abs().max().item())
    assert gradients[0] > 0 and gradients[1] == 0  # only the KL moves the prior


@pytest.mark.parametrize("free_bits, nats, charged", [(0.0, -1.0, True), (0.5, -1.0, False), (0.5, 3000.0, True)])
def test_a_kl_is_charged_unless_it_is_below_the_free_bits(free_bits, nats, charged):
    """Without free bits a sampled KL below 0 is charged too. 3,000 nats are 1.4 bits/dim."""
    model, kl = LossyVAE(2, 1, "normal", free_bits=free_bits), torch.tensor(nats, requires_grad=True)
    model.kl = lambda z, mu, log_std: kl.expand(len(z))
    model.loss(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)).backward()
    assert kl.grad.item() == pytest.approx(charged / (3072 * math.log(2)))


def test_without_its_remedies_the_bonus_trains_on_the_bound_itself():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for remedies, changed in (({}, False), ({"blind": 1.0}, True), ({"free_bits": 8.0}, True)):
        torch.manual_seed(0)
        model = LossyVAE(2, 1, "flow", **remedies)
        for kl_weight in (1.0, 0.3):
            torch.manual_seed(1)
            loss = model.loss(images, kl_weight).item()
            torch.manual_seed(1)
            recon, kl = model(images)
            bound = bits_per_dim((recon + kl_weight * kl).mean().item(), 3072)
            assert (loss != pytest.approx(bound, rel=1e-5)) == changed


def test_the_blind_term_is_in_training_alone_and_sees_no_neighbours():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    models, losses = {}, {}
    for blind in (0.0, 2.0):
        torch.manual_seed(1)
        models[blind] = LossyVAE(2, 1, "normal", blind)
        nn.init.normal_(models[blind].decoder.rest[-1].weight, std=0.05)
        torch.manual_seed(2)
        losses[blind] = models[blind].loss(images)
    model = models[2.0]
    assert torch.equal(evaluate(model, images).recon, evaluate(models[0.0], images).recon)  # whatever its mode:
    assert torch.equal(evaluate(model.eval(), images).recon, evaluate(model.train(), images).recon)
    with torch.no_grad():
        torch.manual_seed(2)
        x = model.to_x(images)
        z, _, _ = model.posterior(x)
        from_z_alone = mixture_log_prob(quantise(x), model.decoder.rest(model.decoder.features(z)))
        seeing = model.log_p_x(x, z)
    expected = losses[0.0] - 2 * bits_per_dim(from_z_alone.mean(), 3072)
    assert torch.allclose(losses[2.0], expected, rtol=1e-5) and ((from_z_alone - seeing).abs() > 1).all()
    for done, weight in ((0.5, 1.0), (1.0, 0.0)):  # it fades over training
        torch.manual_seed(2)
        expected = losses[0.0] - weight * bits_per_dim(from_z_alone.mean(), 3072)
        assert torch.allclose(model.loss(images, 1.0, done), expected, rtol=1e-5)


def test_every_row_of_the_table_is_trained_as_the_model_is_but_for_its_receptive_field_and_epochs(
    tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(bonus, "fit", lambda model, splits, **options: asked.append((model, options)))
    given = dict(latents=2, lr=0.5, batch_size=3, seed=7, device="cpu", precision="bf16", kl_warmup=0.25, resume=False)
    args = argparse.Namespace(**bonus.DEFAULTS | given | {"table_epochs": 9})
    splits = {"test": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)}
    rows = bonus.compare_receptive_fields(args, splits, tmp_path)
    assert [(row["receptive_field"], row["epochs"]) for row in rows] == [(1, 9), (2, 9), (3, 9)]
    assert [model.decoder.first.kernel_size[0] for model, _ in asked] == [3, 5, 7]
    for _, options in asked:
        assert options["epochs"] == 9
        for name in ("lr", "muon_lr", "schedule", "batch_size", "seed", "precision", "kl_warmup", "resume"):
            assert options[name] == getattr(args, name), name


def test_the_tables_budget_is_a_fifth_of_the_epochs_rounded_up_unless_it_is_given(tmp_path, monkeypatch):
    asked = []

    def table(args, splits, progress):
        asked.append(args.table_epochs)
        raise KeyboardInterrupt

    monkeypatch.setattr(bonus, "fit", lambda *_, **__: {})
    monkeypatch.setattr(bonus, "compare_receptive_fields", table)
    for name in ("draw_figures", "check_prior", "plot_curves"):
        monkeypatch.setattr(bonus, name, lambda *_: 0.0)
    flags = ["--data", noise_file(tmp_path), "--limit", "20", "--latents", "2", "--device", "cpu"]
    for k, more in enumerate((["10"], ["11"], ["10", "--table-epochs", "7"])):
        with pytest.raises(KeyboardInterrupt):
            bonus.main([*flags, "--out", str(tmp_path / str(k)), "--epochs", *more])
    assert asked == [2, 3, 7]


def said_of(found):
    """The report's sentences on a code, its costs as found."""
    rest = {"test_kl_per_position_bits": [[1.0]], "final": {"test": {"neg_elbo_bpd": 4.0}}}
    return bonus.code_text({"args": {"blind": 1.0, "free_bits": 0.0}, **rest, **found})


def test_a_code_is_said_to_be_used_only_where_taking_it_away_costs():
    brightness = torch.randint(20, 230, (40, 1, 1, 1))
    levels = (brightness + torch.randint(-9, 10, (40, 3, 32, 32))).to(torch.uint8)
    model = LossyVAE(1, 1, "normal").eval()
    deaf = bonus.cost_of_another_code(model, levels)  # untrained: the decoder does not hear z
    assert "is not measurably used" in said_of(deaf)

    class Telling(nn.Module):  # z is the image's mean, and the decoder's means are z
        def forward(self, x):
            mean = x.mean((1, 2, 3), keepdim=True).expand(-1, 1, 8, 8)
            return mean, torch.full_like(mean, -6.0)

    model.encoder = Telling()
    model.log_p_x = lambda x, z: -1000 * (x - z.mean((1, 2, 3), keepdim=True)).abs().mean((1, 2, 3))
    assert "**The code is used**" in said_of(bonus.cost_of_another_code(model, levels))
    noisy = {"another_code_costs_bpd": 0.1, "another_code_costs_se_bpd": 0.05}
    assert "is not measurably used" in said_of(noisy)


def test_the_table_says_that_the_kl_falls_only_where_it_clearly_does():
    def rows(*kls, error=0.01):
        each = {"epochs": 1, "neg_elbo_bpd": 4.0, "neg_elbo_se_bpd": 0.1, "recon_bpd": 3.0, "kl_se_bpd": error}
        return [each | {"receptive_field": k, "kl_bpd": kl} for k, kl in enumerate(kls, 1)]

    assert "falls in every row" in bonus.table_text(rows(0.3, 0.2, 0.1))
    for unclear in (rows(0.1, 0.2, 0.3), rows(0.3, 0.1, 0.2), rows(0.3, 0.2, 0.1, error=0.2)):
        assert "does not clearly fall" in bonus.table_text(unclear)


def test_a_code_is_said_to_pay_only_where_the_model_without_one_is_clearly_worse():
    used = {"another_code_costs_bpd": 0.1, "another_code_costs_se_bpd": 0.01}

    def said(above):
        return said_of(used | {"no_code": {"neg_elbo_bpd": 4.0 + above, "above_bpd": above, "above_se_bpd": 0.01}})

    assert "**The code pays**" in said(0.1) and "**The code does not pay**" in said(-0.1)
    assert "**The code neither pays nor costs**" in said(0.01) and "neither" in said(-0.01)
    assert "not known" in said_of(used)


def test_sampled_colours_follow_the_colours_before_them():
    """All coefficients near 1, noise in R alone: G = R and B = R + G, up to a level or two."""
    params = torch.zeros(1, 10, 10, 1, 1, dtype=torch.float64)
    params[:, 4, :], params[:, 5:7, :], params[:, 7:, :] = 0.0, -6.0, 9.0
    u = torch.rand(500, 13, 1, 1, generator=fixed_noise(0)).double() + 2.0**-25
    r, g, b = mixture_sample(params.flatten(1, 2).expand(500, -1, -1, -1), u)[..., 0, 0].T
    inside = (r.abs() < 0.4) & (u[:, -2:, 0, 0] - 0.5).abs().amax(1).lt(0.45)
    assert inside.sum() > 200 and r[inside].std() > 0.05
    assert (g - r)[inside].abs().max() < 0.03 and (b - r - g)[inside].abs().max() < 0.03


def test_a_convolution_of_differences_does_not_see_the_level():
    conv = bonus.DifferenceConv2d("A", 2, 3, 5).double()
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    inner = conv(x + 0.7)[..., 2:-2, 2:-2] - conv(x)[..., 2:-2, 2:-2]
    assert inner.abs().max() < 1e-12
    plain = MaskedConv2d("A", 2, 3, 5).double()
    assert (plain(x + 0.7) - plain(x))[..., 2:-2, 2:-2].abs().max() > 0.01
    assert (conv.kernel()[:, :, conv.mask == 0] == 0).all()
