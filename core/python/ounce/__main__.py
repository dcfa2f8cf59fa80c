# SPDX-License-Identifier: MIT
import argparse
import sys

import ounce

parser = argparse.ArgumentParser(prog="python -m ounce")
choice = parser.add_mutually_exclusive_group(required=True)
choice.add_argument("--cmake-dir", action="store_true", help="folder for find_package(ounce)")
choice.add_argument("--library", action="store_true", help="path of libounce_ops.so")
arguments = parser.parse_args()
try:
    print(ounce.cmake_dir() if arguments.cmake_dir else ounce.library())
except FileNotFoundError as error:
    sys.exit(f"ounce: {error}")
