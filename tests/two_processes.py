"""What torchrun starts for test_processes.py: a batch that cannot be shared, then two scripts. Argument: the folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import core
import bonus
import q2a
import q2b

FLAGS = ["--smoke", "--device", "cpu", "--epochs", "2", "--precision", "fp32", "--muon-lr", "0", "--lr", "2e-4"]
RUNS = {  # of the bonus no samples are drawn, which takes most of the time; those of 2b are drawn by two processes too
    "q2b": FLAGS,
    "bonus": [*FLAGS, "--limit", "32", "--free-bits", "0.05", "--table-epochs", "0", "--receptive-field", "1"],
}


def main():
    out = ["--out", sys.argv[1]]
    bonus.draw_figures = lambda *_: None
    try:
        q2a.main(["--smoke", "--batch-size", "15", *out])
    except SystemExit as stop:
        print("status", stop.code)
    q2b.main(RUNS["q2b"] + out)
    bonus.main(RUNS["bonus"] + out)


if __name__ == "__main__":
    core.launch(main)
