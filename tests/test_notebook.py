"""The ways into a notebook, each in a real IPython kernel (two minutes).

Skipped unless ipykernel and nbclient are there: pip install ipykernel nbclient && python -m pytest -m notebook
"""

import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import ROOT, SCRIPTS

pytest.importorskip("ipykernel")
nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
pytestmark = pytest.mark.notebook


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Of the kernels: `!python` is this one, and figures are shown by the kernel's own backend."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("MPLBACKEND", raising=False)


@pytest.fixture
def kernel(tmp_path):
    """A client with a live kernel in a folder that holds the scripts; run(code) -> the cell with its outputs."""
    for name in ("core", *SCRIPTS):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    notebook = nbformat.v4.new_notebook()
    client = nbclient.NotebookClient(
        notebook, timeout=180, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    with client.setup_kernel():

        def run(code):
            cell = nbformat.v4.new_code_cell(code)
            notebook.cells.append(cell)
            return client.execute_cell(cell, len(notebook.cells) - 1)

        run.client, run.folder = client, tmp_path
        yield run


def text(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def figures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def errors(cell):
    return [output.ename for output in cell.outputs if output.output_type == "error"]


def test_command_with_an_exclamation_mark(kernel):
    cell = kernel("!python q2b.py --smoke")
    assert "wrote results/smoke/q2b/report.md" in text(cell) and not errors(cell)


def test_pasted_script_then_main_twice(kernel):
    core_cell = kernel("%%writefile core.py\n" + (ROOT / "core.py").read_text("utf-8"))
    assert not errors(core_cell)
    pasted = kernel((ROOT / "q1a.py").read_text("utf-8"))
    assert not errors(pasted) and "--epochs" not in text(pasted)  # nothing starts on its own
    for _ in range(2):
        cell = kernel('main(["--smoke"])')
        assert not errors(cell) and "wrote results" in text(cell) and figures(cell) == 3
    assert not errors(kernel('main(["--smoke", "--seeds", "2"])'))  # one after the other, in this process
    wrong = kernel('main(["--epoch", "1"])')
    assert errors(wrong) == ["SystemExit"] and "unrecognized arguments: --epoch" in text(wrong)


def test_percent_run(kernel):
    cell = kernel("%run q2a.py --smoke")
    assert not errors(cell) and "wrote results" in text(cell) and figures(cell) == 4
    widgets = ["application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in cell.outputs]
    assert re.search(r"training: +\d+%\|", text(cell)) or any(widgets)  # a bar, as text or as ipywidgets draws it


def test_an_interrupt_leaves_the_kernel_usable_and_resume_goes_on(kernel):
    kernel("import q1a, os")
    process = int(text(kernel("print(os.getpid())")))

    def interrupt():
        for _ in range(200):
            time.sleep(0.1)
            if (kernel.folder / "results/smoke/q1a/progress/data1_diagonal.pt").exists():
                break
        os.kill(process, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    cell = kernel('q1a.main(["--smoke", "--epochs", "100000"])')
    thread.join()
    assert errors(cell) == ["KeyboardInterrupt"] and "wrote results" not in text(cell)
    assert text(kernel("print(1 + 1)")) == "2\n"
    cell = kernel('q1a.main(["--smoke", "--epochs", "100000", "--resume", "--seed", "1"])')
    assert errors(cell) == ["SystemExit"] and "differs in --seed" in text(cell)
    assert not errors(kernel('q1a.main(["--smoke"])'))


def test_memory_is_given_back(kernel):
    kernel("import gc, torch, warnings, q2a; warnings.simplefilter('ignore')")
    count = "gc.collect(); print(sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.Tensor)))"
    before = int(text(kernel(count)))
    assert not errors(kernel('q2a.main(["--smoke"])'))
    assert int(text(kernel(count))) - before < 1_000_000  # a model has 6 million
