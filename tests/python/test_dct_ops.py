# SPDX-License-Identifier: MIT
"""torch.ops.ounce.{dct_basis, dct_rank, ...} from Python. OUNCE_OPS_LIB names libounce_ops.so."""
import os
import unittest

import torch

torch.ops.load_library(os.environ["OUNCE_OPS_LIB"])
OPS = torch.ops.ounce


class Dct(unittest.TestCase):
    def test_opcheck(self):
        torch.manual_seed(1)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            g = torch.randn(12, 8, dtype=dtype)
            indices, _ = OPS.dct_select(g, 3)
            torch.library.opcheck(OPS.dct_project, (g, indices))
            torch.library.opcheck(OPS.dct_backproject, (OPS.dct_project(g, indices), indices, 8, "right"))
            torch.library.opcheck(OPS.newton_schulz, (g, 2))
            torch.library.opcheck(OPS.dct_rank, (g, "left", 1))
            torch.library.opcheck(OPS.dct_select, (g, 3))

    def test_autocast_keeps_their_precision(self):
        g = torch.randn(32, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = OPS.dct_rank(g), OPS.newton_schulz(g)
        self.assertTrue(torch.equal(inside[0], OPS.dct_rank(g)))
        self.assertTrue(torch.equal(inside[1], OPS.newton_schulz(g)))

    def test_basis(self):
        basis = OPS.dct_basis(8, "dct3", dtype=torch.float64)
        torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64))
        self.assertEqual(OPS.dct_basis(4).dtype, torch.float32)
        with self.assertRaisesRegex(RuntimeError, "expected basis = dct2, dct3"):
            OPS.dct_basis(8, "fourier")


if __name__ == "__main__":
    unittest.main()
