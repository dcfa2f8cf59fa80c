# SPDX-License-Identifier: MIT
"""Runs one Python test file with the project's operators loaded: run.py FILE.

ctest sets OUNCE_OPS_LIB. Exits with 77, which ctest reports as skipped, where torch or a package that
the file reads with is missing (the light set of wheels has LibTorch only: ./ounce test installs the rest).
"""
import faulthandler
import os
import runpy
import sys

PACKAGES = ("torch", "numpy", "h5py", "safetensors", "tensorboard")


def skip(error):
    print(f"skipped: {sys.executable} cannot import what {os.path.basename(sys.argv[0])} needs: {error}")
    sys.exit(77)


if __name__ == "__main__":
    faulthandler.enable()
    sys.argv = sys.argv[1:]
    try:
        import torch
    except Exception as error:  # also one of its libraries
        skip(error)
    torch.ops.load_library(os.environ["OUNCE_OPS_LIB"])
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in PACKAGES:
            raise
        skip(error)
