"""Each known mistake, planted in a copy of the code, must make the tests fail. A good hour; status 1 if one does not.

python tests/tools/mutants.py            all of them
python tests/tools/mutants.py "NaN"      those whose name holds these words
python tests/tools/mutants.py --check    plant all, run no tests: does each still fit the code?

A mistake is found by its code, token by token: line breaks, spaces, comments and kinds of quotes do not matter.
"""

import argparse
import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = (("core", "bonus", "q1", "training", "data", "bad_input", "numbers"), ("resume", "everywhere"))  # in this order
OF_FILE = {"q2b.py": (("q2b",), ("scripts",))}  # tests in place of TESTS
OF_MISTAKE = {  # likewise
    "wavefronts on the CPU": (("fake_gpu",),), "taps on the CPU": (("fake_gpu",),),
    "Muon's identity on the CPU": (("fake_gpu",),),
    "gradients of several processes not averaged": (("processes",),),
    "a live run is not seen": (("everywhere",),), "earlier results written over": (("everywhere",),),
    "optimiser starts anew on --resume": (("resume",),), "an epoch begins anew on --resume": (("resume",),),
    "--resume with any arguments": (("resume",),), "failures after training swallowed": (("resume",),),
}  # fmt: skip
CONTROL = ("control: no mistake, and no test fails", "core.py", "import argparse", "import argparse")
MUTANTS = [  # what goes wrong, file, right, wrong
    ("a live run is not seen", "core.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    ("earlier results written over", "core.py", "if not resume and earlier_run:", "if resume and earlier_run:"),
    ("gradients of several processes not averaged", "core.py", "average_over_processes(gradients)", "pass"),
    ("a KL weight that stays at half", "core.py", "min(1.0, done / kl_warmup)", "min(0.5, done / kl_warmup)"),
    ("channels first taken for rows", "core.py", "x = x.transpose((0, 2, 3, 1) if channels[0] == 1 else (3, 0, 1, 2))", "x = x.reshape(-1, *x.shape[2:], 3)"),
    ("sum over dimensions becomes a mean", "core.py", "x.flatten(1).sum(1)", "x.flatten(1).mean(1)"),
    ("log std not subtracted", "core.py", "** 2 - log_std - 0.5", "** 2 - 0.5"),
    ("log 2 pi counted twice", "core.py", "- 0.5 * math.log(2 * math.pi)", "- math.log(2 * math.pi)"),
    ("variance where std was meant", "core.py", "(x - mu) * torch.exp(-log_std)) ** 2", "(x - mu) * torch.exp(-2 * log_std)) ** 2"),
    ("prior N(0, e)", "core.py", "normal_log_prob(eps, self.zeros, self.zeros)", "normal_log_prob(eps, self.zeros, self.zeros + 0.5)"),
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
    ("one noise for every evaluation seed", "core.py", 'fixed_noise("evaluation", seed, k)', 'fixed_noise("evaluation", 0, k)'),
    ("one noise for every batch", "core.py", 'fixed_noise("evaluation", seed, k)', 'fixed_noise("evaluation", seed, 0)'),
    ("evaluation on the global generator", "core.py", 'model(x[batches[k]], fixed_noise("evaluation", seed, k))', "model(x[batches[k]])"),
    ("one noise for every training step", "core.py", 'seed_of("step", seed, now.step)', 'seed_of("step", seed)'),
    ("one order for every epoch", "core.py", 'fixed_noise("order", seed, epoch)', 'fixed_noise("order", seed)'),
    ("mean and scale from one slice", "core.py", "mu, raw = at_least_fp32(self.net(z)).chunk(2, 1)", "mu = raw = at_least_fp32(self.net(z)).chunk(2, 1)[0]"),
    ("shortcut gated, no residual", "core.py", "return x + a * torch.sigmoid(b)", "return torch.sigmoid(b) * x"),
    ("gate on the wrong half", "core.py", "return x + a * torch.sigmoid(b)", "return x + b * torch.sigmoid(a)"),
    ("four blocks", "core.py", "for _ in range(5)], nn.ReLU())", "for _ in range(4)], nn.ReLU())"),
    ("ReLU output as a latent mean", "core.py", "return mu, bounded_log_std(raw) class ConvDecoder", "return mu.relu(), bounded_log_std(raw)\n\n\nclass ConvDecoder"),
    ("mask A sees the centre", "core.py", '+ (mask_type == "B")', "+ 1"),
    ("mask B does not", "core.py", '+ (mask_type == "B")', ""),
    ("mask reversed", "core.py", 'mask[: size * size // 2 + (mask_type == "B")] = 1', 'mask[-(size * size // 2 + (mask_type == "B")) :] = 1'),
    ("mask forgotten", "core.py", "self.weight * self.mask", "self.weight"),
    ("weights overwritten by the mask", "core.py", "return self.weight * self.mask", "return self.weight.data.mul_(self.mask)"),
    ("first layer mask B", "core.py", 'MaskedConv2d("A", channels, width, 3)', 'MaskedConv2d("B", channels, width, 3)'),
    ("log-determinant dropped", "core.py", "normal_log_prob(eps, self.zeros, self.zeros) + log_det", "normal_log_prob(eps, self.zeros, self.zeros)"),
    ("log-determinant with the wrong sign", "core.py", "torch.exp(-s), -sum_dims(s)", "torch.exp(-s), sum_dims(s)"),
    ("log-determinant summed over the batch", "core.py", "torch.exp(-s), -sum_dims(s)", "torch.exp(-s), -s.sum().expand(len(s))"),
    ("flow inverse scales by exp(-s)", "core.py", "t + torch.exp(bounded_log_std(raw)) * eps64", "t + torch.exp(-bounded_log_std(raw)) * eps64"),
    ("flow does not start as the identity", "core.py", "nn.init.zeros_(parameter)", "pass"),
    ("prior disturbs the networks", "core.py", "encoder, decoder = ConvEncoder", "prior((latent_channels, 8, 8))\n        encoder, decoder = ConvEncoder"),
    ("last batch of an evaluation dropped", "core.py", "range(rank, len(batches), world)", "range(rank, max(1, len(batches) - 1), world)"),
    ("best look chosen on test", "core.py", 'if bounds["valid"]["neg_elbo_bpd"] < now.best_bound', 'if bounds["test"]["neg_elbo_bpd"] < min([math.inf, *now.curves["test"]["neg_elbo_bpd"][:-1]])'),
    ("last weights kept", "core.py", "model.load_state_dict(now.best_weights)", "pass"),
    ("KL weight ignored in training", "core.py", "loss = model.loss(x, kl_weight, done)", "loss = model.loss(x)"),
    ("looks not spread over training", "core.py", "round(steps * (k / 20) ** 2)", "round(steps * (k / 20))"),
    ("warm-up in the reported bound", "core.py", "return self.recon + self.kl", "return self.recon + 0.5 * self.kl"),
    ("test is the last tenth, not fifth", "core.py", "before_test = int(0.8 * len(x))", "before_test = int(0.9 * len(x))"),
    ("validation is the end of SVHN's file", "core.py", "np.split(train[order],", "np.split(train,"),
    ("pickles are opened", "core.py", "allow_pickle=False", "allow_pickle=True"),
    ("1A turned the other way", "q1a.py", "[[1, 1], [-1, 1]]", "[[1, -1], [1, 1]]"),
    ("arc without its weight", "q1b.py", "[1 / (3 * nodes)] * nodes", "[1 / nodes] * nodes"),
    ("wavefront slope too small", "core.py", "return 1 + max(", "return max("),
    ("layers' earlier outputs forgotten", "core.py", "x[:, :, i, j] = F.relu(h[..., 0])", "x = torch.zeros_like(x); x[:, :, i, j] = F.relu(h[..., 0])"),
    ("differences that keep the level", "bonus.py", "/ self.mask.sum())", "/ self.mask.numel())"),
    ("information bound without log M", "q1a.py", "own - everyone + math.log(len(z))", "own - everyone"),
    ("free bits charged for", "bonus.py", "kl = kl * (sum_over_processes(kl) / rank_and_world()[1] > self.free_bits)", "pass"),
    ("blind term in the bound", "bonus.py", "return mixture_log_prob(quantise(x), self.decoder(x, self.decoder.features(z)))", "return mixture_log_prob(quantise(x), self.decoder.rest(self.decoder.features(z)))"),
    ("logistic without its tails", "bonus.py", "return torch.where(levels == 0, up_to_b, torch.where(levels == num_levels - 1, from_a, inside))", "return inside"),
    ("logistic bins half as wide", "bonus.py", "torch.expm1(-step * sharpness)", "torch.expm1(-step * sharpness / 2)"),
    ("colours in the wrong order", "bonus.py", "torch.stack([torch.zeros_like(c0), c0 * r, c1 * r + c2 * g], 2)", "torch.stack([c0 * g, torch.zeros_like(c0), c1 * r + c2 * g], 2)"),
    ("sampled colours forget the colour before", "bonus.py", "g = colour(1, c[0] * (r - mu[0]))", "g = colour(1, torch.zeros_like(mu[1]))"),
    ("samples left continuous", "bonus.py", "return bin_centres(quantise(x)).to(x.dtype)", "return x"),
    ("component chosen without its noise", "bonus.py", "(logits - torch.log(-torch.log(u[:, :-3])))", "(logits)"),
    ("optimiser starts anew on --resume", "core.py", "optimiser.load_state_dict(saved_state)", "pass"),
    ("an epoch begins anew on --resume", "core.py", "return Progress(**state)", "return Progress(**{**state, 'step': 0})"),
    ("--resume with any arguments", "core.py", "if differing := differences(saved['must_match'], must_match):", "if False:"),
    ("NaN gradients reach the weights", "core.py", "gradient.masked_fill_(~finite, 0)", "pass"),
    ("checkpoints that run their code", "core.py", "weights_only=True", "weights_only=False"),
    ("npz files that run their code", "core.py", "allow_pickle=False", "allow_pickle=True"),
    ("pixel sees itself", "bonus.py", 'self.first = DifferenceConv2d("A"', 'self.first = DifferenceConv2d("B"'),
    ("bonus's table judged without errors", "bonus.py", "kl[0] - kl[-1] > 2 * error", "True"),
    ("code used however little it saves", "bonus.py", "cost > 0.001 + 4 * error", "cost > 0"),
    ("seed not mixed into steps", "core.py", 'seed_of("step", seed, now.step)', 'seed_of("step", now.step)'),
    ("Muon without orthogonalisation", "core.py", "orthogonalise(wide)", "wide"),
    ("Muon takes all weights", "core.py", "min(p.shape[:2]) >= 16", "True"),
    ("schedule ignored", "core.py", "peak * SCHEDULES[schedule](done)", "peak"),
    ("paired difference with the sign turned", "q2b.py", "bits_per_dim(after - before, 3072)", "bits_per_dim(before - after, 3072)"),
    ("encoder not frozen", "q2b.py", "fitted.encoder.requires_grad_(False)", "pass"),
    ("decoder not frozen", "q2b.py", "fitted.decoder.requires_grad_(False)", "pass"),
    ("flow fitted to 2a itself", "q2b.py", "fitted = copy.deepcopy(a)", "fitted = a"),
    ("rest computed against 2a", "q2b.py", "paired(of_fitted.neg_elbo, of_b.neg_elbo)", "paired(of_a.neg_elbo, of_b.neg_elbo)"),
    ("prior alone computed on 2b", "q2b.py", "paired(of_a.kl, of_fitted.kl)", "paired(of_a.kl, of_b.kl)"),
    ("2a of other arguments accepted", "q2b.py", "if differing := differences(theirs, ours):", "if False:"),
    ("2a of other epochs accepted", "q2b.py", "{'--epochs': args.epochs}", "{'--epochs': saved['args']['epochs']}"),
    ("verdict without errors", "q2b.py", 'abs(change["bpd"]) <= 2 * change["se_bpd"]', "False"),
    ("correlation of a position with itself", "q2b.py", "(z[..., :-1], z[..., 1:])", "(z[..., :-1], z[..., :-1])"),
    ("failures after training swallowed", "core.py", "if failed and last: fail(", "if False:\n        fail("),
    ("taps on the CPU", "core.py", "torch.arange(size * size // 2 + 1, device=x.device)", "torch.arange(size * size // 2 + 1)"),
    ("Muon's identity on the CPU", "core.py", "torch.eye(x.shape[1], dtype=x.dtype, device=x.device)", "torch.eye(x.shape[1], dtype=x.dtype)"),
    ("wavefronts on the CPU", "core.py", "torch.tensor(groups[k], device=device)", "torch.tensor(groups[k], device='cpu')"),
]  # fmt: skip
TOKEN = re.compile(r'"""(?:[^\\]|\\.)*?"""|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|#[^\n]*|\w+|\s+|.', re.S)


@functools.cache
def tokens(code):
    """Of each token: its text, with one kind of quotes, where it begins and where it ends; no spaces, no comments."""
    found = []
    for match in TOKEN.finditer(code):
        text = match.group()
        if not text.isspace() and not text.startswith("#"):
            quoted = text[0] == "'" and '"' not in text
            found.append((f'"{text[1:-1]}"' if quoted else text, match.start(), match.end()))
    closed = {")", "]", "}"}
    pairs = zip(found, [*found[1:], ("", 0, 0)], strict=True)
    return [
        token for token, after in pairs if not (token[0] == "," and after[0] in closed)
    ]  # a trailing comma is layout


def plant(source, right, wrong):
    """The source with `wrong` at every place of `right`; None if there is none."""
    ours, wanted = tokens(source), [text for text, _, _ in tokens(right)]
    texts = [text for text, _, _ in ours]
    places = [k for k in range(len(ours)) if texts[k : k + len(wanted)] == wanted]
    for k in reversed(places):
        source = source[: ours[k][1]] + wrong + source[ours[k + len(wanted) - 1][2] :]
    return source if places else None


def first_failure(file, source, groups):
    """The first test that fails when the file's code is `source`; "" if none does. groups: of tests, until one fails."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "pyproject.toml"):
            shutil.copy(path, folder)
        for name, left_out in (("tests", "__pycache__"), ("results", "*.png")):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns(left_out))
        (Path(folder) / file).write_text(source, "utf-8")
        for names in groups:
            tests = [f"tests/test_{name}.py" for name in names]
            command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
            environment = {**os.environ, "PYTHONPATH": ""}
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
            failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            if done.returncode:
                return failed[0] if done.returncode == 1 and failed else f"pytest ended with {done.returncode}"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="?", default="")
    parser.add_argument("--check", action="store_true")
    args, begin, missed = parser.parse_args(), time.monotonic(), []
    mutants = [mutant for mutant in MUTANTS if args.words in mutant[0]]
    for what, file, right, wrong in [*mutants, CONTROL]:
        source = plant((ROOT / file).read_text("utf-8"), right, wrong)
        if source is None:
            print(f"{file} no longer holds {right!r}: {what}")
            missed.append(what)
            continue
        ast.parse(source)
        if not args.check:
            failed = first_failure(file, source, OF_MISTAKE.get(what) or OF_FILE.get(file, TESTS))
            if bool(failed) == (what == CONTROL[0]):
                missed.append(what)
            minutes = (time.monotonic() - begin) / 60
            print(f"{minutes:5.1f} min  {'MISSED' if what in missed else 'right'}  {what}: {failed}", flush=True)
    of_mutants = len(mutants) - len(set(missed) - {CONTROL[0]})
    print(f"{of_mutants} of {len(mutants)} mistakes {'can be planted' if args.check else 'are caught'}")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
