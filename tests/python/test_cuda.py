# SPDX-License-Identifier: MIT
"""What the operators promise on a GPU: no step waits for the device, and a CUDA graph can hold them.

Skipped without a GPU, unless OUNCE_REQUIRE_CUDA=1. OUNCE_OPS_LIB is the path of libounce_ops.so.
"""
import os
import sys
import unittest

import torch

if not torch.cuda.is_available() and os.environ.get("OUNCE_REQUIRE_CUDA") != "1":
    print("skipped: there is no GPU")
    sys.exit(77)

torch.ops.load_library(os.environ["OUNCE_OPS_LIB"])
OPS = torch.ops.ounce


def randn(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_(grad)


def forward_and_backward(op, differentiated):
    """Outputs of op() and the gradients of their sum."""

    def call():
        outputs = [x for x in op() if x.is_floating_point() and x.numel() > 0]
        total = sum(x.sum() for x in outputs if x.requires_grad)
        return [*outputs, *torch.autograd.grad(total, differentiated)]

    return call


def cce_case(dtype, weight_dtype, **options):
    hidden, weight = randn(2, 40, 64, dtype=dtype), randn(500, 64, dtype=weight_dtype)
    bias = randn(500, dtype=weight_dtype)
    target = torch.randint(500, (2, 40), device="cuda")
    target[0, :7] = -100
    weights = torch.rand(2, 40, device="cuda"), torch.rand(500, device="cuda")
    inputs = [hidden, weight, bias]

    def op():
        return OPS.linear_cross_entropy(hidden, weight, target, bias, *weights, **options)

    return forward_and_backward(op, inputs), inputs


def gla_case(op, packed):
    n = 3 if packed else 2
    b, t = (1, 150) if packed else (2, 100)
    q, k, v = [randn(b, t, 2, d, dtype=torch.bfloat16) for d in (16, 16, 32)]
    gates, state = randn(b, t, 2, 16), randn(n, 2, 16, 32)
    cu = torch.tensor([0, 70, 70, 150], device="cuda") if packed else None
    inputs = [q, k, v, gates, state]

    def outputs():
        return op(q, k, v, gates, state, cu, gate="log_sigmoid_logits", output_final_state=True)

    return forward_and_backward(outputs, inputs), inputs


def step_case(indexed):
    q, k, v, g = [randn(2, 3, 2, d, dtype=torch.bfloat16, grad=False) for d in (16, 16, 32, 16)]
    state = randn(4 if indexed else 2, 2, 16, 32, grad=False)
    slots = torch.tensor([3, 1], device="cuda") if indexed else None

    def call():
        own = state.clone()
        return [OPS.gla_step_(q, k, v, g, own, slots, gate="log_sigmoid_logits"), own]

    return call, [q, k, v, g, state]


def norm_case(op, tensors):
    inputs = [randn(30, 48, dtype=torch.bfloat16) for _ in range(tensors)] + [randn(48)]

    def outputs():
        result = op(*inputs)
        return result if isinstance(result, tuple) else (result,)

    return forward_and_backward(outputs, inputs), inputs


def cases():
    """name -> (call, the tensors it reads)"""
    torch.manual_seed(1)
    every = dict(shift=1, label_smoothing=0.1, z_loss=1e-2, softcap=5.0, logit_scale=0.7,
                 grad_mode="filter", filter_eps=1e-9, return_correct=True, return_entropy=True,
                 empty_is_nan=True)
    general = {name: every[name] for name in every if not name.startswith(("grad_mode", "filter"))}
    return {
        "linear_cross_entropy bf16": cce_case(torch.bfloat16, torch.bfloat16),
        "linear_cross_entropy bf16, recompute": cce_case(torch.bfloat16, torch.bfloat16, recompute="always"),
        "linear_cross_entropy bf16, filter": cce_case(torch.bfloat16, torch.bfloat16, grad_mode="filter"),
        "linear_cross_entropy bf16, general": cce_case(torch.bfloat16, torch.bfloat16, **general),
        "linear_cross_entropy fp16": cce_case(torch.float16, torch.float16, **general),
        "linear_cross_entropy bf16, weight fp32": cce_case(torch.bfloat16, torch.float32, **every),
        "linear_cross_entropy fp32": cce_case(torch.float32, torch.float32, workspace_bytes=0),
        "chunk_gla": gla_case(OPS.chunk_gla, packed=False),
        "chunk_gla packed": gla_case(OPS.chunk_gla, packed=True),
        "fused_recurrent_gla": gla_case(OPS.fused_recurrent_gla, packed=False),
        "fused_recurrent_gla packed": gla_case(OPS.fused_recurrent_gla, packed=True),
        "gla_step_": step_case(indexed=False),
        "gla_step_ of slots": step_case(indexed=True),
        "rms_norm": norm_case(OPS.rms_norm, 1),
        "add_rms_norm": norm_case(OPS.add_rms_norm, 2),
    }


class Cuda(unittest.TestCase):
    def test_main_grad_of_forward(self):
        hidden = randn(300, 64, dtype=torch.bfloat16, grad=False)
        weight = randn(1000, 64, dtype=torch.bfloat16, grad=False)
        target = torch.randint(0, 1000, (300,), device="cuda")
        for grad_mode in ("exact", "filter"):
            asked = dict(gradients=[True, True, False], grad_mode=grad_mode)
            plain = OPS.linear_cross_entropy(hidden, weight, target, **asked)
            main_grad = torch.ones(1000, 64, device="cuda")
            into = OPS.linear_cross_entropy(hidden, weight, target, main_grad=main_grad, **asked)
            self.assertTrue(torch.equal(into[8], plain[8]))
            self.assertEqual(into[9].numel(), 0)
            torch.testing.assert_close((main_grad - 1).bfloat16(), plain[9], rtol=0.02, atol=1e-6)

    def test_main_grad_takes_the_exponentials_alone(self):
        tokens, dim, vocab, mib = 8192, 2304, 256000, 1 << 20
        hidden = randn(tokens, dim, dtype=torch.bfloat16, grad=False)
        weight = randn(vocab, dim, dtype=torch.bfloat16, grad=False)
        target = torch.randint(0, vocab, (tokens,), device="cuda")
        main_grad = torch.zeros(vocab, dim, device="cuda")
        for workspace, limit in ((-1, 2252), (896 * mib, 1024)):
            for _ in range(2):  # what libraries keep is theirs
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                OPS.linear_cross_entropy(hidden, weight, target, main_grad=main_grad,
                                         gradients=[True, True, False], workspace_bytes=workspace)
                taken = torch.cuda.max_memory_allocated() - before
            extra = (taken - 2 * tokens * dim) / mib  # beside the hidden state's gradient
            self.assertGreater(extra, 500)
            self.assertLess(extra, limit)

    def test_nothing_waits_for_the_device(self):
        for name, (call, _) in cases().items():
            with self.subTest(operator=name):
                call()  # libraries may wait when they are first used
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    call()
                finally:
                    torch.cuda.set_sync_debug_mode("default")

    def test_the_debug_mode_sees_a_wait(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with self.assertRaises(RuntimeError):
                torch.ones(1, device="cuda").item()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_graph_holds_them(self):
        for name, (call, inputs) in cases().items():
            with self.subTest(operator=name):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        call()
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    results = call()
                with torch.no_grad():
                    for x in inputs:
                        x.copy_(torch.randn_like(x))
                graph.replay()
                torch.cuda.synchronize()
                for replayed, expected in zip(results, call()):
                    torch.testing.assert_close(replayed, expected, rtol=1e-2, atol=1e-3)


if __name__ == "__main__":
    unittest.main()
