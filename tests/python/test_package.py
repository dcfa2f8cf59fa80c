# SPDX-License-Identifier: MIT
"""The Python package: `import ounce` loads the operators, `python -m ounce` says where things are."""
import os
import subprocess
import sys
import unittest

import torch

PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../core/python")


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

    def test_every_operator_has_a_meta_and_an_autograd_kernel(self):
        names = {
            name.split(".")[0]
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("ounce::")
        }
        self.assertTrue(names, "the library registers no operator")
        for name in sorted(names):
            with self.subTest(operator=name):
                for key in ("Meta", "CPU"):
                    self.assertTrue(
                        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
                        or torch._C._dispatch_has_kernel_for_dispatch_key(
                            name, "CompositeExplicitAutograd"
                        ),
                        f"{name} has no kernel for {key}",
                    )

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
