# SPDX-License-Identifier: MIT
"""Keeps account of which sources were last tested on a GPU.

    gpu_tests.py record BUILD    after a test run on a GPU: writes results/tests-GPU.json
    gpu_tests.py compare         says which families have changed since those runs

A record holds, for every family of kernels, for optim and ckpt, how many of its tests that ran on the GPU (their
names end in /cuda: tests/support/devices.h) passed, were skipped and failed, and a hash of its files.
"""
import glob
import hashlib
import json
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.abspath(os.path.join(HERE, "..", ".."))
SOURCES = (".h", ".cpp", ".cu", ".cuh")


COMMON = os.path.join(ROOT, "kernels", "common", "")  # part of every family


def families():
    folders = sorted(glob.glob(os.path.join(ROOT, "kernels", "*", "")))
    folders += [os.path.join(ROOT, name, "") for name in ("optim", "ckpt")]
    return {os.path.basename(os.path.dirname(folder)): folder for folder in folders if folder != COMMON}


def hash_of(folder):
    digest = hashlib.sha256()
    paths = [p for f in (folder, COMMON) for p in glob.glob(os.path.join(f, "**", "*"), recursive=True)]
    for path in sorted(paths):
        if path.endswith(SOURCES):
            digest.update(os.path.relpath(path, ROOT).encode() + b"\0")
            with open(path, "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()[:16]


def family_of(source):
    """The family that tests/kernels/test_F.cpp or test_F_part.cpp, or anything in tests/optim or ckpt, is of."""
    for folder in ("optim", "ckpt"):
        if f"/tests/{folder}/" in source:
            return folder
    name = re.sub(r"^test_|\.cpp$", "", os.path.basename(source))
    known = [family for family in families() if name == family or name.startswith(family + "_")]
    return max(known, key=len, default=None) if "/tests/kernels/" in source else None


def gpu():
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None
    return re.sub(r"[^A-Za-z0-9]+", "-", name.removeprefix("NVIDIA ")).strip("-").lower()


def record(build):
    name = gpu()
    if name is None:
        return
    counts = {family: {"passed": 0, "skipped": 0, "failed": 0} for family in families()}
    for path in glob.glob(os.path.join(build, "test-results", "*.json")):
        with open(path) as file:
            suites = json.load(file)["testsuites"]
        for test in (test for suite in suites for test in suite["testsuite"]):
            family = family_of(test.get("file", ""))
            if family is not None and test["name"].endswith("/cuda"):
                skipped = test["result"] == "SKIPPED"
                counts[family]["failed" if "failures" in test else "skipped" if skipped else "passed"] += 1
    place = os.path.join(HERE, "results", f"tests-{name}.json")
    result = {}
    if os.path.exists(place):
        with open(place) as file:
            result = json.load(file)
    # A family without a test in this run keeps its record.
    for family, folder in families().items():
        if any(counts[family].values()):
            result[family] = {"files": hash_of(folder), **counts[family]}
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    print(f"tests of the families on this GPU: {os.path.relpath(place, ROOT)}")


def compare():
    for path in sorted(glob.glob(os.path.join(HERE, "results", "tests-*.json"))):
        with open(path) as file:
            old = json.load(file)
        changed = [f for f, folder in families().items() if f in old and old[f]["files"] != hash_of(folder)]
        if changed:
            print(f"changed since their tests last ran on {os.path.basename(path)[6:-5]}: {', '.join(changed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"] and len(sys.argv) == 3:
        record(sys.argv[2])
    elif sys.argv[1:] == ["compare"]:
        compare()
    else:
        sys.exit(__doc__)
