"""2b against 2a: which 2a it takes, 2a with a flow, paired differences, correlations, and the verdict."""

import argparse
import math

import pytest
import torch

import core
import q2b
from conftest import image_args, noise_file, refused, results


def test_2b_takes_2as_model_of_the_same_arguments_only(smoke, capsys):
    path = smoke[0] / "q2a" / "checkpoint.pt"
    args = image_args("q2b", "--precision", results(smoke[0], "q2a")["args"]["precision"])
    splits = core.load_images(args).splits
    q2b.make_2a(args, splits, path)  # control: is not refused
    capsys.readouterr()
    others = {k: x.flip(0) for k, x in splits.items()}
    for changes, data, culprit in (({"lr": 0.5}, splits, "--lr"), ({"seed": 3}, splits, "--seed"),
                                   ({"batch_size": 8}, splits, "--batch-size"), ({}, others, "the data"),
                                   ({"epochs": 5}, splits, "--epochs"), ({"latents": 2}, splits, "--latents"),
                                   ({"epochs": 5, "resume": True}, splits, "--epochs"),
                                   ):  # fmt: skip
        changed = argparse.Namespace(**{**vars(args), **changes})  # refused before anything is trained
        refused(capsys, lambda changed=changed, data=data: q2b.make_2a(changed, data, path), culprit)


def test_the_flow_that_is_fitted_to_2as_codes_changes_neither_encoder_nor_decoder(smoke, tmp_path):
    args = argparse.Namespace(**{**results(smoke[0], "q2a")["args"], "resume": False, "lr": 0.01})
    splits = core.load_images(image_args("q2a")).splits
    a = core.ImageVAE(args.latents, core.StandardNormal)
    before = {k: v.clone() for k, v in a.state_dict().items()}
    fitted = q2b.fit_flow_to_frozen_2a(a, args, splits, 1, tmp_path / "flow.pt")
    after = fitted.state_dict()
    assert all(torch.equal(after[k], v) and torch.equal(a.state_dict()[k], v) for k, v in before.items())
    assert fitted.prior.net[-1].weight.abs().max() > 0  # the flow has learnt
    assert all(p.requires_grad for p in a.parameters()) and isinstance(a.prior, core.StandardNormal)


def test_a_comparison_that_fails_costs_only_itself_and_each_2a_has_a_flow_of_its_own(tmp_path, monkeypatch, undrawn):
    flags = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--data", noise_file(tmp_path), "--compare"]
    paths, folder = [], tmp_path / "smoke"

    def diverges(a, args, splits, epochs, path):
        paths.append(path)
        core.fail("training diverged by step 3", status=1)

    monkeypatch.setattr(q2b, "fit_flow_to_frozen_2a", diverges)
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as stop:
            q2b.main([*flags, *more])
        assert stop.value.code == 1
        assert results(folder, "q2b")["failed"] == {"the comparison with 2a": "training diverged by step 3"}
        assert "**Missing: the comparison with 2a.**" in (folder / "q2b" / "report.md").read_text("utf-8")
        other = torch.load(folder / "q2a" / "checkpoint.pt", weights_only=True)
        next(iter(other["progress"]["best_weights"].values())).mul_(2)  # as if from another training of 2a
        torch.save(other, folder / "q2a" / "checkpoint.pt")
    assert paths[0] != paths[1]


def test_paired_differences_are_after_minus_before_on_the_same_images():
    before, noise = 3000 + 500 * torch.randn(100).double(), torch.randn(100).double()
    found = q2b.paired(before, before - 3072 * math.log(2) * 0.25 + noise)
    assert found["bpd"] == pytest.approx(-0.25, abs=1e-3)
    assert found["se_bpd"] == pytest.approx(noise.std().item() / 10 / 3072 / math.log(2))  # images' own spread is gone


def test_neighbours_correlation_is_of_neighbours():
    z = torch.randn(4000, 2, 8, 8)
    z[..., 1:, :] = 0.8 * z[..., :-1, :] + 0.6 * z[..., 1:, :]  # each row from the unchanged one above
    found = q2b.neighbour_correlation(z + torch.tensor([5.0, -3.0])[:, None, None])
    assert found["right"] < 0.02 and found["below"] > 0.3
    by_chance = math.sqrt(2 / math.pi / (56 * 4000))
    assert q2b.neighbour_correlation(torch.randn(4000, 16, 8, 8))["right"] == pytest.approx(by_chance, rel=0.6)


def test_verdict_of_2b_follows_the_measurements():
    def said(total, alone, kl=-0.1):
        changes = {"neg_elbo": total, "prior_alone": alone, "rest": total - alone, "kl": kl, "recon": total - kl}
        return " ".join(q2b.verdict({k: {"bpd": v, "se_bpd": 0.01} for k, v in changes.items()}).split())

    assert "lowers −ELBO" in said(-0.3, -0.1) and "The rest, -0.2000" in said(-0.3, -0.1)
    assert "raises −ELBO" in said(0.3, 0.0) and "The rest" not in said(0.3, 0.0)
    assert "does not measurably change −ELBO" in said(-0.01, 0.0) and "The rest" not in said(-0.01, 0.0)
    assert "does not measurably change the KL:" in said(-0.3, 0.0) and "lowers the KL:" in said(-0.3, -0.1)
    assert "saves at least 0.1000" in said(-0.3, -0.1) and "saves" not in said(-0.3, 0.1)
    assert "It lowers the KL term (-0.1000 ± 0.0100) and lowers the decoder term (-0.2000 ± 0.0100)" in said(-0.3, 0)
    most = "Most of the gain is in the decoder term"
    assert most in said(-0.3, -0.1, 0.05) and most in said(-0.3, -0.1, -0.05) and most not in said(-0.3, -0.1, -0.2)


def test_without_training_or_with_a_deaf_encoder_2b_claims_no_difference():
    """Untrained, both models are the same. A deaf encoder: z tells nothing, and both priors are as good."""
    test = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    for deaf in (False, True):
        models = []
        for prior in (core.StandardNormal, core.FlowPrior, core.FlowPrior):
            torch.manual_seed(0)
            models.append(core.ImageVAE(4, prior).eval())
            if deaf:
                for parameter in models[-1].encoder.net[-1].parameters():
                    torch.nn.init.zeros_(parameter)
        found = q2b.compare(*models, test, core.evaluate(models[-1], test)) | {"prior_alone_epochs": 1}
        assert "does not measurably change −ELBO" in q2b.verdict(found)
        assert "does not remove" in " ".join(q2b.comparison_text(found).split())
        if deaf:
            assert list(found["kl_bits"].values()) == pytest.approx([0] * 3, abs=1e-9)
