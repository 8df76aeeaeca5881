"""The floor under every bound on synthetic images: P(image | scene) is right, and the two sides are in order."""

import json
import math

import pytest
import torch

import core
from conftest import ROOT
from tools import floor, publish


def log_prob(levels, mean, amount=0.6):
    mean, amount = torch.tensor(mean).expand(len(levels), -1), torch.full((len(levels),), amount)
    return floor.scene_log_prob(levels[..., None, None], mean[..., None, None], amount)


def test_probabilities_of_all_levels_sum_to_one_also_at_the_ends():
    levels = torch.cartesian_prod(*(torch.arange(*ends) for ends in ((0, 7), (249, 256), (95, 108))))
    assert log_prob(levels, [0.3, 254.8, 100.7]).exp().sum().item() == pytest.approx(1, abs=1e-7)
    levels[:, 0] += 9  # control: away from the end, the tail is missing
    assert log_prob(levels, [9.3, 254.8, 100.7]).exp().sum() < 0.95


@pytest.mark.parametrize("mean", [[2.2, 1.0, 0.4], [100.2, 180.5, 97.9], [254.0, 253.1, 120.0]])
def test_mean_log_prob_is_the_entropy_of_draws(mean):
    noise = 0.6 * (torch.randn(200_000, 1) + 0.25 * torch.randn(200_000, 3))  # as in core.synthetic_batches
    levels, counts = (torch.tensor(mean) + noise).round().clamp(0, 255).long().unique(dim=0, return_counts=True)
    degrees, frequencies = len(levels) - 1, (counts / 200_000).double().log()

    def excess(*scene):
        """2 n (mean -log P - entropy of the frequencies), which is chi-squared with as many degrees as levels."""
        return 2 * (counts * (frequencies - log_prob(levels, *scene))).sum().item()

    assert abs(excess(mean) - degrees) < 6 * math.sqrt(2 * degrees) + 20
    assert min(excess(mean, 0.66), excess([m + 0.1 for m in mean])) > 10 * degrees  # controls


def test_scenes_are_those_of_their_images():
    levels, pictures, draws = floor.synthetic_scenes(1022, 1026)  # of two batches
    known = -floor.scene_log_prob(levels, pictures, core.noise_amount(draws))
    of_others = levels, pictures.roll(1, 0), core.noise_amount(draws)  # far off: the sum over n still has its peak
    others, finer = (-floor.scene_log_prob(*of_others, step=step) for step in (0.125, 0.05))
    assert 3 * known.max() < others.min() and torch.allclose(others, finer, rtol=1e-8)


def test_importance_weights_give_the_evidence_of_a_normal():
    image, std, data = floor.Image.__new__(floor.Image), 0.1, torch.linspace(-1, 1, 19).double()
    image.log_likelihood = lambda xi: torch.distributions.Normal(xi, std).log_prob(data).sum(1)
    evidence = torch.distributions.Normal(0.0, math.sqrt(1 + std**2)).log_prob(data).sum().item()
    q = data / (1 + std**2), torch.eye(19).double() * (1 + 1 / std**2)  # the posterior: all weights are the evidence
    exact, wide = (image.log_weights(*q, width, torch.randn(4000, 19).double()) for width in (1.0, 1.2))
    assert (exact - evidence).abs().max() < 1e-5 and (floor.iwae(wide) - evidence).abs() < 0.3


def test_published_bounds_are_above_the_floor_of_their_images():
    sides = json.loads((ROOT / "results/published/floor.json").read_text("utf-8")).values()
    low, cost = {side["first_image"]: side["scene_known"]["bpd"] for side in sides}, 0.0465
    assert all(abs(side["scene_costs_at_most"]["bpd"] - cost) < 1.4e-3 for side in sides)  # three standard errors
    full, (least, most) = pytest.approx(low[sum(core.SVHN_SIZES[:2])], abs=5e-4), core.SYNTHETIC_ENTROPY.values()
    assert full == least and full == most - cost
    found = floor.sides(floor.synthetic_scenes(0, 2), 2, draws=4, pilot=2)["scene_costs_at_most"]
    assert abs(found["bpd"] - cost) < 0.005
    for run in (run for runs in publish.published() for run in runs if run["args"].get("data") == "synthetic"):
        bounds = run["final"]["test"]["neg_elbo_bpd"], *run["test_codecs_bpd"].values()
        assert min(bounds) > low[run["data"]["train"] + run["data"]["valid"]] + 0.2
