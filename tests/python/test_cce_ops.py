# SPDX-License-Identifier: MIT
"""torch.ops.ounce.linear_cross_entropy from Python. OUNCE_OPS_LIB names libounce_ops.so."""
import os
import unittest

import torch

torch.ops.load_library(os.environ["OUNCE_OPS_LIB"])
OP = torch.ops.ounce.linear_cross_entropy

ALL_OPTIONS = dict(
    ignore_index=3, shift=1, label_smoothing=0.1, z_loss=1e-2, softcap=5.0, logit_scale=0.7,
    grad_mode="filter", filter_eps=1e-9, return_correct=True, return_entropy=True,
    workspace_bytes=0)


def make(dtype=torch.float32, batch=2, length=5, dim=8, vocab=13, extras=True):
    torch.manual_seed(1)
    hidden = torch.randn(batch, length, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    target = torch.randint(vocab, (batch, length))
    target[0, 0] = -100
    if not extras:
        return [hidden, weight, target]
    bias = torch.randn(vocab, dtype=dtype, requires_grad=True)
    return [hidden, weight, target.abs() % vocab, bias, torch.rand(batch, length),
            torch.rand(vocab)]


class LinearCrossEntropy(unittest.TestCase):
    def test_opcheck(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            torch.library.opcheck(OP, make(dtype, extras=False))
        for reduction in ("none", "mean", "sum"):
            torch.library.opcheck(OP, make(), dict(ALL_OPTIONS, reduction=reduction))
        torch.library.opcheck(OP, make(), dict(ALL_OPTIONS, recompute="never"))
        torch.library.opcheck(OP, [t.detach() for t in make()], dict(gradients=[True, False, True]))

    def test_opcheck_of_the_backward_operator(self):
        hidden, weight, target = [t.detach() for t in make(extras=False)]
        options = dict(
            ignore_index=-100, reduction="mean", shift=0, label_smoothing=0.0, z_loss=0.0,
            softcap=0.0, logit_scale=1.0, grad_mode="exact", filter_eps=None, workspace_bytes=-1,
            deterministic=True, accum=torch.float32, implementation="auto")
        out = OP(hidden, weight, target)
        lse, nll = out[1], out[6]
        for wanted in ([True, True, False], [True, False, False], [False, True, False]):
            torch.library.opcheck(
                torch.ops.ounce.linear_cross_entropy_backward,
                (torch.ones(()), None, None, hidden, weight, target, None, None, None, lse, nll, None),
                dict(options, wanted=wanted))

    def test_gradients_made_by_forward(self):
        detached = [t.detach() for t in make()]
        early, late = make(), make()
        asked = OP(*detached, **ALL_OPTIONS, gradients=[True] * 3)[8:]
        for args, recompute in ((early, "never"), (late, "always")):
            (OP(*args, **ALL_OPTIONS, recompute=recompute)[0] * 2).backward(retain_graph=True)
        for i, gradient in zip((0, 1, 3), asked):
            self.assertTrue(torch.equal(early[i].grad, late[i].grad))
            torch.testing.assert_close(late[i].grad, 2 * gradient)
        with self.assertRaisesRegex(RuntimeError, "expected gradients of a scalar"):
            OP(*detached, reduction="none", gradients=[True, False, False])

    def test_main_grad(self):
        hidden, weight, target = make(extras=False)
        OP(hidden, weight, target)[0].backward()
        main_grad = torch.ones_like(weight)
        for args, asked in (([hidden, weight], [False] * 3), ([hidden.detach(), weight.detach()], [True, True, False])):
            out = OP(*args, target, main_grad=main_grad, gradients=asked)
            if not any(asked):
                out[0].backward()
        torch.testing.assert_close(main_grad, 1 + 2 * weight.grad)
        torch.library.opcheck(OP, make(extras=False), dict(main_grad=main_grad), test_utils="test_schema")

    def test_gradcheck(self):
        hidden, weight, target, bias, token_weight, class_weight = make(torch.float64)
        options = {k: v for k, v in ALL_OPTIONS.items() if k != "grad_mode"}

        def loss_lse_and_entropy(h, w, b):
            out = OP(h, w, target, b, token_weight, class_weight, reduction="none", **options)
            return out[0], out[1], out[7]

        self.assertTrue(torch.autograd.gradcheck(loss_lse_and_entropy, (hidden, weight, bias)))

    def test_equals_cross_entropy(self):
        hidden, weight, target = make(torch.float64, extras=False)
        expected = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1),
                                                     target.flatten())
        torch.testing.assert_close(OP(hidden, weight, target)[0], expected)

    def test_compiled_equals_eager(self):
        for options in ({}, dict(ALL_OPTIONS, reduction="none"), dict(recompute="never")):
            def step(hidden, weight, target, *rest):
                out = OP(hidden * 2, weight, target, *rest, **options)
                return out[0].sum() + out[1].square().sum() + out[7].sum()

            compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
            for length in (5, 9):
                ours, theirs = make(length=length), make(length=length)
                a, b = compiled(*ours), step(*theirs)
                a.backward()
                b.backward()
                self.assertTrue(torch.equal(a, b))
                for x, y in zip(ours[:2] + ours[3:4], theirs[:2] + theirs[3:4]):
                    self.assertTrue(torch.equal(x.grad, y.grad))

    def test_autocast(self):
        hidden, weight, target = make(extras=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = OP(hidden, weight, target)[0]
        expected = OP(hidden.bfloat16(), weight, target)[0]
        self.assertTrue(torch.equal(loss, expected))

    def test_errors_are_python_exceptions(self):
        hidden, weight, target = make(extras=False)
        with self.assertRaisesRegex(RuntimeError, "expected reduction = none, mean or sum, got 'avg'"):
            OP(hidden, weight, target, reduction="avg")
        with self.assertRaisesRegex(RuntimeError, "expected targets in"):
            OP(hidden, weight, target + 100, validate_targets=True)


if __name__ == "__main__":
    unittest.main()
