# SPDX-License-Identifier: MIT
"""The Python package: `import ounce` loads the operators, `python -m ounce` says where things are."""
import os
import subprocess
import sys
import unittest

import torch

PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../core/python")

# What an operator need not have, and why. Autocast is for calls of users.
COMPOSED = "ounce::naive_recurrent_gla"  # from differentiable operators, which have all of it
# Of optimizers: no derivative, and their own precision inside autocast.
OPTIM = [f"ounce::{name}" for name in ("dct_basis", "dct_rank", "dct_select", "dct_project", "dct_backproject", "newton_schulz")]
WITHOUT = {
    ("ounce::linear_cross_entropy_backward", "Autocast"),  # its kernel switches it off
    ("ounce::rounded_gradient", "Autograd"),  # called by a backward that makes no graph
    ("ounce::rounded_gradient", "Autocast"),
    ("ounce::scale_gradient_", "Autograd"),
    ("ounce::scale_gradient_", "Autocast"),
    (COMPOSED, "CPU"),
    (COMPOSED, "CUDA"),
    (COMPOSED, "Meta"),
    (COMPOSED, "Autograd"),
    *((name, key) for name in OPTIM for key in ("Autograd", "Autocast")),
    *(("ounce::dct_basis", key) for key in ("CPU", "CUDA", "Meta")),  # has no tensor to go by
}


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": PACKAGE, **environment},
        capture_output=True,
        text=True,
    )


class Package(unittest.TestCase):
    def test_import_loads_the_operators(self):
        program = "import ounce; print(ounce.library()); print(ounce.ops is __import__('torch').ops.ounce)"
        done = python("-c", program)
        self.assertEqual(done.returncode, 0, done.stderr)
        library, same = done.stdout.split("\n")[:2]
        self.assertEqual(os.path.realpath(library), os.path.realpath(os.environ["OUNCE_OPS_LIB"]))
        self.assertEqual(same, "True")

    def test_every_operator_has_its_kernels(self):
        names = {
            name.split(".")[0]
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("ounce::")
        }
        self.assertTrue(names, "the library registers no operator")
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        aliases = {
            "CPU": ("CompositeExplicitAutograd",),
            "CUDA": ("CompositeExplicitAutograd",),
            "AutogradCPU": ("Autograd",),
            "AutogradCUDA": ("Autograd",),
        }
        for name in sorted(names):
            for key in ("CPU", "CUDA", "Meta", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"):
                if (name, key[:8]) in WITHOUT:
                    continue
                with self.subTest(operator=name, key=key):
                    self.assertTrue(any(has(name, k) for k in (key, *aliases.get(key, ()))),
                                    f"{name} has no kernel for {key}")

    def test_missing_library_is_one_clear_line(self):
        done = python("-c", "import ounce", OUNCE_OPS_LIB="/nonexistent/libounce_ops.so")
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("/nonexistent/libounce_ops.so", done.stderr.strip().split("\n")[-1])

    def test_command_line(self):
        done = python("-m", "ounce", "--library")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(done.stdout.strip().endswith("libounce_ops.so"))
        self.assertEqual(python("-m", "ounce", "--bogus").returncode, 2)


if __name__ == "__main__":
    unittest.main()
