"""Bounds stay finite and in order whatever the images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bonus
import core
from conftest import train

MODELS = {
    "2a": lambda: core.ImageVAE(2, core.StandardNormal), "2b": lambda: core.ImageVAE(2, core.FlowPrior),
    "bonus": lambda: bonus.LossyVAE(2, 2, "flow"),
}  # fmt: skip
made = {}


def model_of(name):
    """An untrained model whose flow is not the identity, made once."""
    if name not in made:
        torch.manual_seed(0)
        model = MODELS[name]()
        if name != "2a":
            torch.nn.init.normal_(model.prior.net[-1].weight, std=0.02)
        made[name] = model.eval()
    return made[name]


def random_images(generator, n):
    """Images of different contrast, from constant to uniform noise."""
    contrast = torch.rand(n, 1, 1, 1, generator=generator)
    centre = 256 * torch.rand(n, 3, 1, 1, generator=generator)
    x = centre + 256 * contrast * (torch.rand(n, 3, 32, 32, generator=generator) - 0.5)
    return x.floor().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(0, 1000))
def test_bounds_are_finite_ordered_and_the_same_each_time(name, seed, n, noise_seed):
    generator = torch.Generator().manual_seed(seed)
    model, x = model_of(name), random_images(generator, n)
    terms = core.evaluate(model, x, seed=noise_seed)
    assert all(t.isfinite().all() and t.shape == (n,) for t in terms)
    torch.manual_seed(seed % 1000)  # not the global generator's noise
    assert torch.equal(core.evaluate(model, x, seed=noise_seed).neg_elbo, terms.neg_elbo)
    log_w = torch.stack([-core.evaluate(model, x, seed=noise_seed + k).neg_elbo for k in range(3)])
    assert (log_w.mean(0) <= core.iwae(log_w) + 1e-9).all()  # of the same samples: Jensen, for every image
    assert not torch.equal(log_w[0], log_w[1])


POISON = {
    "all 0": lambda n: torch.zeros(n, 3, 32, 32, dtype=torch.uint8),
    "all 255": lambda n: torch.full((n, 3, 32, 32), 255, dtype=torch.uint8),
    "constant": lambda n: torch.randint(0, 256, (n, 3, 1, 1), dtype=torch.uint8).expand(n, 3, 32, 32).contiguous(),
    "one image": lambda n: torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(n, 1, 1, 1),
    "a poisoned batch": lambda n: torch.cat(
        [torch.randint(0, 256, (n // 2, 3, 32, 32)), 255 * torch.randint(0, 2, (n - n // 2, 3, 32, 32))]
    ).to(torch.uint8),
}


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", ["2b", "bonus"])  # 2a's networks and loss are 2b's
def test_training_and_evaluation_survive_strange_images(name, poison):
    torch.manual_seed(0)
    splits = {k: POISON[poison](n) for k, n in (("train", 16), ("valid", 4), ("test", 4))}
    model = MODELS[name]()
    precision = core.choose_precision("auto", "cpu")
    curves = train(
        model, splits, epochs=1, batch_size=8, lr=1e-3, muon_lr=0.02, schedule="trapezoid", precision=precision
    )
    assert curves["skipped_steps"] == 0 and torch.tensor(curves["test"]["neg_elbo_bpd"]).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
