"""The ways into a notebook, each in a real IPython kernel (a minute).

Skipped unless ipykernel and nbclient are there: pip install ipykernel nbclient && python -m pytest -m notebook
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SCRIPTS

pytest.importorskip("ipykernel")
nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
pytestmark = pytest.mark.notebook


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """run(code): what a cell prints, how many figures it shows, and its errors; in a folder that holds the scripts."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # of !python
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures are the kernel's
    for name in ("core", *SCRIPTS):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    notebook, options = nbformat.v4.new_notebook(), {"resources": {"metadata": {"path": str(tmp_path)}}}
    client = nbclient.NotebookClient(notebook, timeout=180, allow_errors=True, **options)

    def run(code):
        notebook.cells.append(nbformat.v4.new_code_cell(code))
        outputs = client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1).outputs
        figures = sum("image/png" in output.get("data", {}) for output in outputs)
        printed = "".join(output.get("text", "") for output in outputs)
        return printed, figures, [output.ename for output in outputs if output.output_type == "error"]

    with client.setup_kernel():
        yield run


def test_a_pasted_script_waits_for_main_and_percent_run_and_an_exclamation_mark_run_it(kernel):
    assert kernel("%%writefile core.py\n" + (ROOT / "core.py").read_text("utf-8"))[2] == []
    printed, _, errors = kernel((ROOT / "q1a.py").read_text("utf-8"))
    assert "--epochs" not in printed and not errors
    for _ in range(2):
        printed, figures, errors = kernel('main(["--smoke"])')
        assert "wrote results" in printed and figures == 3 and not errors
    printed, figures, errors = kernel("%run q2a.py --smoke")
    assert "wrote results" in printed and figures == 4 and not errors
    assert "wrote results/smoke/q1a/report.md" in kernel("!python q1a.py --smoke")[0]
    printed, _, errors = kernel('main(["--epoch", "1"])')
    assert errors == ["SystemExit"] and "unrecognized arguments: --epoch" in printed


def test_an_interrupt_leaves_the_kernel_usable_and_resume_goes_on(kernel):
    stop = "import _thread, q1a, threading; threading.Timer(5, _thread.interrupt_main).start()"
    _, _, errors = kernel(stop + '; q1a.main(["--smoke", "--epochs", "100000"])')
    assert errors == ["KeyboardInterrupt"] and kernel("print(1 + 1)") == ("2\n", 0, [])
    printed, _, errors = kernel('q1a.main(["--smoke", "--resume", "--seed", "1"])')
    assert errors == ["SystemExit"] and "--seed (0, now 1)" in printed
    assert kernel('q1a.main(["--smoke"])')[2] == []
