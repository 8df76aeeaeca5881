"""What the README says: its commands run, its tables and numbers are those of the published runs, its files exist."""

import importlib
import re
import shutil
from functools import partial

import numpy as np
import pytest

import q1b
from conftest import ROOT, SCRIPTS, noise_file
from tools import codec, mutants, publish

README, OF_RESULTS = ((ROOT / name).read_text("utf-8") for name in ("README.md", "results/README.md"))


def commands():
    """(script, flags) of the commands in README and at the head of each script, without what --smoke sets anyway."""
    found = re.findall(r"(q\w+|bonus)\.py((?: +-[^`;\n&|]*|))[`;\n&]", README)
    for script in SCRIPTS:
        found += re.findall(r"python (\w+)\.py([^\n]*?)(?: +->|\n)", importlib.import_module(script).__doc__)
    preset = r"--(epochs|table-epochs|limit|batch-size|out) \S+|--data synthetic|--smoke"
    found = {(script, " ".join(re.sub(preset, "", flags).split())) for script, flags in found}
    return {(script, flags) for script, flags in found if flags and flags != "--compare"}  # `smoke` runs the others


@pytest.mark.parametrize(("script", "flags"), sorted(commands()))
def test_every_command_runs_at_smoke_size(script, flags, smoke, tmp_path, monkeypatch, undrawn):
    """`results` are those of the smoke runs. A file of noise stands for FILE.npz, and for FOLDER (see test_data.py)."""
    monkeypatch.setattr(q1b, "DRAWS_PER_POINT", 2000)
    flags = flags.replace("100", "2").replace("results/", f"{smoke[0]}/")
    flags = flags.replace("FOLDER", "FILE.npz").replace("FILE.npz", noise_file(tmp_path))
    importlib.import_module(script).main(f"{flags} --smoke --device cpu --epochs 1 --out {tmp_path}".split())
    assert len(list(tmp_path.glob("**/report.md"))) == 1


def test_the_codec_runs_as_the_readme_says(smoke, tmp_path, capsys):
    pytest.importorskip("constriction")
    folder, flags = re.search(r"tests/tools/codec\.py results/(\S+) ([^`]*)`", README).groups()
    checkpoint = shutil.copy(smoke[0] / folder, tmp_path)
    codec.main([checkpoint, *flags.split(), "--images", "2", "--limit", "80"])
    assert "decoded exactly" in capsys.readouterr().out and (tmp_path / "codec.json").exists()


@pytest.mark.parametrize("path", sorted(publish.PUBLISHED.glob("*/report.md")), ids=lambda path: path.parent.name)
def test_published_reports_are_what_todays_code_makes_of_the_published_metrics(path):
    assert path.read_text("utf-8") == publish.report_of(path.parent)


def test_of_data_that_are_not_ours_nothing_is_published_that_shows_them(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "PUBLISHED", tmp_path)
    safe = {"metrics.json", "curves.png", "samples.png", "experiments.png", "samples_2a_2b.png"}
    for images in (False, True):  # with a control
        for script in ("q2a", "q2b", "bonus"):
            publish.publish(smoke[0] / script, images)
            (folder,) = tmp_path.glob(f"{script}_*")
            found = {path.name for path in folder.iterdir()}
            assert (found <= safe) != images and found >= {"metrics.json", "curves.png", "samples.png"}
            assert str(tmp_path.parent) not in (folder / "metrics.json").read_text("utf-8")


@pytest.mark.parametrize(("name", "short"), publish.TABLES.items())
def test_tables_are_those_of_the_published_runs(name, short):
    assert publish.cut_out((ROOT / name).read_text("utf-8"), short)[1] == publish.table(short)


def of(folders, keys, how=list):
    """What lies under the keys in the metrics of published runs, in the order of their folders, without signs."""
    found = [publish.read(path) for path in sorted(publish.PUBLISHED.glob(f"{folders}/metrics.json"))]
    for key in keys.split("/"):
        found = [metrics[int(key) if key.isdigit() else key] for metrics in found]
    return how(np.abs(found))


ends = partial(np.quantile, q=(0, 1))
FULL, BOUND, NO_CODE, COST = "q2b_synthetic", "final/test/neg_elbo_bpd", "no_code/above_bpd", "another_code_costs_bpd"
GAIN, PRIOR, KL = "against_2a/neg_elbo/bpd", "against_2a/prior_alone/bpd", "final/test/kl_bpd"
SHORT, FOUR, EARLIER = "q2b_synthetic_4000*", "q2b_synthetic_4_epochs", "q2b_synthetic_earlier_recipe"


def lead(bound):  # of the diagonal decoder of 1B over the isotropic one, on the first 100 test points, by seed
    return np.subtract(*(of("q1b*", f"final/{name}/first100/{bound}_bpd") for name in ("isotropic", "diagonal")))


ISOTROPIC = np.array(of("q1b*", "final/isotropic/test/neg_elbo_bpd"))
ARC_IN_THE_MIDDLE = np.max(of("q1b*", "final/isotropic/of_labels/2/z1"), 1) < 1
MODELS = ("data1_diagonal", "data1_isotropic", "data2_diagonal", "data2_isotropic")
PROSE = {  # words of README and of results/README, and the numbers in them
    "code (KL {:.2f} bits/dim,": of("q1a*", "final/data1_diagonal/kl_bpd", np.mean),
    "axis into z ({:.2f} to {:.2f}). All": ends([of("q1a*", f"final/{model}/kl_bpd", np.mean) for model in MODELS[1:]]),
    "on {} of 20 seeds. On": sum(of("q1b*", "final/diagonal/test/neg_elbo_bpd") < ISOTROPIC),
    "end within {:.3f} bits/dim of": max(of("q1a*", f"final/{model}/excess_bpd", np.max) for model in MODELS),
    "bound, only {:.4f}, within": np.median(lead("neg_iwae100")),
    "8 and 10 ended badly (isotropic: {:.3f} and {:.3f})": np.sort(ISOTROPIC)[-2:],
    "On {} of 20 seeds the arc": ARC_IN_THE_MIDDLE.sum(), "isotropic median is {:.4f}": np.median(ISOTROPIC),
    "ends higher: {:.4f}, {:.4f} and {:.4f}": np.sort(ISOTROPIC[~ARC_IN_THE_MIDDLE]),
    "others at {:.4f} to {:.4f}, but for seed 10 at {:.4f},": np.sort(ISOTROPIC[ARC_IN_THE_MIDDLE])[[0, -2, -1]],
    "its lead is {:.3f}": np.median(lead("neg_elbo")), "each seed (median lead {:.4f})": np.median(lead("neg_elbo")),
    "{} of 20 (median lead .0005)": (lead("neg_iwae100") > 0).sum(),
    "z₂ ({:.2f} bits per point, the": np.median(of("q1b*", "final/isotropic/kl_per_latent_bits/1")),
    "lowers −ELBO by {:.3f} bits/dim on 65,931": of(FULL, GAIN), "by {:.3f} to {:.3f} on 4,000": of(SHORT, GAIN, ends),
    "2a brings {:.3f} of the .365": of(FULL, PRIOR), "4,000 images {:.3f} to {:.3f}. That": of(SHORT, PRIOR, ends),
    "it is {:.3f} of .353": of(FOUR, PRIOR), ".244 of {:.3f}, but": of(FOUR, GAIN),
    "but {:.3f} of .246": of(EARLIER, PRIOR), ".099 of {:.3f} without": of(EARLIER, GAIN),
    "image costs {:.2f} to {:.2f} bits/dim more": of("bonus*", COST, ends),
    "by {:.4f} after": of("bonus_synthetic_1*", NO_CODE), "{:.3f} of the 2.367": of("bonus_synthetic", KL),
    "by {:.3f} to {:.3f} on 4,000 and on": ends(of("bonus_synthetic_4*", NO_CODE) + of("bonus_svhn*", NO_CODE)),
    "It ends near {:.1f} bits/dim on test": of(SHORT, BOUND, np.mean),
    "2a {:.2f} to {:.2f}, 2b": of("q2a_svhn*", BOUND, ends), "2b {:.2f} to {:.2f}, bonus": of("q2b_svhn*", BOUND, ends),
    "bonus {:.2f} to {:.2f} (JPEG XL": of("bonus_svhn*", BOUND, ends), "the {:.3f} bits": of("bonus_synthetic", BOUND),
    "2b ends at {:.3f} bits/dim, without": of(FOUR, BOUND), "without the rule at {:.3f}.": of(EARLIER, BOUND),
}  # fmt: skip


@pytest.mark.parametrize("words", PROSE)
def test_numbers_in_the_text_are_those_of_the_published_runs(words):
    said = words.format(*np.atleast_1d(PROSE[words]))
    text, said = (re.sub(r"\b0\.", ".", x) for x in (README + OF_RESULTS, said))
    assert said in " ".join(text.split())


def test_what_the_readme_names_is_there_and_as_large_as_it_says():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert not [name for name in re.findall(r"`(test_\w+)`", README) if f"def {name}(" not in source]
    files = re.findall(r"(?:results/published|tests)\S+\.\w+", README + OF_RESULTS)
    assert len(commands()) > 3 and len(files) > 6 and all((ROOT / path).exists() for path in files)
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M):
        assert int(lines) == pytest.approx(len((ROOT / name).read_text("utf-8").splitlines()), rel=0.05, abs=9), name
    assert int(re.search(r"plants (\d+) such", README)[1]) == len(mutants.MUTANTS) - 1  # one is the control
