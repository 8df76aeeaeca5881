"""What the README says: its commands run, its tables are those of the published results, what it names exists."""

import importlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import bonus
import q1b
import q2b
from conftest import ROOT, SCRIPTS, results
from tools import bench, codec, mutants, readme_table

README = (ROOT / "README.md").read_text("utf-8")


def commands_of_scripts():
    """(script, flags) of the commands in README and at the head of each script, without what --smoke sets anyway."""
    found = re.findall(r"(q\w+|bonus)\.py((?: +-[^`\n#&|]*|))[`\n&]", README)
    found += [("q2b", call.replace('"', "").replace(",", "")) for call in re.findall(r"main\(\[(.*?)\]\)", README)]
    for script in SCRIPTS:
        doc = importlib.import_module(script).__doc__
        found += [(script, flags.split("->")[0]) for flags in re.findall(rf"python {script}\.py([^\n]*)", doc)]
    preset = r"--(epochs|limit|table-epochs) \d+|--data synthetic"
    return sorted({(script, " ".join(re.sub(preset, "", flags).split())) for script, flags in found})


def test_commands_are_found_wherever_the_readme_has_them():
    found = commands_of_scripts()
    assert {script for script, _ in found} == set(SCRIPTS) and len(found) > 12
    assert {("q2b", ""), ("q2b", "--compare"), ("q2a", "--data FOLDER")} <= set(found)
    assert any("--evaluate" in flags for _, flags in found) and ("q1a", "--seeds 5") in found


IN_BACKGROUND = {*((script, "") for script in SCRIPTS), ("q2b", "--compare")}  # as the fixture `smoke` runs them


@pytest.mark.parametrize(("script", "flags"), [c for c in commands_of_scripts() if c not in IN_BACKGROUND])
def test_every_command_runs_at_smoke_size(script, flags, smoke, tmp_path, monkeypatch, unsaved):
    """But for those that the tests run anyway. Of a bonus or a comparison no figures are drawn.

    Names of files stand for files that are made here.
    """
    monkeypatch.chdir(tmp_path)
    images = np.random.RandomState(0).randint(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez("FILE.npz", images=images)
    (tmp_path / "FOLDER").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "FOLDER" / f"{k}.png")
    for module in (bonus, q2b):
        if "--samples" not in flags:
            monkeypatch.setattr(module, "draw_figures", lambda *_: None)
    monkeypatch.setattr(q1b, "DRAWS_PER_POINT", 2000)
    flags = re.sub(r"results/(\w+)/checkpoint.pt", rf"{smoke[0]}/\1/checkpoint.pt", flags)
    flags = re.sub(r"--(seeds|samples) \d+", r"--\1 2", flags)
    flags += " --smoke --device cpu --epochs 1" + ("" if script in ("q1a", "q1b") else " --limit 30 --batch-size 8")
    flags += " --table-epochs 0" if script == "bonus" else ""
    importlib.import_module(script).main(flags.split())
    folder = tmp_path / "results" / "smoke" / script / ("evaluate" if "--evaluate" in flags else "")
    assert (folder / "report.md").exists() and results(folder, "")["failed"] == {}


def test_control_a_command_with_a_mistake_does_not_run(smoke, tmp_path, monkeypatch, unsaved):
    with pytest.raises(SystemExit):
        test_every_command_runs_at_smoke_size("q2b", "--epoch", smoke, tmp_path, monkeypatch, unsaved)


def test_every_tool_in_the_readme_runs_at_smoke_size(smoke, tmp_path, monkeypatch, capsys):
    """Of bench one part, sampling; of mutants no test is run; codec is left out where constriction is missing."""
    found = set(re.findall(r"python tests/tools/(\w+)\.py([^`\n&]*)", README))
    assert {tool for tool, _ in found} == {"bench", "codec", "mutants"}
    monkeypatch.chdir(tmp_path)
    for tool, flags in sorted(found):
        if tool == "bench":
            monkeypatch.setattr("sys.argv", ["bench.py", *shlex.split(flags), "--short", "--part", "sampling"])
            bench.main()
            assert (tmp_path / "results/bench/report.md").exists()
        elif tool == "mutants":
            monkeypatch.setattr("sys.argv", ["mutants.py", *shlex.split(flags), "--check"])
            with pytest.raises(SystemExit) as stop:
                mutants.main()
            assert not stop.value.code and "can be planted" in capsys.readouterr().out
        elif codec.stream:  # constriction is there
            flags = flags.replace("results/q2b/checkpoint.pt", str(smoke[0] / "q2b/checkpoint.pt"))
            codec.main([*shlex.split(flags), "--limit", "80", "--images", "2"])
            assert "decoded exactly" in capsys.readouterr().out


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
