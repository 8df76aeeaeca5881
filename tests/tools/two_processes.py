"""What torchrun starts for test_processes.py: a batch that cannot be shared, then two scripts.

Argument: the folder for the results, which holds noise.npz, the images to train on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
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
    data, out = ["--data", f"{sys.argv[1]}/noise.npz"], ["--out", sys.argv[1]]
    bonus.draw_figures = lambda *_: None
    for module in (q2b, bonus):  # a check by rank 0 alone, of which one process does as much
        module.check_prior = lambda prior: 0.0
    try:
        q2a.main(["--smoke", "--batch-size", "15", *data, *out])
    except SystemExit as stop:
        print("status", stop.code)
    q2b.main(RUNS["q2b"] + data + out)
    bonus.main(RUNS["bonus"] + data + out)


if __name__ == "__main__":
    core.launch(main)
