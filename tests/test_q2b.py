"""2b against 2a: differences and their words, a flow that is fitted to a frozen 2a, and known comparisons."""

import pytest
import torch

import core
import q2b
from conftest import train
from core import ImageVAE, StandardNormal


@pytest.mark.parametrize("change, words", [
    (-0.3, "lowers it by 0.3000 ± 0.0100"), (0.3, "raises it by 0.3000 ± 0.0100"),
    (-0.019, "does not measurably change it (-0.0190 ± 0.0100)"), (0.019, "does not measurably change it (+0.0190"),
    (0.021, "raises it"), (-0.021, "lowers it"), (0.0, "does not measurably change it"),
])  # fmt: skip
def test_a_changes_words_follow_its_sign_and_two_standard_errors(change, words):
    assert q2b.change_of("it", {"bpd": change, "se_bpd": 0.01}).startswith(words)


def test_the_flow_that_is_fitted_to_2a_is_all_that_learns_and_2a_stays_as_it_is():
    a = ImageVAE(2, StandardNormal)
    before = {k: v.clone() for k, v in a.state_dict().items()}
    fitted, images = q2b.with_fitted_flow(a), torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    train(fitted, dict.fromkeys(core.SPLITS, images), epochs=1, batch_size=4, lr=0.01, muon_lr=0.01)
    after = fitted.state_dict()
    assert all(torch.equal(after[k], v) and torch.equal(a.state_dict()[k], v) for k, v in before.items())
    assert fitted.prior.net[-1].weight.abs().max() > 0  # the flow has learnt
    assert all(p.requires_grad for p in a.parameters()) and isinstance(a.prior, StandardNormal)
