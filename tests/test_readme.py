"""What the README says: its commands parse, its table is that of the published results, what it names exists."""

import importlib
import re
import shlex

import pytest

from conftest import ROOT, SCRIPTS
from tools import readme_table

README = (ROOT / "README.md").read_text("utf-8")


class Parsed(Exception):
    """Raised in place of a run."""


def parse(script, flags, monkeypatch):
    """The command line of the script's own main, which goes no further."""
    module = importlib.import_module(script)
    parse_args = module.parse_args

    def only(*args):
        parse_args(*args)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(module, "parse_args", only)
        with pytest.raises(Parsed):
            module.main(flags)


def test_every_command_in_the_readme_parses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python (q\w+|bonus)\.py([^`\n#&|]*)", README)
    commands += re.findall(r"torchrun [^`\n]*?(q\w+|bonus)\.py([^`\n#&|]*)", README)
    commands += [
        ("q2b", " ".join(re.findall(r'"([^"]+)"', call))) for call in re.findall(r"main\(\[([^]…]*)\]\)", README)
    ]
    for script in SCRIPTS:  # in the docstring at the head of each
        doc = importlib.import_module(script).__doc__
        commands += [(script, flags.split("->")[0]) for flags in re.findall(rf"python {script}\.py([^\n]*)", doc)]
    assert {script for script, _ in commands} >= set(SCRIPTS)
    for script, flags in commands:
        parse(script, [] if "…" in flags or "..." in flags else shlex.split(flags), monkeypatch)
    with pytest.raises(SystemExit):  # control
        parse("q2b", ["--epoch", "1"], monkeypatch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", readme_table.TABLES)
def test_a_table_of_results_is_that_of_the_published_runs_and_nothing_else(name):
    head, rows = readme_table.TABLES[name]
    _, table, _ = readme_table.parts((ROOT / name).read_text("utf-8"), head)
    assert table == list(rows()) and len(table) >= 5


@pytest.mark.parametrize("name", readme_table.TABLES)
def test_a_table_is_found_whole_and_a_row_that_is_stale_is_seen(name):
    (head, _), text = readme_table.TABLES[name], (ROOT / name).read_text("utf-8")
    before, table, after = readme_table.parts(text, head)
    assert before + head + "\n".join(table) + after == text
    stale = text.replace(table[-1], table[-1] + "\n" + table[0])
    assert readme_table.parts(stale, head)[1] == [*table, table[0]]


def test_tests_and_files_named_in_the_readme_exist_and_its_sizes_are_about_right():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", README))
    assert len(names) > 12
    assert not [name for name in names if f"def {name}(" not in source]
    for path in re.findall(r"\((results/[^)]*\.(?:png|md))\)", README) + re.findall(r"\b(tests/[\w/]+\.py)\b", README):
        assert (ROOT / path).exists(), path
    sizes = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in sizes} == {path.name for path in ROOT.glob("*.py")}
    for name, lines in sizes:
        assert int(lines) == pytest.approx(len((ROOT / name).read_text("utf-8").splitlines()), rel=0.05, abs=9), name
