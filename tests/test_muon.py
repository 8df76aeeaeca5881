"""Training's arithmetic: Muon against its published form, and densities that bf16 does not reach."""

import torch
from torch import nn
from torch.distributions import Normal

import core
from bonus import LocalPixelCNN, LossyVAE, mixture_log_prob


def published(x):
    """Newton-Schulz of one wide matrix, as K. Jordan prints it."""
    x = x / x.norm()
    for _ in range(5):
        g = x @ x.T
        x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
    return x


def test_muons_steps_are_the_published_ones():
    """Four steps at four rates. Kernels of many shapes share one optimiser: some are equal, some have the same smaller
    side and another long one, some have their channels last. The last one has no gradient."""
    shapes = [(16, 40, 3, 3), (24, 40), (40, 16, 3, 3), (24, 24), (16, 40, 3, 3), (16, 16), (32, 16, 4, 2), (40, 24)]
    weights = [torch.randn(shape).double() for shape in [*shapes, (16, 40, 3, 3)]]
    weights[2:5:2] = [w.contiguous(memory_format=torch.channels_last) for w in weights[2:5:2]]
    kernels, momenta = [nn.Parameter(w.clone()) for w in weights], [torch.zeros_like(w) for w in weights]
    muon = core.Muon(kernels, lr=0.0, momentum=0.9)
    for step, lr in enumerate((0.1, 0.2, 0.05, 0.3)):
        muon.param_groups[0]["lr"] = lr
        kernels[-1].grad = torch.zeros_like(kernels[-1])
        for k, kernel in enumerate(kernels[:-1]):
            kernel.grad = torch.randn(kernel.shape).double() * 10.0 ** (k % 3 - 6 + step)
            momenta[k] = momenta[k].lerp(kernel.grad, 0.1)
            nesterov, (a, b, *size) = kernel.grad.lerp(momenta[k], 0.9), kernel.shape
            if a <= b:  # the smaller of a and b is one side of the matrix, all else the other
                update = published(nesterov.flatten(1)).reshape(kernel.shape)
            else:
                update = published(nesterov.movedim(1, 0).flatten(1)).unflatten(1, (a, *size)).movedim(0, 1)
            weights[k] = weights[k] - lr * max(1.0, a / b) ** 0.5 * update
        muon.step()
        for kernel, expected in zip(kernels, weights, strict=True):
            assert torch.allclose(kernel.detach(), expected, atol=1e-9), (step, kernel.shape)


def test_densities_of_bf16_numbers_are_those_of_the_same_numbers_in_fp32():
    x, mu, log_std = torch.randn(3, 5, 64).bfloat16()
    levels, params = torch.randint(0, 256, (2, 3, 4, 4)), torch.randn(2, 100, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = core.normal_log_prob(x, mu, log_std), mixture_log_prob(levels, params)
    normal = Normal(mu.float(), log_std.float().exp()).log_prob(x.float()).sum(1)
    for mine, exact in zip(found, (normal, mixture_log_prob(levels, params.float())), strict=True):
        assert mine.dtype == torch.float32 and torch.allclose(mine, exact, rtol=1e-5)
    narrow = (-0.5 * ((x - mu) * torch.exp(-log_std)) ** 2 - log_std - 0.919).sum(1)
    assert not torch.allclose(narrow.float(), normal, rtol=1e-3)  # control: bf16 throughout


def test_under_autocast_products_alone_are_bf16():
    """What 2b's networks give is widened before it is used: the terms are those of their outputs, in float64."""
    model, images = core.ImageVAE(2, core.FlowPrior), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    nn.init.normal_(model.prior.net[-1].weight, 0, 0.1)
    noise = core.fixed_noise(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        terms, x = model(images, core.fixed_noise(0)), model.to_x(images, noise)
        z, mu, log_std = model.posterior(x, noise)
        (t, s), (eps, log_det) = model.prior.mean_and_log_std(z), model.prior.z_to_eps(z)
        x_mu, x_log_std = model.decoder(z)
    assert {part.dtype for part in (*terms, z, mu, log_std, t, s, eps, log_det, x_mu, x_log_std)} == {torch.float32}
    pairs = ((x, x_mu, x_log_std), (z, mu, log_std), (z, t, s))
    recon, q, p = (Normal(m.double(), r.double().exp()).log_prob(v.double()).sum((1, 2, 3)) for v, m, r in pairs)
    assert torch.allclose(terms.recon.double(), 3072 * torch.tensor(128.0).double().log() - recon, rtol=1e-5)
    assert torch.allclose(terms.kl.double(), q - p, rtol=1e-5)
    with torch.no_grad():
        assert 1e-4 < (s - model.prior.mean_and_log_std(z)[1]).abs().max() < 0.1  # control: products were bf16
    assert all((raw != raw.bfloat16().float()).any() for raw in (log_std, s, x_log_std))  # their bound is fp32 too


def test_the_pixelcnns_means_are_corrections_that_bf16_does_not_round_away():
    net, x, added = LocalPixelCNN(0, 1), core.bin_centres(torch.randint(0, 256, (2, 3, 32, 32))), 2.0**-10
    net.rest[-1].bias.data.view(10, -1)[1:4] = added
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        params = net(x, net.features(x.new_zeros(2, 0, 8, 8)))
        loss = LossyVAE(2, 1, "flow", blind=1.0).loss(images)
    mean = ((x[..., 1:, :-1] + x[..., :-1, 1:]) / 2)[:, :, None] + added
    assert loss.dtype == torch.float32 and (params.unflatten(1, (10, -1))[:, 1:4, :, 1:, 1:] - mean).abs().max() < 1e-6
    assert (mean.bfloat16() - mean).abs().max() > 0.9 * added  # control
