"""The synthetic images' floor: the generator is what it was, P(image | scene) is right, and the bounds are in order."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch

import core
from conftest import ROOT
from tools import floor, readme_table
from tools.floor import synthetic_scenes

# SHA-256 of the first 3,000 images of seeds 0 and 1 as the generator made them before it was split (commit 8ce1d25).
DIGESTS = (
    "a12c5ff2672d18167539279b1b4e944569edc3c0797db70fdb01fad42eb9caf7",
    "ef6cba8c3718746a73c53cddced7e6f8f461ba154ba675e8419a262336a25626",
)
# Of seed 0's 3,000, every 144,000th level. Arithmetic of another width rounds 45 of all 9,216,000 levels otherwise.
LEVELS = (
    179, 140, 115, 130, 186, 71, 195, 125, 50, 148, 185, 123, 82, 55, 113, 195,
    111, 138, 51, 79, 149, 209, 139, 114, 75, 115, 31, 133, 255, 111, 222, 101,
    143, 150, 114, 118, 255, 111, 161, 116, 140, 103, 130, 107, 62, 50, 56, 100,
    173, 105, 61, 100, 95, 152, 146, 124, 0, 76, 127, 96, 107, 117, 219, 123,
)  # fmt: skip


def synthetic_images(n, seed=0):
    """The first n images of a seed's stream."""
    return synthetic_scenes(0, n, seed).images


def amounts(scenes):
    return core.noise_amount(scenes.draws)


def digest(images):
    return hashlib.sha256(images.tobytes()).hexdigest()


def combinations(*ranges):
    """Every combination of levels of one pixel's three colours, as images [n, 3, 1, 1]."""
    return torch.cartesian_prod(*(torch.arange(low, high + 1) for low, high in ranges))[..., None, None]


def pixels(mean, amount, n):
    """n copies of one pixel's scene: means [n, 3, 1, 1] and amounts [n]."""
    return torch.tensor(mean)[None, :, None, None].expand(n, -1, 1, 1), torch.full((n,), amount)


# --------------------------------------------------------------------------------------------------------- generator


@pytest.fixture(scope="module")
def images():
    """The first 3,000 images of seed 0."""
    return synthetic_images(3000)


def test_synthetic_images_are_bit_for_bit_what_they_were(images, monkeypatch):
    assert np.abs(images.reshape(-1)[::144_000].astype(int) - LEVELS).max() <= 1
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert (digest(images), digest(synthetic_images(3000, 1))) == DIGESTS
    monkeypatch.setattr(core, "SYNTHETIC_BATCH", 512)  # the same draws in another order
    images = synthetic_images(3000)
    assert digest(images) != DIGESTS[0]
    assert np.abs(images.reshape(-1)[::144_000].astype(int) - LEVELS).max() > 1


def test_scenes_of_later_images_are_theirs(images):
    for start, stop in ((0, 7), (1020, 1030), (2500, 3000)):
        scenes = synthetic_scenes(start, stop)
        assert np.array_equal(scenes.images, images[start:stop])
        assert len(scenes.means) == len(amounts(scenes)) == len(scenes.draws["u_font"]) == stop - start
    noise = torch.from_numpy(scenes.images).permute(0, 3, 1, 2) - scenes.means
    noise = noise / amounts(scenes)[:, None, None, None]
    inside = ((scenes.means > 30) & (scenes.means < 225)).all(1)  # where clamping does not show
    noise = noise.permute(0, 2, 3, 1)[inside & (amounts(scenes) > 1.5)[:, None, None]]  # nor rounding, much
    covariance = noise.T.double().cov()
    assert covariance.diagonal() == pytest.approx([1 + 1 / 16] * 3, abs=0.05)
    assert covariance[0, 1].item() == pytest.approx(1, abs=0.03)


def test_floor_of_images_that_were_loaded():
    scenes = synthetic_scenes(30, 40)
    levels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).clone()
    known = -core.scene_log_prob(levels, scenes.means, amounts(scenes))
    splits = {"train": torch.zeros(20), "valid": torch.zeros(10), "test": levels}
    found = core.synthetic_floor(splits, known + 3072 * math.log(2) * torch.linspace(0, 0.2, 10))
    assert found["scene_known_bpd"] == pytest.approx(core.bits_per_dim(known.mean().item(), 3072))
    assert found["excess_bpd"] == pytest.approx(0.1) and found["excess_se_bpd"] < 0.03  # paired: not the floor's own
    assert found["scene_known_bpd"] < found["colours_apart_bpd"] and found["images"] == 10
    core.check_above(-0.3, 0.1)
    with pytest.raises(ValueError, match="a defect"):
        core.check_above(-0.5, 0.1)
    of_other_scenes = core.synthetic_floor(splits | {"valid": torch.zeros(9)}, known)  # control: scenes one too early
    assert of_other_scenes["scene_known_bpd"] > 100


# ------------------------------------------------------------------------------------------------- P(levels | scene)


def test_probabilities_of_all_levels_sum_to_one():
    levels = combinations((0, 6), (249, 255), (95, 107))
    mean, amount = pixels([0.3, 254.8, 100.7], 0.6, len(levels))
    for apart in (False, True):
        sum_ = core.scene_log_prob(levels, mean, amount, apart=apart).exp().sum().item()
        assert sum_ == pytest.approx(1, abs=1e-7)
    for move in ([9, 0, 0], [0, -9, 0]):  # away from the edge of the range, the tail is missing
        move = torch.tensor(move)[:, None, None]
        assert core.scene_log_prob(levels + move, mean + move, amount).exp().sum() < 0.95


@pytest.mark.parametrize("mean", [[2.2, 1.0, 0.4], [100.2, 180.5, 97.9], [254.0, 253.1, 120.0]])
def test_mean_log_prob_is_the_entropy_of_draws(mean):
    n, amount = 200_000, 0.6
    noise = amount * (torch.randn(n, 1) + 0.25 * torch.randn(n, 3))  # as in _synthetic_batches
    drawn = (torch.tensor(mean) + noise).round().clamp(0, 255).long()
    levels, counts = drawn.unique(dim=0, return_counts=True)
    share = counts.double() / n
    entropy = -(share * share.log()).sum()

    def excess(**changes):
        """2 n (mean -log P - entropy of the frequencies), which is chi-squared with as many degrees as levels."""
        scene = dict(zip(("mean", "amount"), pixels(mean, amount, len(levels)), strict=True))
        log_prob = core.scene_log_prob(levels[..., None, None], **{**scene, **changes})
        return (2 * n * (-(share * log_prob).sum() - entropy)).item()

    degrees = len(levels) - 1
    assert abs(excess() - degrees) < 6 * math.sqrt(2 * degrees) + 20
    assert excess(apart=True) > 100 * degrees  # the colours' covariance, forgotten
    assert excess(amount=torch.full((len(levels),), 0.66)) > 10 * degrees
    assert excess(mean=torch.tensor(mean)[None, :, None, None].expand(len(levels), -1, 1, 1) + 0.1) > 10 * degrees


def test_colours_apart_have_the_variance_of_draws():
    n, amount, mean = 200_000, 0.6, 100.3
    drawn = (mean + amount * (torch.randn(n) + 0.25 * torch.randn(n))).round()
    levels, counts = drawn.unique(return_counts=True)
    share = counts.double() / n

    def excess(amount):
        levels_ = levels[:, None, None, None]
        log_prob = core.scene_log_prob(
            levels_, torch.full_like(levels_, mean), torch.full_like(levels, amount), apart=True
        )
        return (2 * n * (share * (share.log() - log_prob)).sum()).item()

    degrees = len(levels) - 1
    assert abs(excess(amount) - degrees) < 6 * math.sqrt(2 * degrees) + 10
    assert excess(amount / math.sqrt(17 / 16)) > 20 * degrees  # each colour's own part, forgotten


def test_log_prob_of_a_pixel_20_standard_deviations_off_is_the_normal_density():
    levels, (mean, amount) = torch.tensor([200.0, 201.0, 199.0]), pixels([20.0, 20.0, 20.0], 9.0, 1)
    covariance = 81 * (torch.ones(3, 3) + torch.eye(3) / 16)
    density = torch.distributions.MultivariateNormal(mean[0, :, 0, 0], covariance).log_prob(levels).item()
    got = core.scene_log_prob(levels[None, :, None, None], mean, amount).item()
    assert got == pytest.approx(density, abs=0.1) and density < -190
    assert core.scene_log_prob(levels[None, :, None, None], mean, amount * 1.01).item() > density + 1


def test_log_prob_does_not_depend_on_the_step_and_is_finite_far_off():
    scenes = synthetic_scenes(0, 6)
    levels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2)
    log_prob = core.scene_log_prob(levels, scenes.means, amounts(scenes))
    finer = core.scene_log_prob(levels, scenes.means, amounts(scenes), step=0.05)
    assert log_prob.dtype == torch.float64 and log_prob == pytest.approx(finer, abs=1e-7)
    coarse = core.scene_log_prob(levels, scenes.means, amounts(scenes), step=0.25)
    assert (coarse - finer).abs().max() > 1e-3
    far = core.scene_log_prob(levels, scenes.means + 300, amounts(scenes))
    assert far.isfinite().all() and (far < 10 * log_prob).all()


def test_log_normal_mass_in_both_tails():
    low = torch.tensor([-math.inf, -1.0, 5.0, 40.0, -41.0, 8.0], dtype=torch.float64)
    high = torch.tensor([0.0, 1.0, 6.0, 41.0, -40.0, math.inf], dtype=torch.float64)
    known = [0.5, math.erf(0.5**0.5), (math.erfc(5 / 2**0.5) - math.erfc(6 / 2**0.5)) / 2]
    got = core.log_normal_mass(low, high)
    assert got[:3].exp().tolist() == pytest.approx(known, rel=1e-12)
    assert got[3] == got[4] and -805 < got[3] < -800
    assert got[5].item() == pytest.approx(math.log(math.erfc(8 / 2**0.5) / 2), rel=1e-12)
    naive = (torch.special.ndtr(high) - torch.special.ndtr(low)).log()
    assert naive[3] == naive[4] == -math.inf


# ----------------------------------------------------------------------------------------------- tests/tools/floor.py


def test_scene_coordinates_give_back_the_scene():
    scenes, atlas = synthetic_scenes(0, 2), core.digit_atlas()
    for index in range(2):
        image = floor.Image(scenes, index, atlas)
        assert image.own.shape == (19,)
        assert -image.log_likelihood(image.own[None]).item() == pytest.approx(image.lower, abs=0.01)
        for coordinate in (0, 8, 15, 18):  # scale, a colour of the wall, light, noise: each is seen
            moved = image.own.clone()
            moved[coordinate] += 0.5
            assert -image.log_likelihood(moved[None]).item() > image.lower + 5


def test_log_weights_give_the_evidence_of_a_normal():
    """Where everything is normal, q is the posterior and every weight is the evidence."""
    image = floor.Image.__new__(floor.Image)
    data, std = torch.linspace(-1, 1, 19, dtype=torch.float64), 0.1
    image.log_likelihood = lambda xi: torch.distributions.Normal(xi, std).log_prob(data).sum(1)
    evidence = torch.distributions.Normal(0.0, math.sqrt(1 + std**2)).log_prob(data).sum().item()
    precision = torch.eye(19, dtype=torch.float64) * (1 + 1 / std**2)
    centre, noise = data / std**2 / (1 + 1 / std**2), torch.randn(4000, 19, dtype=torch.float64)
    assert (image.log_weights(centre, precision, 1.0, noise) - evidence).abs().max() < 1e-5
    wide = image.log_weights(centre, precision, 1.2, noise)
    assert core.iwae(wide[:, None]).item() == pytest.approx(evidence, abs=0.3)
    wrong = image.log_weights(centre, 4 * precision, 1.0, noise)  # half as wide: the weights are no longer equal
    assert wrong.std() > 1


def test_the_lower_bound_is_below_the_upper_one():
    result = floor.floor(4400, 8, 2, draws=4, pilot=2)
    assert 1.5 < result["scene_known"]["bpd"] < 2.5
    assert result["scene_known_colours_apart"]["bpd"] > result["scene_known"]["bpd"] + 0.5
    assert 0.004 < result["of_this_choices"]["bpd"] < 0.006 < result["scene_costs_at_most"]["bpd"] < 0.1
    # Without what q costs there is no bound: the mode alone is likelier than the own scene, and the cost negative.
    image = floor.Image(synthetic_scenes(4400, 4401), 0, core.digit_atlas())
    scored, precision = image.approximation()
    assert -image.log_likelihood(scored[None]).item() < image.lower
    assert -image.log_weights(scored, precision, 1.0, torch.zeros(1, 19)).item() > image.lower


def test_the_scenes_cost_in_core_is_the_measured_one():
    measured = json.loads((ROOT / "results/published/floor.json").read_text("utf-8"))
    for found in measured.values():
        cost = found["scene_costs_at_most"]
        assert found["scenes"] >= 90 and abs(cost["bpd"] - core.SCENE_COST_BPD) < 2 * cost["se"]
    assert measured["synthetic"]["scene_costs_at_most"]["bpd"] == pytest.approx(core.SCENE_COST_BPD, abs=5e-5)


def test_only_decoders_that_code_colours_apart_are_said_to_pay_for_it():
    floor = {"images": 9, "scene_known_bpd": 2.0, "scene_known_se_bpd": 0.1, "colours_apart_bpd": 2.9,
             "excess_bpd": 1.5, "excess_se_bpd": 0.2}  # fmt: skip
    apart, together = (core.floor_text(floor, colours_apart=apart) for apart in (True, False))
    assert "Of this, 0.90" in apart and "Of this" not in together and "at least 0.90 more" in together
    assert all("is 1.5000 ± 0.2000 above" in text and "| 3.5000 |" in text for text in (apart, together))
    assert core.floor_text(None, colours_apart=True) == ""


def test_no_published_bound_and_no_codec_is_below_the_floor():
    runs = [m for m in readme_table.published() if m["data"].get("name", "").startswith("synthetic")]
    checked = [m for m in runs if readme_table.floor(m)]
    assert len(checked) >= 4
    for metrics in checked:
        low, bound = readme_table.floor(metrics), metrics["final"]["test"]
        assert bound["neg_elbo_bpd"] > low + 4 * bound["neg_elbo_se_bpd"]
        assert min(metrics["test_codecs_bpd"].values()) > low + 0.2
        if "floor" in metrics:
            core.check_above(metrics["floor"]["excess_bpd"], metrics["floor"]["excess_se_bpd"])
    with pytest.raises(ValueError, match="a defect"):  # control: such a run would be found
        core.check_above(-0.5, 0.01)
