"""Each mistake, planted in a copy of the code, must make the tests fail. A good hour; status 1 if one does not.

python tests/tools/mutants.py                        those of the list below
python tests/tools/mutants.py flow                   those whose name holds this word
python tests/tools/mutants.py --check                plant all, run no tests: does each still fit the code?
python tests/tools/mutants.py --random 50 --seed 1   another operator, sign, number or comparison at random places of
                                                     functions that compute numbers
"""

import argparse
import ast
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = {  # by file, those first that most often notice
    "core.py": "estimators muon samples core training data floor q1 bonus", "q1a.py": "estimators q1",
    "q1b.py": "estimators q1", "q2a.py": "scripts", "q2b.py": "estimators training",
    "bonus.py": "bonus samples estimators muon core",
}  # fmt: skip
MUTANTS = [  # what goes wrong, file, right, wrong; and the tests to run, if not those above
    ("control: nothing, and no test fails", "core.py", "import argparse", "import argparse"),
    ("sum over dimensions becomes a mean", "core.py", "x.flatten(1).sum(1)", "x.flatten(1).mean(1)"),
    ("densities computed in bf16", "core.py", "return x.float() if x.dtype in", "return x if x.dtype in"),
    ("prior N(0, e)", "core.py", "normal_log_prob(eps, self.zeros, self.zeros)", "normal_log_prob(eps, self.zeros, self.zeros + 0.5)"),
    ("bits without ln 2", "core.py", "nats / (num_dims * math.log(2))", "nats / num_dims"),
    ("IWAE that averages ELBOs", "q1b.py", "torch.logsumexp(log_w, 0) - math.log(len(log_w))", "log_w.mean(0)"),
    ("no dequantisation noise", "core.py", "(levels + u) / PIXEL_SCALE", "levels / PIXEL_SCALE"),
    ("no change of scale", "core.py", "log_p_x - num_dims * math.log(PIXEL_SCALE)", "log_p_x"),
    ("KL with the wrong sign", "core.py", "log_std.detach()) - self.prior", "log_std.detach()) + self.prior"),
    ("score term left in the gradient", "core.py", "normal_log_prob(z, mu.detach(), log_std.detach())", "normal_log_prob(z, mu, log_std)"),
    ("decoder's noise twice as wide", "core.py", "        return mu + torch.exp(log_std) * noise(torch.randn, tuple(mu.shape), mu.device, generator), mu\n", "        return mu + 2 * torch.exp(log_std) * noise(torch.randn, tuple(mu.shape), mu.device, generator), mu\n"),
    ("samples of N(0, I) in place of the flow", "core.py", "self.decode(self.prior.sample(n, generator), generator)", "self.decode(noise(torch.randn, (n, *self.prior.latent_shape), self.prior.zeros.device, generator), generator)"),
    ("shortcut gated, no residual", "core.py", "return x + a * torch.sigmoid(b)", "return torch.sigmoid(b) * x"),
    ("ReLU output as a latent mean", "core.py", "return mu, bounded_log_std(raw)\n\n\nclass ConvDecoder", "return mu.relu(), bounded_log_std(raw)\n\n\nclass ConvDecoder"),
    ("mask reversed", "core.py", 'mask[: size * size // 2 + (mask_type == "B")] = 1', 'mask[-(size * size // 2 + (mask_type == "B")) :] = 1'),
    ("weights overwritten by the mask", "core.py", "self.weight * self.mask", "self.weight.data.mul_(self.mask)"),
    ("log-determinant dropped", "core.py", "normal_log_prob(eps, self.zeros, self.zeros) + log_det", "normal_log_prob(eps, self.zeros, self.zeros)"),
    ("flow inverse ends before it is exact", "core.py", "range(eps[0, 0].numel() + 1)", "range(eps[0, 0].numel() // 8)"),
    ("flow does not start as the identity", "core.py", "nn.init.zeros_(parameter)", "pass"),
    ("check of the prior sees nothing", "core.py", "torch.maximum(inverse, (prior.log_prob(z) - expected).abs().max()).item()", "0.0"),
    ("test is the last tenth, not fifth", "core.py", "before_test = int(0.8 * len(x))", "before_test = int(0.9 * len(x))"),
    ("validation is the end of SVHN's file", "core.py", "np.split(train[order],", "np.split(train,"),
    ("channels first taken for rows", "core.py", "x = x.transpose(0, 2, 3, 1)  #", "x = x.reshape(len(x), *x.shape[2:], 3)  #"),
    ("one noise for every evaluation batch", "core.py", 'fixed_noise("evaluation", seed, k)', 'fixed_noise("evaluation", seed, 0)'),
    ("last batch of an evaluation dropped", "core.py", "in zip(*terms, strict=True))", "in zip(*terms[: max(1, len(terms) - 1)], strict=True))"),
    ("Muon without momentum", "core.py", "momentum=momentum", "momentum=0.0"),
    ("Muon's momentum not the recipe's", "core.py", "Muon(hidden, muon_lr, momentum)", "Muon(hidden, muon_lr)"),
    ("KL weight of 1 throughout a long training", "core.py", '"kl_warmup": 1 - short', '"kl_warmup": 0.0', "scripts"),
    ("Muon's wide kernels taken for tall ones", "core.py", "matrix.flatten(1) if a <= b else matrix.flatten(0, -2).mT", "matrix.flatten(1)"),
    ("KL weight ignored in training", "core.py", "loss = model.loss(x, kl_weight, done)", "loss = model.loss(x, done=done)"),
    ("best weights chosen on test", "core.py", '*earlier, bound = curves["valid"]', '*earlier, bound = curves["test"]'),
    ("last weights kept", "core.py", "    model.load_state_dict(best)\n", ""),
    ("gradients of several processes not averaged", "core.py", "        dist.all_reduce(flat)\n", "", "resume"),
    ("optimiser starts anew on --resume", "core.py", "optimiser.load_state_dict(state)", "pass", "resume"),
    ("checkpoints that run their code", "core.py", "weights_only=True", "weights_only=False", "resume bad_input"),
    ("earlier results written over", "core.py", "elif earlier_run and not resume:", "elif False:", "resume"),
    ("interpolation ends before its end", "core.py", "torch.linspace(0, 1, 10,", "torch.linspace(0, 0.9, 10,"),
    ("1A turned the other way", "q1a.py", "[[1, 1], [-1, 1]]", "[[1, -1], [1, 1]]"),
    ("1A's true covariance of the other turn", "q1a.py", "TURN[data].T @ np.diag(STD**2) @ TURN[data]", "TURN[data] @ np.diag(STD**2) @ TURN[data].T"),
    ("1A's floor with the wrong sign", "q1a.py", "return -torch.distributions.MultivariateNormal", "return torch.distributions.MultivariateNormal"),
    ("1A's least KL of the other sign", "q1a.py", "math.log(long / short", "math.log(short / long"),
    ("1A's shuffled codes are the own ones", "q1a.py", 'model.log_p_x(x, z.roll(1, 0)), 2)', 'model.log_p_x(x, z), 2)'),
    ("1A's r^2 of the mean code", "q1a.py", "latent = z.index", "latent = mu.index"),
    ("distance from the floor not paired", "core.py", '"excess_se_bpd": standard_error(excess)', '"excess_se_bpd": standard_error(bits_per_dim(terms.neg_elbo, 2))'),
    ("1B's points with twice the noise", "q1b.py", "-np.sin(t)], 1) + STD * rand", "-np.sin(t)], 1) + 2 * STD * rand"),
    ("arc without its weight", "q1b.py", "[1 / (3 * nodes)] * nodes", "[1 / nodes] * nodes"),
    ("1B's short run uses z2 first", "q1b.py", '("net.0.weight")[:, 1] = 0', '("net.0.weight")[:, 0] = 0'),
    ("1B's second log std from the wrong row", "q1b.py", "rows = [0, 1] + [2] * num_log_stds", "rows = [0, 1] + [1] * num_log_stds"),
    ("weights p q in place of p / q", "q1b.py", "rows.append((log_p - log_q)", "rows.append((log_p + log_q)"),
    ("weights without the prior", "q1b.py", "model.log_p_x(x.repeat(1000, 1), z) + model.prior.log_prob(z)", "model.log_p_x(x.repeat(1000, 1), z)"),
    ("error of draws not divided by the points", "q1b.py", ".sqrt().item() / bits.shape[1]", ".sqrt().item()"),
    ("1B's models compared with the sign turned", "q1b.py", "neg_elbo - of_diagonal[0]", "of_diagonal[0] - neg_elbo"),
    ("1B's labels by their range of z2", "q1b.py", "codes[mine, 0]", "codes[mine, 1]"),
    ("IWAE of ten samples in place of a hundred", "q1b.py", "-iwae(log_w)", "-iwae(log_w[:10])"),
    ("single samples all of one noise", "core.py", 'fixed_noise("single samples", first)', 'fixed_noise("single samples", 0)', "scripts"),
    ("chance of a correlation without its root", "q2b.py", "math.sqrt(2 / math.pi / (7 * 8 * len(z_of_b)))", "2 / math.pi / (7 * 8 * len(z_of_b))"),
    ("2a evaluates weights that nobody trained", "q2a.py", "core.load_trained(model, args.evaluate)", 'core.read_checkpoint(args.evaluate)["curves"]'),
    ("2a of another start in a comparison", "q2b.py", "torch.manual_seed(args.seed)\n        model_a", "torch.manual_seed(args.seed + 1)\n        model_a", "scripts"),
    ("encoder not frozen", "q2b.py", "fitted.encoder.requires_grad_(False)", "pass"),
    ("correlation of a position with itself", "q2b.py", "(z[..., :-1], z[..., 1:])", "(z[..., :-1], z[..., :-1])"),
    ("paired difference with the sign turned", "q2b.py", "bits_per_dim(after - before, 3072)", "bits_per_dim(before - after, 3072)"),
    ("rest computed against 2a", "q2b.py", "paired(of_fitted.neg_elbo, of_b.neg_elbo)", "paired(of_a.neg_elbo, of_b.neg_elbo)"),
    ("verdict without errors", "q2b.py", 'abs(change["bpd"]) <= 2 * change["se_bpd"]', "False"),
    ("logistic without its tails", "bonus.py", "return torch.where(levels == 0, up_to_b, torch.where(levels == num_levels - 1, from_a, inside))", "return inside"),
    ("means and scales exchanged", "bonus.py", "mu, raw, coefficients = (t", "raw, mu, coefficients = (t"),
    ("average added to the scales", "bonus.py", "[torch.zeros_like(x[:, :1]), x, torch.zeros_like(x), torch", "[torch.zeros_like(x[:, :1]), torch.zeros_like(x), x, torch"),
    ("colours in the wrong order", "bonus.py", "torch.stack([torch.zeros_like(c0), c0 * r, c1 * r + c2 * g], 2)", "torch.stack([c0 * g, torch.zeros_like(c0), c1 * r + c2 * g], 2)"),
    ("component chosen without its noise", "bonus.py", "(logits - torch.log(-torch.log(u[:, :-3])))", "(logits)"),
    ("pixel sees itself", "bonus.py", "window = padded[:, :, i + t // (2 * n + 1), j + t % (2 * n + 1)]", "window = padded[:, :, i + (t + 1) // (2 * n + 1), j + (t + 1) % (2 * n + 1)]"),
    ("sampled without the code", "bonus.py", "net.at(x, features[:, :, i, j], i, j)", "net.at(x, 0 * features[:, :, i, j], i, j)"),
    ("wavefronts that overlap", "bonus.py", "slope or self.receptive_field + 1", "slope or self.receptive_field"),
    ("blind term in the bound", "bonus.py", "self.decoder(x, self.decoder.features(z)))", "self.decoder.rest(self.decoder.features(z)))"),
    ("blind term that does not fade", "bonus.py", "self.blind * (1 - done)", "self.blind"),
    ("the same noise for all draws", "bonus.py", "(1 if same else len(z),", "(1,"),
    ("a last batch of one keeps its code", "bonus.py", "another = z.roll(1, 0) if len(z) > 1 else before", "another = z.roll(1, 0)"),
    ("bonus's table judged without errors", "bonus.py", "kl[0] - kl[-1] > 2 * error", "True"),
    ("code used however little it saves", "bonus.py", "cost > 0.001 + 4 * error", "cost > 0"),
    ("the bonus's single samples all of one noise", "bonus.py", '"single pixels", first', '"single pixels", 0', "scripts"),
    ("a report with other digits than the published", "q2b.py", ":+.4f} ± {found[k]", ":+.3f} ± {found[k]", "readme"),
]  # fmt: skip
NO_NUMBERS = re.compile(  # functions and classes that draw, write, print or parse
    r"main|report|plot_|draw_[fc]|\w+_text|save_|write_|read_checkpoint|load_svhn|claim|describe|cpu_name|fail|launch"
    r"|pasted|number|\w*Parser|parse_args|differences|choose_machine|join_processes|progress_bar|refuse_"
)
OTHER = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.Lt: ast.Gt, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Eq: ast.NotEq}
OTHER |= {other: one for one, other in OTHER.items() if one not in (ast.LtE, ast.GtE)}
OTHER |= {ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.USub: ast.UAdd}


def functions(body):
    """Those functions and methods that compute numbers."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not NO_NUMBERS.match(node.name):
            yield from functions(node.body) if isinstance(node, ast.ClassDef) else [node]


def random_mistakes(tree):
    """Every possible one: the tree's node, the field of it that changes, and its new value."""
    for node in (node for function in functions(tree.body) for node in ast.walk(function)):
        if type(getattr(node, "op", None)) in OTHER:  # of a BinOp, a UnaryOp, an AugAssign
            yield node, "op", OTHER[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
            yield node, "ops", [OTHER[type(node.ops[0])](), *node.ops[1:]]
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield from ((node, "value", new) for new in (node.value + 1, 2 * node.value or -1))


def planted(file, tree, node, field, new):
    """A random mistake: what it is, its file, and the file's source with it."""
    line = (ROOT / file).read_text("utf-8").splitlines()[node.lineno - 1]
    before, old = ast.unparse(node), getattr(node, field)
    setattr(node, field, new)
    entry = f"{file}:{node.lineno}: {line.strip()}:  {before} -> {ast.unparse(node)}", file, ast.unparse(tree)
    setattr(node, field, old)
    return entry


def first_failure(file, source, names):
    """The first test that fails when the file's code is `source`; "" if none does."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "pyproject.toml"):
            shutil.copy(path, folder)
        for name, left_out in (("tests", "__pycache__"), ("results", "*.png")):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns(left_out))
        (Path(folder) / file).write_text(source, "utf-8")
        command = [sys.executable, "-m", "pytest", "-x", *(f"tests/test_{name}.py" for name in names.split())]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
        except subprocess.TimeoutExpired:
            return "no end in 20 minutes"
    failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "" if not done.returncode else failed[0] if failed else f"pytest ended with {done.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args, missed = parser.parse_args(), []
    sources = {file: (ROOT / file).read_text("utf-8") for file in TESTS}
    listed = [mutant for mutant in MUTANTS if args.word in mutant[0]]
    entries = [(what, f, sources[f].replace(old, new) * (old in sources[f]), *t) for what, f, old, new, *t in listed]
    if args.random:
        trees = {file: ast.parse(source) for file, source in sources.items()}
        places = [(file, tree, *change) for file, tree in trees.items() for change in random_mistakes(tree)]
        entries = [planted(*place) for place in random.Random(args.seed).sample(places, args.random)]
    for what, file, source, *tests in entries:
        ast.parse(source)
        failed = "" if args.check or not source else first_failure(file, source, *(tests or [TESTS[file]]))
        good = bool(source) and (args.check or bool(failed) == (source != sources[file]))
        missed += [] if good else [what]
        print("right" if good else "WRONG", what, failed, sep="  ", flush=True)
    print(f"{len(entries) - len(missed)} of {len(entries)} are right; not so:", *missed or ["none"], sep="\n")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
