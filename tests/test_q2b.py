"""2b against 2a: differences and their words, a flow that is fitted to a frozen 2a, and known comparisons."""

import math

import pytest
import torch
from torch import nn

import core
import q2b
from conftest import Call, train
from core import FlowPrior, ImageVAE, StandardNormal


def test_paired_differences_are_after_minus_before_on_the_same_images():
    before, noise = 3000 + 500 * torch.randn(100).double(), torch.randn(100).double()
    found = q2b.paired(before, before - 3072 * math.log(2) * 0.25 + noise)
    assert found["bpd"] == pytest.approx(-0.25, abs=1e-3)
    assert found["se_bpd"] == pytest.approx(noise.std().item() / 10 / 3072 / math.log(2))  # images' own spread is gone


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


def test_a_comparison_of_models_that_differ_in_a_known_way():
    """2a's codes are N(m, I) whatever the image, and so is the flow, in 2b too: a better prior is all there is."""
    a, m = ImageVAE(2, StandardNormal), 0.5
    a.encoder = Call(lambda x: (x.new_full((len(x), 2, 8, 8), m), x.new_zeros(len(x), 2, 8, 8)))
    fitted = q2b.with_fitted_flow(a)
    nn.init.constant_(fitted.prior.net[-1].bias[:2], m)
    test = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    found = q2b.compare(a, fitted, fitted, test, core.evaluate(fitted, test))
    bits = 128 * m**2 / 2 / math.log(2)  # KL(N(m, I) || N(0, I)) of 2 x 8 x 8 numbers
    assert abs(found["prior_alone"]["bpd"] + bits / 3072) < 4 * found["prior_alone"]["se_bpd"] < 0.5 * bits / 3072
    assert found["kl"] == found["prior_alone"] and found["neg_elbo"] == pytest.approx(found["kl"])
    assert found["rest"]["bpd"] == found["recon"]["bpd"] == 0
    kl = found["kl_bits"]
    assert kl["2a"] == pytest.approx(bits, rel=0.1) and kl["2a_fitted_flow"] == kl["2b"] == pytest.approx(0, abs=1e-3)
    text = q2b.comparison_text(found | {"prior_alone_epochs": 1})
    assert all(q2b.change_of(what, found[k]) in text for what, k in (("−ELBO", "neg_elbo"), ("−ELBO", "rest")))


def test_2a_against_2a_with_another_name_shows_no_difference():
    models, test = [], torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    for prior in (StandardNormal, FlowPrior, FlowPrior):  # untrained, the flow is the identity
        torch.manual_seed(0)
        models.append(ImageVAE(2, prior))
    found = q2b.compare(*models, test, core.evaluate(models[2], test)) | {"prior_alone_epochs": 1}
    assert all(found[k] == {"bpd": 0, "se_bpd": 0} for k in ("neg_elbo", "kl", "recon", "prior_alone", "rest"))
    assert found["correlation"]["2b: z"] == found["correlation"]["2b: ε"] == found["correlation"]["2a: z"]
    assert "does not measurably change −ELBO" in q2b.comparison_text(found)
