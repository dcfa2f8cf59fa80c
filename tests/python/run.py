# SPDX-License-Identifier: MIT
"""Runs one Python test file with the project's operators loaded: run.py FILE.

ctest sets OUNCE_OPS_LIB. Exits with 77, which ctest reports as skipped, where torch cannot be imported
(the light set of wheels has LibTorch only: ./ounce test installs the rest).
"""
import faulthandler
import os
import runpy
import sys

if __name__ == "__main__":
    faulthandler.enable()
    try:
        import torch
    except Exception as error:
        print(f"skipped: {sys.executable} cannot import torch: {error}")
        sys.exit(77)
    torch.ops.load_library(os.environ["OUNCE_OPS_LIB"])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
