# SPDX-License-Identifier: MIT
"""Trains one model with several optimizers, each at its best learning rate, and compares their losses.

    convergence.py PROGRAM --json FILE [--jobs N] [--seconds N] [--variants NAME...] [--set KEY=VALUE]...
    convergence.py PROGRAM --json FILE --time        milliseconds a step, with nothing beside it
    convergence.py --json FILE --summary             appends a row a variant, of which tables.py makes the table
    convergence.py --json FILE --plot FILE.svg

convergence.toml holds the variants, their learning rates and the seeds. Runs that the file has are not made again, so
that a study may take several calls: --seconds starts none that would end later.
"""
import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
LAST = 5  # logged training losses, of which the last one is the mean


def read(path):
    if not os.path.exists(path):
        return []
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def train(arguments, study, variant, lr, seed, steps):
    """A row of a run; of one that did not stay finite without losses."""
    settings = [*variant["set"], f"optimizer.lr={lr}", f"run.steps={steps}", *arguments.set]
    settings.append(f"optimizer.schedule.warmup={round(study['warmup'] * steps)}")
    config = os.path.join(ROOT, "examples", "configs", study["config"] + ".toml")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "run")
        command = [arguments.program, "train", "--config", config, "--out", out, "--seed", str(seed), "--quiet"]
        start = time.monotonic()
        run = subprocess.run([*command, *(f"--set={s}" for s in settings)], capture_output=True, text=True)
        seconds = time.monotonic() - start
        if run.returncode and "not finite" not in run.stdout + run.stderr:
            raise SystemExit(f"convergence.py: {variant['name']} failed:\n{run.stdout}{run.stderr}")
        rows = read(os.path.join(out, "metrics.jsonl"))
    losses = [(row["step"], round(row["loss"], 4)) for row in rows if row["t"] == "train"]
    evals = [(row["step"], round(row["val_loss"], 5)) for row in rows if row["t"] == "eval"]
    times = [row["ms"] for row in rows if "ms" in row]
    ended = run.returncode == 0
    return {
        "t": "run",
        "optimizer": variant["name"],
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "val_loss": evals[-1][1] if ended else None,
        "best_val_loss": min(loss for _, loss in evals) if ended else None,
        "train_loss": statistics.fmean(loss for _, loss in losses[-LAST:]) if ended else None,
        "state_bytes": next(row["plan_optimizer"] for row in rows if row["t"] == "config"),
        "step_ms": statistics.fmean(times[1:] or times) if ended else None,
        "seconds": round(seconds, 1),
        "train": losses,
        "val": evals,
        "settings": settings,
    }


def runs_of(rows, name, steps):
    return [row for row in rows if row["t"] == "run" and row["optimizer"] == name and row["steps"] == steps]


def best_rate(study, variant, rows):
    """The learning rate of the least loss, or None; and those to try before it counts."""
    losses = {run["lr"]: run["val_loss"] for run in runs_of(rows, variant["name"], study["grid_steps"])
              if run["seed"] == study["seeds"][0]}
    missing = [lr for lr in variant["lr"] if lr not in losses]
    finite = {lr: loss for lr, loss in losses.items() if loss is not None}
    if missing or not finite:
        return None, missing
    best = min(finite, key=finite.get)
    low, high = min(variant["lr"]) / 2 ** study["extend"], max(variant["lr"]) * 2 ** study["extend"]
    more = [lr for lr in (best / 2, best * 2) if lr not in losses and low <= lr <= high]
    return (None, more) if more else (best, [])


def wanted(study, variants, rows):
    """The runs that are still to be made, as (variant, lr, seed, steps); those of the search first."""
    rates = [best_rate(study, variant, rows) for variant in variants]
    for variant, (_, missing) in zip(variants, rates):
        for lr in missing:
            yield variant, lr, study["seeds"][0], study["grid_steps"]
    for seed in study["seeds"]:
        for variant, (best, _) in zip(variants, rates):
            runs = runs_of(rows, variant["name"], study["steps"])
            if best is not None and not any(run["lr"] == best and run["seed"] == seed for run in runs):
                yield variant, best, seed, study["steps"]


def search(arguments, study, variants, rows, append):
    """All runs, `jobs` at a time; a result can ask for more."""
    begin = time.monotonic()
    running = {}  # by what it is
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        while True:
            for variant, lr, seed, steps in wanted(study, variants, rows):
                key = variant["name"], lr, seed, steps
                if key in running or len(running) == arguments.jobs:
                    continue
                # A run takes as long as the slowest so far of its kind.
                known = [row for row in rows if row["t"] == "run"]
                known = [row for row in known if row["optimizer"] == variant["name"]] or known
                pace = max((row["seconds"] / row["steps"] for row in known), default=0)
                if time.monotonic() - begin + pace * steps <= arguments.seconds:
                    running[key] = pool.submit(train, arguments, study, variant, lr, seed, steps)
            if not running:
                break
            done, _ = concurrent.futures.wait(running.values(), return_when="FIRST_COMPLETED")
            for key in [key for key, run in running.items() if run in done]:
                row = running.pop(key).result()
                print("{optimizer:28} lr {lr:8.2g} seed {seed} steps {steps:5} val {val_loss} best {best_val_loss} "
                      "train {train_loss} {step_ms} ms {seconds} s".format(**row), flush=True)
                append(row)
    left = len(list(wanted(study, variants, rows)))
    print("complete" if left == 0 else f"to be continued: at least {left} runs are left")


def measure_time(arguments, study, variants, rows, append):
    for variant in variants:
        best, _ = best_rate(study, variant, rows)
        steps = variant.get("time_steps", study["time_steps"])
        row = {**train(arguments, study, variant, best or variant["lr"][0], study["seeds"][0], steps), "t": "time"}
        for key in ("val_loss", "best_val_loss", "train_loss", "train", "val"):
            del row[key]
        print("{optimizer:28} {step_ms:.2f} ms".format(**row), flush=True)
        append(row)


def summaries(study, variants, rows):
    """Means over the seeds that are there."""
    for variant in variants:
        name = variant["name"]
        best, _ = best_rate(study, variant, rows)
        runs = [run for run in runs_of(rows, name, study["steps"]) if run["lr"] == best]
        runs = list({run["seed"]: run for run in runs}.values())
        if best is None or not runs or any(run["val_loss"] is None for run in runs):
            continue
        times = [row["step_ms"] for row in rows if row["t"] == "time" and row["optimizer"] == name]
        mean = lambda key: statistics.fmean(run[key] for run in runs)
        losses = [run["val_loss"] for run in runs]
        where = {key: runs[-1].get(key) for key in ("device", "driver", "torch", "commit", "date", "threads")}
        yield {
            "t": "convergence",
            "optimizer": name,
            "lr": best,
            "steps": study["steps"],
            "seeds": len(runs),
            "val_loss": mean("val_loss"),
            "val_range": [min(losses), max(losses)],
            "best_val_loss": mean("best_val_loss"),
            "train_loss": mean("train_loss"),
            "step_ms": times[-1] if times else None,
            "state_bytes": runs[-1]["state_bytes"],
            "settings": runs[-1]["settings"],
            **where,
        }


def plot(study, variants, rows, path):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "convergence", "svg.fonttype": "none", "font.size": 8})
    figure, (by_step, by_second, by_byte) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for i, row in enumerate(summaries(study, variants, rows)):
        name, color = row["optimizer"], f"C{i}"
        runs = [run for run in runs_of(rows, name, study["steps"]) if run["lr"] == row["lr"]]
        steps = [step for step, _ in runs[0]["val"]]
        values = list(zip(*([loss for _, loss in run["val"]] for run in runs)))
        means, low, high = ([of(v) for v in values] for of in (statistics.fmean, min, max))
        axes = [(by_step, steps)]
        if row["step_ms"]:
            axes.append((by_second, [step * row["step_ms"] / 1e3 for step in steps]))
        for axis, x in axes:
            axis.plot(x, means, color=color, linewidth=1, label=f"{name}, {row['lr']:g}")
            axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        mib = row["state_bytes"] / 2**20
        by_byte.errorbar(mib, means[-1], [[means[-1] - low[-1]], [high[-1] - means[-1]]], color=color, marker="o")
    ends = [row["val_loss"] for row in summaries(study, variants, rows)]
    for axis, label in ((by_step, "steps"), (by_second, "seconds"), (by_byte, "optimizer state, MiB")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    for axis in (by_step, by_second):
        axis.set_ylim(min(ends) - 0.03, max(ends) + 0.5)
    by_byte.set_xlim(left=0)
    by_step.set_ylabel("validation loss, nats a byte")
    by_byte.set_ylabel("at the end")
    by_step.legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?")
    parser.add_argument("--json", required=True, metavar="FILE", help="where runs are kept")
    parser.add_argument("--study", default=os.path.join(HERE, "convergence.toml"), metavar="FILE")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all runs")
    parser.add_argument("--steps", type=int, help="of all runs, the search's too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    with open(arguments.study, "rb") as file:
        study = tomllib.load(file)
    if arguments.steps:
        study.update(steps=arguments.steps, grid_steps=arguments.steps)
    names = [variant["name"] for variant in study["variant"]]
    for name in arguments.variants or []:
        if name not in names:
            parser.error(f"no variant '{name}'; known: {'; '.join(names)}")
    variants = [variant for variant in study["variant"] if variant["name"] in (arguments.variants or names)]
    rows = read(arguments.json)

    def append(row):
        rows.append(row)
        with open(arguments.json, "a") as file:
            file.write(json.dumps(row) + "\n")

    if arguments.program:
        import torch

        from peers import machine

        where = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not where["commit"]:
            parser.error("git knows no commit to write beside the results; set OUNCE_COMMIT")
        work = measure_time if arguments.time else search
        work(arguments, study, variants, rows, lambda row: append({**row, **where}))
    if arguments.summary:
        for row in list(summaries(study, variants, rows)):
            append(row)
    if arguments.plot:
        plot(study, variants, rows, arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
