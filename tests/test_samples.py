"""Samples are of the density that is stated: their moments, their paths, and each pixel from those before it."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import bonus
import core
from bonus import COMPONENTS, LossyVAE, mixture_sample
from conftest import Call

LOG_STD = torch.tensor([[-1.0, 0.5], [1.0, -2.0]]).repeat(16, 16)  # of pixels, by row and column


def flow(shape):
    """A flow that moves, stretches and correlates."""
    prior = core.FlowPrior(shape, 16)
    for parameter in prior.net[-1].parameters():
        nn.init.normal_(parameter, 0, 0.4)
    return prior


def far_from_white(x):
    """The largest error of x [N, ...] as standard normal noise, in standard errors: of mean, variance, correlation."""
    x = x.flatten(1).double()
    products = x.T @ x / len(x) - torch.eye(x.shape[1])
    products.diagonal().div_(2**0.5)
    return len(x) ** 0.5 * max(x.mean(0).abs().max().item(), products.abs().max().item())


@pytest.mark.parametrize("prior", [core.StandardNormal, flow])
def test_samples_have_the_priors_and_the_decoders_moments(prior):
    """The decoder's mean is z, enlarged. What it adds is white noise times its std, and z is white before the flow."""
    model = core.ImageVAE(1, prior)
    model.decoder = Call(lambda z: (z.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat(1, 3, 1, 1), LOG_STD))
    state, (x, mu) = torch.get_rng_state(), model.sample(2000, core.fixed_noise("test"))
    assert torch.equal(torch.get_rng_state(), state)  # all noise is the key's
    z = mu[:, :1, ::4, ::4]
    again, mu_again = model.decode(z, core.fixed_noise("another"))
    with torch.no_grad():
        eps = model.prior.z_to_eps(z)[0]
    own, of_another = (((drawn - mu) / LOG_STD.exp())[:, :, ::4, 1::4] for drawn in (x, again))  # of some pixels
    assert far_from_white(torch.cat([eps, own], 1)) < 5.5  # z and the noise are independent too
    assert torch.equal(mu, mu_again) and far_from_white(torch.cat([own, of_another], 1)) < 5.5
    assert far_from_white(1.2 * own) > 5.5 and (far_from_white(z) > 20) == (prior is flow)  # controls


@pytest.mark.parametrize("of_bonus", [False, True])
def test_figures_show_what_their_captions_say(of_bonus, tmp_path, monkeypatch):
    """The decoder's mean is z, enlarged; the code is the image, made smaller; the flow is not the identity."""
    model, panels, drawn = LossyVAE(2, 1, "flow") if of_bonus else core.ImageVAE(2, flow), {}, []
    model.prior, model.encoder = flow((2, 8, 8)), Call(lambda x: (3 * F.avg_pool2d(x[:, :2], 4), None))
    log_std = torch.tensor(-4.0)
    model.decoder = Call(lambda z: (F.interpolate(0.8 * torch.tanh(0.2 * z), None, 4)[:, [0, 1, 0]], log_std))

    @torch.no_grad()
    def levels(z):
        return core.quantise(model.decoder(z)[0])

    def close(one, other):  # up to the rounding of the flow and of the levels
        return one.shape == other.shape and (one.int() - other.int()).abs().max() <= 1

    def draw_levels(_, z, *key, same=False):
        drawn.append((key, same))
        return levels(z)

    monkeypatch.setattr(LossyVAE, "draw_levels", draw_levels)
    monkeypatch.setattr(core, "save_grid", lambda x, columns, path, **_: panels.update({path.stem: (columns, [*x])}))
    test = torch.randint(0, 256, (19, 3, 8, 8), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    (bonus.draw_figures if of_bonus else core.draw_image_figures)(model, test, tmp_path, 0)
    images, (columns, rows), (_, samples) = test[::2], panels["interpolations"], panels["samples"]
    codes = model.encoder(core.bin_centres(images))[0]
    with torch.no_grad():
        eps = model.prior.z_to_eps(codes)[0]

    assert columns == 12 and len(rows) == 2  # a row for each pair: its images at both ends, its codes between them
    for panel, ends, to_z in zip(rows, (codes, eps), (lambda z: z, model.prior.eps_to_z), strict=True):
        for row, (first, last), pair in zip(panel.split(12), images.split(2), ends.split(2), strict=True):
            path = torch.stack([(1 - k / 9) * pair[0] + k / 9 * pair[1] for k in range(10)])
            assert torch.equal(row[0], first) and torch.equal(row[11], last) and close(row[1:11], levels(to_z(path)))
        assert close(panel.unflatten(0, (5, 12))[:, [1, 10]].flatten(0, 1), levels(codes))
    assert not close(*rows) and not close(levels(eps), levels(codes))  # controls: the flow bends

    assert close(samples[0], levels(model.prior.sample(100, core.fixed_noise("samples"))))
    found = panels["lossy" if of_bonus else "reconstructions"][1]
    assert torch.equal(found[0], images) and all(close(x, levels(codes)) for x in found[1 : 4 if of_bonus else 2])
    if of_bonus:
        (_, in_z, in_eps, *of_codes) = drawn
        assert in_z == in_eps and in_z[1] and len(set(of_codes)) == 3 and not any(same for _, same in of_codes)
    else:
        for mu, x in (samples, found[1:]):  # of the same z
            assert ((x.int() - mu.int()) / 128).std().item() == pytest.approx(math.exp(-4), rel=0.03)


@pytest.mark.parametrize("latents, receptive_field", [(2, 1), (2, 3), (0, 2)])
def test_a_sample_is_what_forward_says_of_it_with_the_same_noise(latents, receptive_field):
    """`sample` draws pixel by pixel; here all at once, from the parameters that `forward` gives the finished image."""
    net = LossyVAE(latents, receptive_field, "flow").decoder
    nn.init.normal_(net.rest[-1].weight, 0, 0.2)
    z, u, other = torch.randn(2, latents, 8, 8), *torch.rand(2, 2, COMPONENTS + 3, 32, 32)
    u[:, :, 3] = 0  # which torch.rand gives now and then
    levels, whole = net.sample(z, u), copy.deepcopy(net).double()

    @torch.no_grad()
    def drawn(seen, noise):
        params = whole(core.bin_centres(seen).double(), net.features(z).double())
        assert params.isfinite().all()
        return core.quantise(mixture_sample(params, noise.double() + 2.0**-25))

    assert torch.equal(drawn(levels, u), levels) and levels.float().std() > 10
    for seen, noise in ((levels, other), (levels.roll(1, 3), u), (levels.roll(1, 2), u)):
        assert (drawn(seen, noise) != levels).float().mean() > 0.2  # controls
    i, differences = torch.zeros(1, 1).long(), 6 * receptive_field * (receptive_field + 1)
    assert not net.neighbours(torch.rand(2, 3, 32, 32), i, i + 1)[:, :differences].any()  # outside there are none


def test_the_same_noise_draws_equal_images_of_equal_codes_and_other_noise_others():
    model, z = LossyVAE(1, 1, "normal"), torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    same, each, other = (model.draw_levels(z, *key, same=key == ("a", 1)) for key in (("a", 1), ("a",), ("b",)))
    assert torch.equal(same[0], same[1]) and not torch.equal(each[0], each[1]) and not torch.equal(each, other)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_grid_shows_every_image_of_every_panel_two_dots_a_pixel_in_rows(stacked, tmp_path):
    panels = torch.randint(0, 250, (2, 5, 3, 32, 32), dtype=torch.uint8)
    core.save_grid(panels, 3, tmp_path / "grid.png", stacked)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    height, width = picture.shape[0] // (1 + stacked), picture.shape[1] // (2 - stacked)
    for p, panel in enumerate(panels):
        for k, image in enumerate(panel):
            y = 2 * (8 + 1 + 33 * (k // 3)) + p * height * stacked  # 8 of margin, then images with lines of 1 between
            x = 2 * (8 + 1 + 33 * (k % 3)) + p * width * (not stacked)
            shown = picture[y : y + 64, x : x + 64]
            assert np.array_equal(shown[::2, ::2], image.permute(1, 2, 0)) and np.array_equal(shown[::2], shown[1::2])
    assert (picture == 255).all(2).sum() == picture[..., 0].size - 10 * 64 * 64  # and nothing else
