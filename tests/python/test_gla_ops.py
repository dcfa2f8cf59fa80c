# SPDX-License-Identifier: MIT
"""torch.ops.ounce.{chunk_gla, fused_recurrent_gla, gla_step_, naive_recurrent_gla}: opcheck and torch.compile.

OUNCE_OPS_LIB is the path of libounce_ops.so.
"""

import os
import unittest

import torch
import torch.nn.functional as F

torch.ops.load_library(os.environ["OUNCE_OPS_LIB"])
OPS = torch.ops.ounce


def tensors(b, t, hq, hk, hv, k, v, n=None, dtype=torch.double, grad=True):
    q = torch.randn(b, t, hq, k, dtype=dtype)
    key = torch.randn(b, t, hk, k, dtype=dtype)
    value = torch.randn(b, t, hv, v, dtype=dtype)
    g = F.logsigmoid(torch.randn(b, t, hk, k, dtype=dtype))
    state = torch.randn(b if n is None else n, hv, k, v, dtype=dtype)
    return [x.requires_grad_(grad) for x in (q, key, value, g, state)]


class Opcheck(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(3)

    def test_forward_operators(self):
        for op in (OPS.chunk_gla.default, OPS.fused_recurrent_gla.default):
            q, k, v, g, h0 = tensors(2, 5, 4, 2, 2, 8, 6)
            torch.library.opcheck(op, (q, k, v, g, h0), {"output_final_state": True})
            torch.library.opcheck(op, (q, k, v, g), {"gate": "log_sigmoid_logits", "reverse": True})
            q, k, v, g, h0 = tensors(1, 9, 2, 2, 4, 8, 6, n=3)
            cu = torch.tensor([0, 4, 4, 9])
            torch.library.opcheck(op, (q, k, v, g, h0, cu), {"output_final_state": True})

    def test_the_definition(self):
        q, k, v, g, h0 = tensors(1, 9, 2, 2, 4, 8, 6, n=3)
        args = (q, k, v, g, h0, torch.tensor([0, 4, 4, 9]))
        options = {"output_final_state": True}
        torch.library.opcheck(OPS.naive_recurrent_gla.default, args, options,
                              test_utils=("test_schema", "test_faketensor"))
        for a, b in zip(OPS.naive_recurrent_gla(*args, **options), OPS.chunk_gla(*args, **options)):
            torch.testing.assert_close(a, b)
        o, _ = OPS.naive_recurrent_gla(q, k, v, g)
        (d,) = torch.autograd.grad((o * o).sum(), q, create_graph=True)
        d.square().sum().backward()
        self.assertTrue(g.grad.abs().max() > 0)

    def test_backward_operator(self):
        q, k, v, g, h0 = tensors(2, 7, 2, 2, 2, 8, 6)
        do, dh = torch.randn(2, 7, 2, 6, dtype=torch.double), torch.randn_like(h0)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            OPS.chunk_gla_backward.default, (do, dh, q, k, v, g, h0), test_utils=checks)

    def test_step_operator(self):
        q, k, v, g, h0 = tensors(2, 3, 2, 2, 2, 8, 6, n=4, grad=False)
        slots = torch.tensor([2, 0])
        torch.library.opcheck(OPS.gla_step_.default, (q, k, v, g, h0, slots))

    def test_meta(self):
        args = [x.detach().to("meta") for x in tensors(2, 5, 4, 2, 2, 8, 6)[:4]]
        o, state = OPS.chunk_gla(*args, output_final_state=True, state_layout="vk")
        self.assertEqual((2, 5, 4, 6), tuple(o.shape))
        self.assertEqual((2, 2, 6, 8), tuple(state.shape))


class Compile(unittest.TestCase):
    def test_equals_eager_at_several_lengths(self):
        torch.manual_seed(4)

        def layer(q, k, v, g, h0):
            o, state = OPS.chunk_gla(q * 2, k, v, F.logsigmoid(g), h0, output_final_state=True)
            return o.sin(), state

        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for t in (33, 70, 7):
            args = tensors(2, t, 4, 2, 2, 8, 6)
            results = []
            for f in (layer, compiled):
                o, state = f(*args)
                torch.manual_seed(5)
                loss = (o * torch.randn_like(o)).sum() + (state * torch.randn_like(state)).sum()
                results.append((o, state, *torch.autograd.grad(loss, args)))
            for a, b in zip(*results):
                torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_step_in_place(self):
        q, k, v, g, h0 = tensors(2, 1, 2, 2, 2, 8, 6, grad=False)

        def step(q, k, v, g, state):
            return OPS.gla_step_(q, k, v, g, state) + 1

        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        a, b = h0.clone(), h0.clone()
        torch.testing.assert_close(step(q, k, v, g, a), compiled(q, k, v, g, b), rtol=0, atol=0)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        self.assertFalse(torch.equal(a, h0))


class Autocast(unittest.TestCase):
    def test_casts_q_k_v_alone(self):
        q, k, v, g, h0 = tensors(2, 9, 2, 2, 2, 8, 6, dtype=torch.float)
        with torch.autocast("cpu", torch.bfloat16):
            o, state = OPS.chunk_gla(q, k, v, g, h0, output_final_state=True)
            step = OPS.gla_step_(*[x.detach()[:, :1] for x in (q, k, v, g)], h0.detach().clone())
            defined, _ = OPS.naive_recurrent_gla(q, k, v, g, h0)
        self.assertEqual((torch.bfloat16, torch.float, torch.bfloat16, torch.bfloat16),
                         (o.dtype, state.dtype, step.dtype, defined.dtype))
        (o.float().sum() + state.sum()).backward()
        self.assertEqual({torch.float}, {x.grad.dtype for x in (q, k, v, g, h0)})


class Errors(unittest.TestCase):
    def test_messages(self):
        q, k, v, g, h0 = tensors(2, 5, 2, 2, 2, 8, 6)
        with self.assertRaisesRegex(RuntimeError, r"\[chunk_gla\] expected gate log_decay"):
            OPS.chunk_gla(q, k, v, g, gate="sigmoid")
        with self.assertRaisesRegex(RuntimeError, r"\[gla_step_\] expected inputs without gradients"):
            OPS.gla_step_(q, k, v, g, h0)
        o, _ = OPS.chunk_gla(q, k, v, g)
        (d,) = torch.autograd.grad((o * o).sum(), q, create_graph=True)
        with self.assertRaisesRegex(RuntimeError, "double backward"):
            d.sum().backward()


if __name__ == "__main__":
    unittest.main()
