"""Each known mistake, planted in a copy of the code, must make the tests fail. Some minutes; status 1 if one does not.

python tests/mutants.py            all of them
python tests/mutants.py "NaN"      those whose name holds these words
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = [  # what goes wrong, file, right, wrong
    ("sum over dimensions becomes a mean", "core.py", "x.flatten(1).sum(1)", "x.flatten(1).mean(1)"),
    ("log std not subtracted", "core.py", "** 2 - log_std - 0.5", "** 2 - 0.5"),
    ("log 2 pi counted twice", "core.py", "- 0.5 * math.log(2 * math.pi)", "- math.log(2 * math.pi)"),
    ("variance where std was meant", "core.py", "(x - mu) * torch.exp(-log_std)) ** 2", "(x - mu) * torch.exp(-2 * log_std)) ** 2"),
    ("prior N(0, e)", "core.py", "torch.zeros_like(eps), torch.zeros_like(eps))", "torch.zeros_like(eps), torch.ones_like(eps) / 2)"),
    ("plain tanh on log stds", "core.py", "LOG_STD_LOW, LOG_STD_HIGH = -7.0, 3.0", "LOG_STD_LOW, LOG_STD_HIGH = -1.0, 1.0"),
    ("bits without ln 2", "core.py", "nats / (num_dims * math.log(2))", "nats / num_dims"),
    ("IWAE that averages ELBOs", "core.py", "torch.logsumexp(log_w, 0) - math.log(len(log_w))", "log_w.mean(0)"),
    ("IWAE without log K", "core.py", "torch.logsumexp(log_w, 0) - math.log(len(log_w))", "torch.logsumexp(log_w, 0)"),
    ("no dequantisation noise", "core.py", "(levels + u) / PIXEL_SCALE", "levels / PIXEL_SCALE"),
    ("rounding in place of the bin", "core.py", ".floor().clamp(0, 255)", ".round().clamp(0, 255)"),
    ("no change of scale", "core.py", "log_p_x - num_dims * math.log(PIXEL_SCALE)", "log_p_x"),
    ("change of scale by 256", "core.py", "math.log(PIXEL_SCALE)", "math.log(256)"),
    ("KL with the wrong sign", "core.py", "log_std.detach()) - self.prior", "log_std.detach()) + self.prior"),
    ("score term left in the gradient", "core.py", "normal_log_prob(z, mu.detach(), log_std.detach())", "normal_log_prob(z, mu, log_std)"),
    ("one noise for every evaluation seed", "core.py", "torch.tensor(self.seed, device", "torch.tensor(0, device"),
    ("one noise for every call", "core.py", "self.calls += 1", "self.calls += 0"),
    ("noise by place in the batch", "core.py", "+ self.examples.to(torch.int64))", "+ torch.arange(self.batch))"),
    ("mean and scale from one slice", "core.py", "mu, raw = at_least_fp32(self.net(z)).chunk(2, 1)  # each (B, 3", "mu = raw = at_least_fp32(self.net(z)).chunk(2, 1)[0]  # each (B, 3"),
    ("shortcut gated, no residual", "core.py", "return x + a * torch.sigmoid(b)", "return torch.sigmoid(b) * x"),
    ("gate on the wrong half", "core.py", "return x + a * torch.sigmoid(b)", "return x + b * torch.sigmoid(a)"),
    ("four blocks", "core.py", "for _ in range(5)], nn.ReLU())", "for _ in range(4)], nn.ReLU())"),
    ("ReLU output as a latent mean", "core.py", "return mu, bounded_log_std(raw)\n\n\nclass ConvDecoder", "return mu.relu(), bounded_log_std(raw)\n\n\nclass ConvDecoder"),
    ("mask A sees the centre", "core.py", '+ (mask_type == "B")', "+ 1"),
    ("mask B does not", "core.py", '+ (mask_type == "B")', ""),
    ("mask reversed", "core.py", "mask[:centre] = 1", "mask[centre + 1 :] = 1"),
    ("mask forgotten", "core.py", "self.weight * self.mask", "self.weight"),
    ("weights overwritten by the mask", "core.py", "kernel = self.weight * self.mask", "kernel = self.weight.data.mul_(self.mask)"),
    ("first layer mask B", "core.py", 'MaskedConv2d("A", channels, width, 3)', 'MaskedConv2d("B", channels, width, 3)'),
    ("log-determinant dropped", "core.py", "torch.zeros_like(eps)) + log_det", "torch.zeros_like(eps))"),
    ("log-determinant with the wrong sign", "core.py", "torch.exp(-s), -sum_dims(s)", "torch.exp(-s), sum_dims(s)"),
    ("log-determinant summed over the batch", "core.py", "torch.exp(-s), -sum_dims(s)", "torch.exp(-s), -s.sum().expand(len(s))"),
    ("flow inverse scales by exp(-s)", "core.py", "t + torch.exp(bounded_log_std(raw)) * eps", "t + torch.exp(-bounded_log_std(raw)) * eps"),
    ("flow does not start as the identity", "core.py", "nn.init.zeros_(parameter)", "pass"),
    ("prior disturbs the networks", "core.py", "encoder, decoder = ConvEncoder", "make_prior((latent_channels, 8, 8))\n        encoder, decoder = ConvEncoder"),
    ("prior disturbs the batches", "core.py", "with torch.random.fork_rng(devices=[]):", "if True:"),
    ("last batch of an evaluation dropped", "core.py", "zip(*terms, strict=True)])", "zip(*(terms[:-1] or terms), strict=True)])"),
    ("best epoch chosen on train", "core.py", 'if bounds["valid"]["neg_elbo_bpd"] < at', 'if bounds["train"]["neg_elbo_bpd"] < at'),
    ("last epoch kept", "core.py", '    model.load_state_dict(at["best_state"])\n', ""),
    ("KL weight passes 1", "core.py", "return min(1.0, done / warmup)", "return (done / warmup)"),
    ("warm-up in the reported bound", "core.py", "return self.recon + self.kl", "return self.recon + 0.5 * self.kl"),
    ("test is the last tenth, not fifth", "core.py", "int(0.8 * len(x)) * 9 // 10, int(0.8 * len(x))", "int(0.8 * len(x)), int(0.9 * len(x))"),
    ("validation is the end of SVHN's file", "core.py", "np.split(train[order],", "np.split(train,"),
    ("pickles are opened", "core.py", "allow_pickle=False", "allow_pickle=True"),
    ("1A turned the other way", "q1a.py", "[[1, 1], [-1, 1]]", "[[1, -1], [1, 1]]"),
    ("arc without its weight", "q1b.py", "[1 / (3 * nodes)] * nodes", "[1 / nodes] * nodes"),
    ("wavefront slope too small", "core.py", "e // -d + 1 for layer", "e // -d for layer"),
    ("layers' earlier outputs forgotten", "core.py", "x[:, :, i, j] = F.relu(h[..., 0])", "x = torch.zeros_like(x); x[:, :, i, j] = F.relu(h[..., 0])"),
    ("differences that keep the level", "core.py", "/ self.mask.sum())", "/ self.mask.numel())"),
    ("information bound without log M", "core.py", "own - everyone + math.log(len(z))", "own - everyone"),
    ("free bits charged for", "core.py", "(total(kl) > free_bits * processes()[1])", "1"),
    ("logistic without its tails", "bonus.py", "torch.where((levels == 0) | (levels == num_levels - 1), edges, inside)", "inside"),
    ("logistic bins half as wide", "bonus.py", "torch.expm1(-step * sharpness)", "torch.expm1(-step * sharpness / 2)"),
    ("colours in the wrong order", "bonus.py", "torch.stack([torch.zeros_like(c0), c0 * r, c1 * r + c2 * g], 2)", "torch.stack([c0 * g, torch.zeros_like(c0), c1 * r + c2 * g], 2)"),
    ("sampled colours forget the colour before", "bonus.py", "g = draw(1, c[0] * (r - mu[0]))", "g = draw(1, torch.zeros_like(mu[1]))"),
    ("samples left continuous", "bonus.py", "return dequantise(quantise(x), torch.full_like(x, 0.5))", "return x"),
    ("component chosen without its noise", "bonus.py", "(logits - torch.log(-torch.log(u[:, :-3])))", "(logits)"),
    ("optimiser starts anew on --resume", "core.py", '        self.optimiser.load_state_dict(saved["optimiser"])\n', ""),
    ("random states start anew on --resume", "core.py", '        random_states(saved["random"])\n', ""),
    ("an epoch's order drawn anew on --resume", "core.py", 'if at["step"] == 0:', "if True:"),
    ("--resume with any arguments", "core.py", "        if differing:", "        if False:"),
    ("NaN gradients reach the weights", "core.py", 'vars(optimiser)["found_inf"] = bad', "pass"),
    ("checkpoints that run their code", "core.py", "weights_only=True", "weights_only=False"),
    ("npz files that run their code", "core.py", "allow_pickle=False", "allow_pickle=True"),
    ("pixel sees itself", "bonus.py", 'self.first = MaskedConv2d("A"', 'self.first = MaskedConv2d("B"'),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="?", default="")
    words, missed = parser.parse_args().words, 0
    mutants = [mutant for mutant in MUTANTS if words in mutant[0]]
    for what, file, right, wrong in mutants:
        with tempfile.TemporaryDirectory() as folder:
            for path in (*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "pyproject.toml"):
                shutil.copy(path, folder)
            shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
            source = (ROOT / file).read_text()
            if source.count(right) < 1:
                raise SystemExit(f"{what}: the code no longer holds {right!r}")
            (Path(folder) / file).write_text(source.replace(right, wrong))
            tests = [f"tests/test_{name}.py" for name in ("bonus", "core", "data", "bad_input", "numbers", "resume")]
            command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
            )
        failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        missed += done.returncode != 1
        print(f"{'caught' if done.returncode == 1 else 'MISSED'}  {what}: {failed[0] if failed else ''}", flush=True)
    print(f"{len(mutants) - missed} of {len(mutants)} mistakes caught")
    raise SystemExit(missed > 0)


if __name__ == "__main__":
    main()
