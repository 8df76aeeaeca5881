"""Question 2b: the VAE of 2a with an autoregressive flow as its prior, and nothing else different.

    z = f(eps):  z_i = t_i(z_<i) + exp(s_i(z_<i)) eps_i,  i over the 8 x 8 positions in raster order
                 with s and t from a shallow PixelCNN
    log p(z) = log N(eps; 0, I) + log |det d eps / d z| = log N(eps; 0, I) - sum_i s_i

(arXiv:1611.02731, equations 12 to 14). Same encoder, decoder, loss, seed and batches as 2a; the flow starts as the
identity, so that training starts from the same bound.

    python q2b.py --epochs 20                  ->  results/q2b/report.md, on SVHN (downloaded)
    python q2b.py --epochs 1 --data synthetic  ->  the same on synthetic images, offline
    python q2b.py --evaluate results/q2b/checkpoint.pt --data FILE.npz  ->  results/q2b/evaluate/metrics.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from core import IMAGE_DEFAULTS, IMAGE_SMOKE, FlowPrior, ImageVAE, in_notebook, parse_args, run_images


def make_model(args: argparse.Namespace) -> ImageVAE:
    return ImageVAE(args.latents, FlowPrior)


def comparison(metrics: dict[str, Any], path_2a: Path) -> str:
    """Whether the autoregressive prior makes a difference: 2a's results beside these, if made in the same way."""
    heading = "\n## Does the autoregressive prior make a difference?\n\n"
    how = "`python q2a.py` with the same arguments, then `python q2b.py` again, puts the comparison here.\n"
    try:
        other = json.loads(path_2a.read_text("utf-8"))
        theirs, data, args = other["final"]["test"], other["data"], other["args"]
        differing = [k for k in metrics["args"] if k not in ("out", "data_root") and metrics["args"][k] != args.get(k)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{heading}There are no results of 2a in {path_2a.parent}. {how}"
    if data != metrics["data"] or differing:
        what = ", ".join(differing) or "data"
        return f"{heading}The results of 2a in {path_2a.parent} were made with another {what}: not compared. {how}"
    ours = metrics["final"]["test"]
    rows = "\n".join(
        f"| {name} | {theirs[key]:.4f} | {ours[key]:.4f} | {ours[key] - theirs[key]:+.4f} |"
        for name, key in (("−ELBO", "neg_elbo_bpd"), ("KL term", "kl_bpd"), ("decoder term", "recon_bpd"))
    )
    difference = ours["neg_elbo_bpd"] - theirs["neg_elbo_bpd"]
    verdict = "is lower" if difference < 0 else "is not lower"
    return f"""{heading}Same data, arguments, batches and noise; test, bits/dim:

| term | 2a: N(0, I) | 2b: flow | 2b − 2a |
|---|---|---|---|
{rows}

In this run −ELBO with the flow prior {verdict}: {difference:+.4f} bits/dim. At equal encoder and decoder the prior
changes the KL term alone: a flow can charge less for what a position of z shares with those before it. A difference in
the decoder term means that encoder and decoder trained to other weights, such as a code that is affordable only under
the flow. One seed each: how much of it another seed would move is not measured here.
"""


def main(argv: list[str] | None = None) -> None:
    args, out = parse_args("q2b", argv, IMAGE_DEFAULTS, IMAGE_SMOKE, images=True)

    def finish(model: ImageVAE, splits: dict, metrics: dict, out: Path) -> str:
        return comparison(metrics, out.with_name("q2a") / "metrics.json")

    run_images("q2b", args, out, make_model, "2b: the same VAE with an autoregressive flow prior", finish)


if __name__ == "__main__" and not in_notebook():
    main()
