# SPDX-License-Identifier: MIT
"""torch.ops.ounce.{rms_norm, add_rms_norm} from Python. OUNCE_OPS_LIB names libounce_ops.so."""
import os
import unittest

import torch

torch.ops.load_library(os.environ["OUNCE_OPS_LIB"])
OPS = torch.ops.ounce


def make(dtype=torch.float32, tokens=6, dim=8):
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True)
            for shape in ((2, tokens, dim), (2, tokens, dim), (dim,))]


class Norm(unittest.TestCase):
    def test_opcheck(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, delta, weight = make(dtype)
            torch.library.opcheck(OPS.rms_norm, (x, weight, 1e-3))
            torch.library.opcheck(OPS.rms_norm, (x,))
            torch.library.opcheck(OPS.add_rms_norm, (x, delta, weight))
            torch.library.opcheck(OPS.add_rms_norm, (x.float().detach().requires_grad_(), delta))
        x, delta, weight = [t.detach() for t in make()]
        for wanted in ([True, True], [True, False], [False, True]):
            torch.library.opcheck(OPS.rms_norm_backward, (delta, x, weight, 1e-5, None, wanted))
            torch.library.opcheck(OPS.rms_norm_backward, (delta, x, weight, 1e-5, x, wanted))

    def test_gradcheck(self):
        x, delta, weight = make(torch.float64)
        self.assertTrue(torch.autograd.gradcheck(OPS.rms_norm, (x, weight)))
        self.assertTrue(torch.autograd.gradcheck(OPS.add_rms_norm, (x, delta, weight)))

    def test_equals_torch(self):
        x, _, weight = make(torch.float64)
        expected = torch.nn.functional.rms_norm(x, (8,), weight, eps=1e-5)
        torch.testing.assert_close(OPS.rms_norm(x, weight), expected)

    def test_compiled_equals_eager(self):
        def step(x, delta, weight):
            total, normed = OPS.add_rms_norm(x * 2, delta, weight)
            return (OPS.rms_norm(normed, weight) * total).sum()

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
        for tokens in (6, 11):
            ours, theirs = make(tokens=tokens), make(tokens=tokens)
            a, b = compiled(*ours), step(*theirs)
            a.backward()
            b.backward()
            self.assertTrue(torch.equal(a, b))
            for x, y in zip(ours, theirs):
                self.assertTrue(torch.equal(x.grad, y.grad))


if __name__ == "__main__":
    unittest.main()
