# SPDX-License-Identifier: MIT
"""Trains a config in several variants on the same data and keeps their loss curves.

    curves.py PROGRAM CONFIG [--steps N] [--set KEY=VALUE]... [--json FILE] NAME[:KEY=VALUE,...]...

A NAME is a variant with settings of its own; the first is what the others are compared with. `worst` is the largest
difference of a 20-step mean from the first variant's.

    curves.py build/examples/ounce gla_124m --steps 300 --set data.files=... \\
        cross_entropy:model.loss.name=cross_entropy exact filter:model.loss.filter=all
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch

from peers import ROOT, machine

SPAN = 20


def train(program, config, steps, settings):
    """The losses of all steps, and the final evaluation's."""
    with tempfile.TemporaryDirectory() as out:
        command = [program, "train", "--config", config, "--out", out, "--steps", str(steps)]
        quiet = ["run.log_every=1", "run.eval_every=0", "checkpoint.every=0", "run.sample_tokens=0"]
        for setting in [*quiet, *settings]:
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(os.path.join(out, "metrics.jsonl")) as lines:
            rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if row["t"] == "train"]
    evaluations = [row["val_loss"] for row in rows if row["t"] == "eval"]
    return losses, evaluations[-1] if evaluations else None


def means_of(losses):
    return [statistics.fmean(losses[i : i + SPAN]) for i in range(0, len(losses) - SPAN + 1, SPAN)]


def row_of(config, variant, means, val_loss, first):
    return {
        "t": "curve",
        "config": config,
        "variant": variant,
        "steps": len(means) * SPAN,
        "loss_first": means[0],
        "loss_middle": means[len(means) // 2],
        "loss_last": means[-1],
        "worst_pct": max(abs(own / other - 1) for own, other in zip(means, first)) * 100,
        "val_loss": val_loss,
        "means": [round(mean, 4) for mean in means],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("config", help="a name in examples/configs")
    parser.add_argument("variants", nargs="+", metavar="NAME[:KEY=VALUE,...]")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all variants")
    parser.add_argument("--json", help="append a JSON object a variant to this file")
    arguments = parser.parse_args()
    if arguments.steps < SPAN:
        parser.error(f"expected at least {SPAN} steps, of which a mean is taken")
    path = os.path.join(ROOT, "examples", "configs", arguments.config + ".toml")
    where = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    first = None
    for variant in arguments.variants:
        name, _, own = variant.partition(":")
        settings = arguments.set + [setting for setting in own.split(",") if setting]
        losses, val_loss = train(arguments.program, path, arguments.steps, settings)
        means = means_of(losses)
        first = first or means
        row = row_of(arguments.config, name, means, val_loss, first)
        print({key: row[key] for key in ("variant", "loss_first", "loss_middle", "loss_last", "worst_pct", "val_loss")})
        if arguments.json:
            with open(arguments.json, "a") as out:
                out.write(json.dumps({**where, **row}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
