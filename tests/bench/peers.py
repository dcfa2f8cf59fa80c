# SPDX-License-Identifier: MIT
"""Times our operators beside public peers, in one process and on the same tensors.

    python3 tests/bench/peers.py [FAMILY...] [--peers NAME...] [--json FILE] [--rounds N] [--soak SECONDS] [--device D]

A GPU's speed drifts by more than many differences as it warms up. So both sides are soaked on the same
mix first, then timed in rounds of ours, peer, peer, ours, and the answer is the median over the rounds of
the ratio peer / ours (above 1: ours is faster). Inputs rotate through sets that together are larger than
the caches. Peers that are not installed, or that cannot run here, are named and left out.
"""
import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
ROTATE_BYTES = 256 << 20  # of inputs, past every cache


def load_operators():
    library = os.environ.get("OUNCE_OPS_LIB", os.path.join(ROOT, "build", "libounce_ops.so"))
    torch.ops.load_library(library)


# -- Families: shapes, inputs, and the contestants that compute the same function of them -----------


def cce_inputs(shape, device, dtype):
    n, d, v = shape
    hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, device=device) * d**-0.5).to(dtype).requires_grad_()
    return (hidden, weight), (torch.randint(0, v, (n,), device=device),)


def cce_keeping(share):
    """Logits of standard deviation 3 as a trained model has them: all tokens find the first `share` of the
    vocabulary likely, so that a filter keeps as much."""

    def inputs(shape, device, dtype):
        n, d, v = shape
        (hidden, weight), _ = cce_inputs(shape, device, dtype)
        likely = int(v * share) // 128 * 128
        with torch.no_grad():
            weight.mul_(3)
            hidden[:, 0] = 1
            weight[:, 0] = 0
            weight[likely:, 0] = -20
        return (hidden, weight), (torch.randint(0, likely, (n,), device=device),)

    return inputs


def cce_overflowing(shape, device, dtype):
    """Logits as of a classifier of unit variance, but for the sampled rows: no anchor is near a row's largest."""
    (hidden, weight), rest = cce_inputs(shape, device, dtype)
    with torch.no_grad():
        weight.mul_(shape[1] ** 0.5)
        weight[::128] = 0
    return (hidden, weight), rest


def cce_ours(**options):
    return lambda ops: lambda leaves, rest: ops.linear_cross_entropy(*leaves, *rest, **options)[0]


class Products(torch.autograd.Function):
    """Not a loss: the three products that one is made of, and nothing else."""

    @staticmethod
    def forward(ctx, hidden, weight):
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return logits.view(-1)[:1].sum()

    @staticmethod
    def backward(ctx, _):
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden


def cce_products():
    return lambda leaves, rest: Products.apply(*leaves)


def cce_eager():
    return lambda leaves, rest: F.cross_entropy((leaves[0] @ leaves[1].t()).float(), rest[0])


def cce_apple(**options):
    def make():
        from cut_cross_entropy import linear_cross_entropy

        return lambda leaves, rest: linear_cross_entropy(*leaves, *rest, **options)

    return make


def cce_quack():
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")  # its compiling processes do not ask the GPU
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda leaves, rest: chunked_linear_cross_entropy(*leaves, *rest)


def cce_liger():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(leaves, rest):
        result = LigerFusedLinearCrossEntropyFunction.apply(*leaves, *rest)
        return result[0] if isinstance(result, tuple) else result

    return run


def cce_liger_sm90():
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return lambda leaves, rest: liger_fused_linear_cross_entropy_sm90(*leaves, *rest)


def gla_inputs(shape, device, dtype):
    b, t, h, k, v = shape
    q, key = (torch.randn(b, t, h, k, device=device).to(dtype).requires_grad_() for _ in range(2))
    value = torch.randn(b, t, h, v, device=device).to(dtype).requires_grad_()
    gate = F.logsigmoid(torch.randn(b, t, h, k, device=device)) / 16
    return (q, key, value, gate.requires_grad_()), ()


def gla_ours(ops):
    return lambda leaves, rest: ops.chunk_gla(*leaves)[0]


def gla_fla():
    from fla.ops.gla import chunk_gla

    return lambda leaves, rest: chunk_gla(*leaves)[0]


def norm_inputs(shape, device, dtype):
    n, d = shape
    x = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    return (x, torch.randn(d, device=device).to(dtype).requires_grad_()), ()


def norm_ours(ops):
    return lambda leaves, rest: ops.rms_norm(*leaves, 1e-5)


def norm_eager():
    return lambda leaves, rest: F.rms_norm(leaves[0], leaves[0].shape[-1:], leaves[1], 1e-5)


def norm_liger():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda leaves, rest: LigerRMSNormFunction.apply(*leaves, 1e-5)


CCE_SHAPES = [
    (8192, 2304, 256000),
    (8192, 4096, 128256),
    (8192, 2048, 32768),
    (16384, 768, 50304),
    (8191, 2304, 256003),
]


def cce_filtered(share):
    """Everybody's filter at its default, on data of which it keeps `share`."""
    return {
        "gpu": CCE_SHAPES[:2],
        "cpu": [(1024, 128, 8192)],
        "inputs": cce_keeping(share),
        "ours": cce_ours(grad_mode="filter"),
        "peers": {
            "cuBLAS products": cce_products,
            "ours, exact": lambda: cce_ours()(torch.ops.ounce),
            "Apple CCE": cce_apple(impl="cce"),
        },
    }


FAMILIES = {
    **{f"filter-keep{percent}": cce_filtered(percent / 100) for percent in (20, 25, 50, 100)},
    "overflow": {
        "gpu": CCE_SHAPES[:1],
        "cpu": [(1024, 128, 8192)],
        "inputs": cce_overflowing,
        "ours": cce_ours(),
        "peers": {"cuBLAS products": cce_products},
    },
    "cce": {
        "gpu": CCE_SHAPES,
        "cpu": [(1024, 128, 8192)],
        "inputs": cce_inputs,
        "ours": cce_ours(),
        "peers": {
            "cuBLAS products": cce_products,
            "ours, recompute": lambda: cce_ours(recompute="always")(torch.ops.ounce),
            "torch eager": cce_eager,
            "Apple CCE": cce_apple(impl="cce"),
            "Apple CCE, no filter": cce_apple(impl="cce", filter_eps=None),
            "Apple torch_compile": cce_apple(impl="torch_compile"),
            "QuACK": cce_quack,
            "Liger SM90": cce_liger_sm90,
            "Liger": cce_liger,
        },
    },
    "gla": {
        "gpu": [(8, 2048, 4, 256, 512), (8, 4096, 8, 128, 128), (1, 16384, 16, 64, 64)],
        "cpu": [(1, 512, 2, 32, 64)],
        "inputs": gla_inputs,
        "ours": gla_ours,
        "peers": {"fla chunk_gla": gla_fla},
    },
    "norm": {
        "gpu": [(16384, 2048)],
        "cpu": [(4096, 512)],
        "inputs": norm_inputs,
        "ours": norm_ours,
        "peers": {"torch eager": norm_eager, "Liger": norm_liger},
    },
}

# -- Timing ----------------------------------------------------------------------------------------


class Contest:
    """Two functions over the same rotating inputs."""

    def __init__(self, family, shape, device, dtype, backward):
        self.device, self.backward = device, backward
        self.sets = [family["inputs"](shape, device, dtype)]
        leaves, rest = self.sets[0]
        size = sum(t.nbytes for t in (*leaves, *rest))
        for _ in range(min(7, ROTATE_BYTES // max(size, 1))):
            self.sets.append(family["inputs"](shape, device, dtype))
        self.turn = 0
        self.gradient = None

    def run(self, function):
        leaves, rest = self.sets[self.turn % len(self.sets)]
        self.turn += 1
        if not self.backward:
            with torch.no_grad():
                return function(leaves, rest)
        result = function(leaves, rest)
        if self.gradient is None or self.gradient.shape != result.shape:
            # A loss's own gradient is 1.
            self.gradient = torch.randn_like(result) if result.dim() else torch.ones_like(result)
        torch.autograd.grad(result, leaves, self.gradient.to(result.dtype))
        return result

    def seconds(self, function, calls):
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                self.run(function)
            return (time.perf_counter() - start) / calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            self.run(function)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def peak_bytes(self, function):
        if self.device.type != "cuda":
            return None
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run(function)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def rounds(self, ours, peer, rounds, soak):
        slow = max(self.seconds(ours, 1), self.seconds(peer, 1))
        calls = max(1, min(20, int(0.02 / slow)))
        end = time.perf_counter() + soak
        while time.perf_counter() < end:
            self.seconds(ours, calls)
            self.seconds(peer, calls)
        times = []
        for _ in range(rounds):
            first = self.seconds(ours, calls)
            between = self.seconds(peer, calls) + self.seconds(peer, calls)
            times.append(((first + self.seconds(ours, calls)) / 2, between / 2))
        return times


def clock(device):
    """SM clock in MHz, or None."""
    if device.type != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-i", str(device.index or 0)]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return None


def machine(device):
    commit = os.environ.get("OUNCE_COMMIT") or subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    with open("/proc/cpuinfo") as lines:
        name = next((x.split(": ", 1)[1].strip() for x in lines if x.startswith("model name")), "CPU")
    driver = ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.split("\n")[0]
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "threads": torch.get_num_threads(),
    }


def compare(family, name, peer, shape, device, dtype, arguments, backward):
    ours = family["ours"](torch.ops.ounce)
    contest = Contest(family, shape, device, dtype, backward)
    difference = None
    if name != "cuBLAS products":
        with torch.no_grad():
            pair = ours(*contest.sets[0]).float(), peer(*contest.sets[0]).float()
        difference = ((pair[0] - pair[1]).norm() / pair[1].norm().clamp_min(1e-30)).item()
    times = contest.rounds(ours, peer, arguments.rounds, arguments.soak)
    return {
        "t": "peers",
        "peer": name,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "forward + backward" if backward else "forward",
        "ours_ms": statistics.median(t[0] for t in times) * 1e3,
        "peer_ms": statistics.median(t[1] for t in times) * 1e3,
        "ratio": statistics.median(t[1] / t[0] for t in times),
        "rounds": len(times),
        "ours_peak_bytes": contest.peak_bytes(ours),
        "peer_peak_bytes": contest.peak_bytes(peer),
        "difference": difference,
        "sm_clock_mhz": clock(device),
    }


def run_family(key, device, arguments, where, out):
    family = FAMILIES[key]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peers = {}
    for name, make in family["peers"].items():
        if arguments.peers and name not in arguments.peers:
            continue
        try:
            peers[name] = make()
        except Exception as error:  # an import of someone else's package may fail in any way
            print(f"{key}: {name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    for shape in family["gpu" if device.type == "cuda" else "cpu"]:
        for name, peer in peers.items():
            for backward in (False, True):
                torch.manual_seed(1)
                try:
                    row = {"family": key, **compare(family, name, peer, shape, device, dtype, arguments, backward)}
                except Exception as error:
                    print(f"{key}: {name} at {shape} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
                    break
                finally:
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                print(
                    f"{key:5} {name:22} {'x'.join(map(str, shape)):22} {row['pass']:18} ours {row['ours_ms']:9.3f} ms"
                    f"  peer {row['peer_ms']:9.3f} ms  peer/ours {row['ratio']:6.3f}"
                    + ("" if row["difference"] is None else f"  differ by {row['difference']:.1e}"),
                    flush=True,
                )
                if out:
                    out.write(json.dumps({**row, **where}) + "\n")
                    out.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="default: " + " ".join(FAMILIES))
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--json", help="append a JSON object a row to this file")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--soak", type=float, default=2.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for key in arguments.family:
        if key not in FAMILIES:
            parser.error(f"no family '{key}'; known: {', '.join(FAMILIES)}")
    load_operators()
    device = torch.device(arguments.device)
    where = machine(device)
    if arguments.json and not where["commit"]:
        parser.error("git knows no commit to write beside the results of --json; set OUNCE_COMMIT")
    print(f"{where['device']}, torch {where['torch']}, commit {where['commit'] or 'unknown'}")
    out = open(arguments.json, "a") if arguments.json else None
    for key in arguments.family or FAMILIES:
        run_family(key, device, arguments, where, out)


if __name__ == "__main__":
    sys.exit(main())
