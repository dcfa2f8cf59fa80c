# SPDX-License-Identifier: MIT
"""Writes the tables and the output shown in the READMEs from the files in tests/bench/results.

    python3 tests/bench/tables.py [--check] [FILE...]      default: every tracked *.md

What stands between two such lines is replaced: a table between

    <!-- bench:NAME key=value ... -->
    <!-- /bench -->

or what whole runs measured, one row for each results/run-*-GPU.jsonl, between

    <!-- runs:GPU -->
    <!-- /runs -->

or a program's output, whole or its first and last lines, between

    <!-- output:NAME head=N tail=M -->
    <!-- /output -->

NAME is the file results/NAME.jsonl or results/NAME.txt. Keys choose its rows: family=cce device=H100 (a
part of the value is enough); the newest row of each case is shown. columns=a,b,... chooses columns.
--check changes nothing and fails where one is not what the files say.
"""
import argparse
import glob
import json
import os
import re
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.abspath(os.path.join(HERE, "..", ".."))
BLOCK = re.compile(r"(<!-- bench:(\S+)((?: [^ ]+)*?) -->\n)(.*?)(<!-- /bench -->)", re.S)
RUNS = re.compile(r"(<!-- runs:(\S+) -->\n)(.*?)(<!-- /runs -->)", re.S)
OUTPUT = re.compile(r"(<!-- output:(\S+)((?: [^ ]+)*?) -->\n)(.*?)(<!-- /output -->)", re.S)

# How a column is headed and written.
COLUMNS = {
    "family": ("family", str),
    "name": ("case", str),
    "peer": ("peer", str),
    "shape": ("shape", lambda v: " x ".join(map(str, v)) if isinstance(v, list) else str(v)),
    "dtype": ("dtype", str),
    "pass": ("pass", str),
    "forward_ms": ("forward ms", "{:.2f}".format),
    "backward_ms": ("backward ms", "{:.2f}".format),
    "both_ms": ("both ms", "{:.2f}".format),
    "ours_ms": ("ours ms", "{:.2f}".format),
    "peer_ms": ("peer ms", "{:.2f}".format),
    "ratio": ("peer / ours", "{:.2f}".format),
    "peak_bytes": ("peak MiB", lambda v: f"{v / 2**20:.1f}"),
    "ours_peak_bytes": ("ours MiB", lambda v: f"{v / 2**20:.1f}"),
    "peer_peak_bytes": ("peer MiB", lambda v: f"{v / 2**20:.1f}"),
    "share_of_limit": ("share of the limit", "{:.0%}".format),
    "difference": ("difference", "{:.0e}".format),
    "optimizer": ("optimizer", str),
    "ms": ("ms", "{:.2f}".format),
    "of_torch": ("of torch's fused AdamW", "{:.2f}".format),
    "state_bytes": ("state MiB", lambda v: f"{v / 2**20:.1f}"),
    "cell": ("cell", str),
    "state_gb": ("state GB", "{:.2f}".format),
    "fb_ms": ("forward + backward ms", "{:.0f}".format),
    "every": ("steps a save", str),
    "saves": ("saves", str),
    "step_ms": ("step ms", "{:.1f}".format),
    "blocked_ms": ("blocked ms", "{:.1f}".format),
    "wait_ms": ("waits for the disk ms", "{:.0f}".format),
    "inside_ms": ("blocked, from inside ms", "{:.2f}".format),
    "call_ms": ("call ms", "{:.1f}".format),
    "captured_s": ("captured s", "{:.3f}".format),
    "pool_mb": ("pool MB", "{:.0f}".format),
    "restore_gb_s": ("restore GB/s", "{:.2f}".format),
    "durable_s": ("durable s", "{:.2f}".format),
    "slowdown_copy_pct": ("slower in the copy %", "{:.1f}".format),
    "slowdown_flush_pct": ("slower in the flush %", "{:.1f}".format),
    "extra_rss_mb": ("extra RSS MB", "{:.0f}".format),
    "restore_s": ("restore s", "{:.2f}".format),
    "restore_cache": ("page cache", str),
    "item_us": (".item() us", "{:.0f}".format),
    "item_copy_us": (".item() in the copy us", "{:.0f}".format),
    "d2h_gb_s": ("D2H GB/s", "{:.1f}".format),
    "h2d_gb_s": ("H2D GB/s", "{:.1f}".format),
    "disk_write_gb_s": ("disk write GB/s", "{:.2f}".format),
    "disk_read_gb_s": ("disk read GB/s", "{:.2f}".format),
    "error": ("error", lambda v: v.replace("|", "/")),
    "target": ("input", str),
    "seconds": ("seconds", str),
    "count": ("count", "{:,}".format),
    "failures": ("failures", str),
    "executions": ("executions", "{:,}".format),
    "coverage": ("edges", "{:,}".format),
    "features": ("features", "{:,}".format),
    "crashes": ("crashes", str),
    "config": ("config", str),
    "variant": ("gradients", str),
    "steps": ("steps", str),
    "loss_first": ("first 20", "{:.3f}".format),
    "loss_middle": ("in the middle", "{:.3f}".format),
    "loss_last": ("last 20", "{:.3f}".format),
    "val_loss": ("validation", "{:.3f}".format),
    "worst_pct": ("worst difference %", "{:.2f}".format),
    "lr": ("learning rate", "{:g}".format),
    "seeds": ("seeds", "{}".format),
    "val_range": ("of them", lambda v: " to ".join(map("{:.3f}".format, v))),
    "train_loss": ("training", "{:.3f}".format),
}
DEFAULT_COLUMNS = {
    "bench": "name shape dtype forward_ms backward_ms both_ms peak_bytes share_of_limit".split(),
    "ckpt": "peer state_gb fb_ms every blocked_ms inside_ms wait_ms durable_s slowdown_flush_pct extra_rss_mb restore_s".split(),
    "convergence": "optimizer lr seeds val_loss val_range train_loss step_ms state_bytes".split(),
    "curve": "config variant steps loss_first loss_middle loss_last val_loss worst_pct".split(),
    "fuzz": "target seconds executions coverage features crashes".split(),
    "kill": "count seconds failures".split(),
    "flips": "count seconds failures".split(),
    "peers": "peer shape dtype pass ours_ms peer_ms ratio ours_peak_bytes peer_peak_bytes".split(),
}
IDENTITY = "t optimizer family name config variant restarted peer shape dtype pass device state_gb fb_ms every target".split()
# Limits that a table of a kind ends with.
RATES = {
    "copy_gb_s": "copy {:.0f} GB/s",
    "matmul_tflop_s": "matmul {:.2f} TFLOP/s",
    "d2h_gb_s": "device to host {:.1f} GB/s",
    "h2d_gb_s": "host to device {:.1f} GB/s",
    "disk_write_gb_s": "disk writes {:.2f} GB/s",
    "disk_read_gb_s": "disk reads {:.2f} GB/s",
}


def read_rows(name, wanted):
    path = os.path.join(HERE, "results", name + ".jsonl")
    if not os.path.exists(path):
        raise SystemExit(f"tables.py: there is no {os.path.relpath(path, ROOT)}")
    newest = {}
    with open(path) as lines:
        for line in lines:
            row = json.loads(line)
            if all(value in str(row.get(key, "")) for key, value in wanted.items()):
                newest[tuple(str(row.get(key)) for key in IDENTITY)] = row
    return list(newest.values())


def table(name, settings):
    wanted = dict(item.split("=", 1) for item in settings.split())
    columns = wanted.pop("columns", "").split(",")
    rows = read_rows(name, wanted)
    if not rows:
        raise SystemExit(f"tables.py: bench:{name}{settings} chooses no row")
    if columns == [""]:
        columns = DEFAULT_COLUMNS[rows[0]["t"]]

    def cell(row, column):
        value = row.get(column)
        return "" if value is None else COLUMNS[column][1](value)

    lines = [[COLUMNS[c][0] for c in columns], ["---"] * len(columns)]
    lines += [[cell(row, c) for c in columns] for row in rows]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    places = sorted({(r["device"], r.get("version") or "torch " + r["torch"], r["commit"], r["date"][:10]) for r in rows})
    for device, version, commit, date in places:
        text += f"\n{device}; {version}; commit {commit or 'unknown'}; {date}"
    rates = [form.format(rows[-1][key]) for key, form in RATES.items() if rows[-1].get(key) is not None]
    if rates:
        text += "; " + ", ".join(rates) + " in the same run"
    return text + ".\n"


def runs(gpu):
    lines = ["| config | parameters | best loss (step) | ms a step | tokens/s | MFU | memory | predicted |", "|---" * 8 + "|"]
    places = set()
    for path in sorted(glob.glob(os.path.join(HERE, "results", f"run-*-{gpu}.jsonl"))):
        with open(path) as file:
            rows = [json.loads(line) for line in file]
        config = next(row for row in rows if row["t"] == "config")
        steps = [row for row in rows if row["t"] == "train" and "ms" in row]
        best = min((row for row in rows if row["t"] == "eval"), key=lambda row: row["val_loss"])
        middle = lambda key: statistics.median(row[key] for row in steps)
        name = os.path.basename(path).removeprefix("run-").removesuffix(f"-{gpu}.jsonl")
        lines.append(
            f"| {name} | {config['parameters'] / 1e6:.1f}M | {best['val_loss']:.4f} ({best['step']}) "
            f"| {middle('ms'):.1f} | {middle('tok_s') / 1e3:.0f}k | {middle('mfu'):.1%} "
            f"| {max(row['mem'] for row in steps) / 2**30:.2f} GiB | {config['plan_peak'] / 2**30:.2f} GiB |"
        )
        places.add(f"{config['device']}, driver {config['driver']}, LibTorch {config['torch']}")
    return "\n".join(lines) + "\n\n" + "; ".join(sorted(places)) + ".\n"


def output(name, settings):
    wanted = dict(item.split("=", 1) for item in settings.split())
    with open(os.path.join(HERE, "results", name + ".txt")) as file:
        lines = file.read().splitlines()
    head, tail = int(wanted.get("head", len(lines))), int(wanted.get("tail", 0))
    if head + tail < len(lines):
        lines[head : len(lines) - tail] = ["..."]
    return "```\n" + "\n".join(lines) + "\n```\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("file", nargs="*")
    arguments = parser.parse_args()
    files = arguments.file or [
        os.path.join(ROOT, f)
        for f in subprocess.run(
            ["git", "-C", ROOT, "ls-files", "*.md"], capture_output=True, text=True, check=True
        ).stdout.split()
    ]
    stale = []
    for path in files:
        with open(path) as file:
            old = file.read()
        new = BLOCK.sub(lambda m: m[1] + table(m[2], m[3]) + m[5], old)
        new = RUNS.sub(lambda m: m[1] + runs(m[2]) + m[4], new)
        new = OUTPUT.sub(lambda m: m[1] + output(m[2], m[3]) + m[5], new)
        if new == old:
            continue
        stale.append(path)
        if not arguments.check:
            with open(path, "w") as file:
                file.write(new)
    for path in stale:
        print(("out of date: " if arguments.check else "updated: ") + os.path.relpath(path, ROOT))
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
