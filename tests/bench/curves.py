# SPDX-License-Identifier: MIT
"""Trains a config in several variants on the same data and keeps their loss curves.

    curves.py PROGRAM CONFIG [--steps N] [--restart | --jobs N] [--set KEY=VALUE]... [--json FILE]
        NAME[:KEY=VALUE,...]...

A NAME is a variant with settings of its own; the first is what the others are compared with. `worst` is the largest
difference of a 20-step mean from the first variant's. Two runs that differ in one rounding part by more and more; with
--restart all variants go on from the first one's checkpoint every 20 steps, so that each mean compares 20 steps.

    curves.py build/examples/ounce gla_124m --steps 300 --set data.files=... \\
        cross_entropy:model.loss.name=cross_entropy exact filter:model.loss.filter=all
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

from peers import ROOT, machine

SPAN = 20


def train(command, out, steps, resume=None):
    """The losses of the steps up to `steps`, the final evaluation's, and the last checkpoint."""
    command = [*command, "--out", out, "--steps", str(steps), "--resume", resume or "none"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "metrics.jsonl")) as lines:
        rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if row["t"] == "train"]
    evaluations = [row["val_loss"] for row in rows if row["t"] == "eval"]
    return losses, evaluations[-1] if evaluations else None, os.path.join(out, "ckpt", f"step_{steps:010}")


def together(commands, steps):
    """A curve and a final evaluation of each command; every SPAN steps all go on from where the first one is."""
    curves = [[] for _ in commands]
    start = None
    with tempfile.TemporaryDirectory() as out:
        for end in range(SPAN, steps + 1, SPAN):
            place = os.path.join(out, str(end))
            runs = [train(command, f"{place}-{i}", end, start) for i, command in enumerate(commands)]
            for curve, run in zip(curves, runs):
                curve += run[0]
            if start:
                shutil.rmtree(os.path.dirname(start))
            start = runs[0][2]
            for i in range(1, len(commands)):
                shutil.rmtree(f"{place}-{i}")
    return [(curve, run[1]) for curve, run in zip(curves, runs)]


def apart(commands, steps, jobs):
    def curve(command):
        with tempfile.TemporaryDirectory() as out:
            return train(command, out, steps)[:2]

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(curve, commands)


def means_of(losses):
    return [statistics.fmean(losses[i : i + SPAN]) for i in range(0, len(losses) - SPAN + 1, SPAN)]


def row_of(arguments, variant, means, val_loss, first):
    return {
        "t": "curve",
        "config": arguments.config,
        "data": arguments.data,
        "restarted": arguments.restart,
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
    parser.add_argument("--data", default="", help="what the text is: kept with the curves")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--restart", action="store_true", help="every 20 steps from the first variant's state")
    how.add_argument("--jobs", type=int, default=1, help="variants at once")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all variants")
    parser.add_argument("--json", help="append a JSON object a variant to this file")
    arguments = parser.parse_args()
    if arguments.steps < SPAN:
        parser.error(f"expected at least {SPAN} steps, of which a mean is taken")
    path = os.path.join(ROOT, "examples", "configs", arguments.config + ".toml")
    where = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    quiet = ["run.log_every=1", "run.eval_every=0", "checkpoint.every=0", "run.sample_tokens=0"]
    names, commands = [], []
    for variant in arguments.variants:
        name, _, own = variant.partition(":")
        settings = [*quiet, *arguments.set, *(setting for setting in own.split(",") if setting)]
        names.append(name)
        commands.append([arguments.program, "train", "--config", path, *(f"--set={setting}" for setting in settings)])
    first = None
    steps = arguments.steps
    curves = together(commands, steps) if arguments.restart else apart(commands, steps, arguments.jobs)
    for name, (losses, val_loss) in zip(names, curves):
        means = means_of(losses)
        first = first or means
        row = row_of(arguments, name, means, val_loss, first)
        print({key: row[key] for key in ("variant", "loss_first", "loss_middle", "loss_last", "worst_pct", "val_loss")})
        if arguments.json:
            with open(arguments.json, "a") as out:
                out.write(json.dumps({**where, **row}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
