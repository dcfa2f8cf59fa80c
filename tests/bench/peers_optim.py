# SPDX-License-Identifier: MIT
"""Times public optimizers on the matrices of `ounce bench optim`, beside torch's fused AdamW.

    python3 tests/bench/peers_optim.py [--json FILE] [--rounds N] [--only TEXT...] [--peers DIR]

Both programs time the same fused AdamW kernel in every round: their rows compare by `of_torch`.

The low-rank ones have rank 256, weights and gradients are the same before every step, and all steps are warmed
up until none gets faster (those of dion compile for minutes). DCTAdamW and GaLore are in requirements.txt; two
have no package: DIR, where given, holds their checkouts, as in

    git clone https://github.com/microsoft/dion DIR/dion          # 0a059a4
    git clone https://github.com/IST-DASLab/LDAdam DIR/LDAdam     # f3c5daf

(and may hold ISTA-DASLab-Optimizers, 4c98e6e, the code of the package's 1.1.15). An optimizer that is not
installed, or that cannot run here, is named and left out.

GaLore takes the SVD of every gradient each 200 steps. Its row has the step between two such refreshes
(`step_ms`), the refresh (`refresh_ms`: two matrices of each shape are timed and scaled to all) and as `ms` what
a step costs on average.
"""
import argparse
import collections
import contextlib
import importlib.util
import io
import json
import os
import statistics
import sys
import time

import torch

from peers import machine

BASE = "torch fused AdamW"
RANK, REFRESH = 256, 200
USUAL = {"lr": 1e-4, "weight_decay": 0.01}


def model(layers=24, width=2048, inner=5632):
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    parameters = []
    for shape in shapes * layers:
        p = torch.nn.Parameter(torch.randn(shape, device="cuda").mul_(0.02).bfloat16())
        p.grad = torch.randn(shape, device="cuda").mul_(1e-3).bfloat16()
        parameters.append(p)
    return parameters


def bare(name):
    """Lets us import a package's modules without its __init__, which imports extensions that they do not use."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"no package {name}")
        sys.modules[name] = importlib.util.module_from_spec(spec)


def dct_adamw(parameters, **options):
    bare("ista_daslab_optimizers")
    from ista_daslab_optimizers.fft_low_rank.dct_adamw import DCTAdamW

    return DCTAdamW(parameters, rank=RANK, proj="dct", **USUAL, **options)


def galore(parameters):
    bare("galore_torch")
    from galore_torch.adamw import AdamW
    from galore_torch.galore_projector import GaLoreProjector

    settings = {"rank": RANK, "update_proj_gap": REFRESH, "scale": 0.25, "proj_type": "std"}
    optimizer = AdamW([{"params": parameters, **settings}], **USUAL, no_deprecation_warning=True)
    # Every matrix gets the projection of the last one of its shape, as if its own SVD had been taken.
    same, optimizer.refresh_ms, optimizer.refresh_matrices = collections.defaultdict(list), 0, 0
    for p in parameters:
        same[p.shape].append(p)
    for alike in same.values():
        projector = GaLoreProjector(**settings)
        times = [milliseconds(lambda: projector.project(p.grad, 0)) for p in alike[:3]][1:]
        optimizer.refresh_ms += statistics.mean(times) * len(alike)
        optimizer.refresh_matrices += len(times)
        for p in alike:
            own = GaLoreProjector(**settings)
            own.ortho_matrix = projector.ortho_matrix.clone()
            optimizer.state[p].update(projector=own, step=1)
    return optimizer


def ldadamw(parameters):
    from ldadamw_torch import LDAdamW

    groups = [{"params": parameters, "enable_lowrank": True}]
    optimizer = LDAdamW(groups, rank=RANK, **USUAL)
    for state in optimizer.state.values():
        state["use_svd_lowrank"] = True  # in the first step, which takes 168 SVDs; the later steps take none
    return optimizer


def dion(parameters):
    from dion import Dion

    return Dion(parameters, rank_fraction=1 / 8, **USUAL)


def dion_muon(parameters):
    from dion import Muon

    return Muon(parameters, **USUAL)


PEERS = {
    BASE: lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "torch foreach AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "torch Muon": lambda p: torch.optim.Muon(p, lr=1e-4),
    "ISTA DCTAdamW": dct_adamw,
    "ISTA DCTAdamW, rotation": lambda p: dct_adamw(p, rotate_subspace=True),
    "ISTA DCTAdamW, 8-bit EF": lambda p: dct_adamw(p, use_ef=True, q_ef=8),
    "GaLore AdamW": galore,
    "LDAdamW": ldadamw,
    "Dion": dion,
    "dion Muon": dion_muon,
}


def milliseconds(step):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names; the fused AdamW is always timed")
    parser.add_argument("--peers", help="folder with checkouts of those that have no package")
    arguments = parser.parse_args()
    if arguments.peers:
        sys.path += [folder.path for folder in os.scandir(arguments.peers) if folder.is_dir()]
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")  # those with fp32 products (dion, GaLore) may use TF32
    parameters = model()
    tensors = [p.detach() for p in parameters] + [p.grad for p in parameters]
    start = [x.clone() for x in tensors]
    tensors[0] @ tensors[0]  # cuBLAS's workspace is no optimizer's state

    def timed_step(name):
        torch._foreach_copy_(tensors, start)  # some optimizers write into the gradients
        torch.cuda.synchronize()
        return milliseconds(optimizers[name].step)

    optimizers, state, times = {}, {}, {}
    for name, make in PEERS.items():
        if name != BASE and not any(text in name for text in arguments.only):
            continue
        before, began = torch.cuda.memory_allocated(), time.monotonic()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                optimizers[name] = make(parameters)
                warm = [timed_step(name)]
                state[name] = torch.cuda.memory_allocated() - before
                while len(warm) < 4 or (min(warm[-2:]) < 0.9 * min(warm[:-2]) and len(warm) < 30):
                    warm.append(timed_step(name))
                if not all(p.isfinite().all() for p in parameters):
                    raise ArithmeticError("its step is not finite")
            times[name] = []
            print(f"optim    {name:26} is warm after {time.monotonic() - began:.0f} s, {len(warm)} steps", flush=True)
        except Exception as error:  # someone else's package may fail in any way
            optimizers.pop(name, None)
            why = (str(error).splitlines() or [""])[0]
            print(f"optim    {name:26} is left out: {type(error).__name__}: {why}", flush=True)
    for _ in range(arguments.rounds):
        for name in times:
            times[name].append(timed_step(name))
    torch_ms = statistics.median(times[BASE])
    where = machine(torch.device("cuda"))
    for name, values in times.items():
        ms, more, note = statistics.median(values), {}, ""
        if hasattr(optimizers[name], "refresh_ms"):
            refresh, matrices = optimizers[name].refresh_ms, optimizers[name].refresh_matrices
            more = {"step_ms": ms, "refresh_ms": refresh, "refresh_every": REFRESH, "refresh_matrices": matrices}
            note = f"  = {ms:.3f} + {refresh:.0f} / {REFRESH}, a refresh as of {matrices} matrices"
            ms += refresh / REFRESH
        mib = state[name] / 2**20
        print(f"optim    {name:26} {ms:9.3f} ms  / torch {ms / torch_ms:7.3f}  state {mib:8.1f} MiB{note}")
        row = {"t": "optim-peer", "optimizer": name, "matrices": len(parameters), "ms": ms,
               "torch_ms": torch_ms, "of_torch": ms / torch_ms, "state_bytes": state[name],
               "rounds": len(values), **more, **where}
        if arguments.json:
            with open(arguments.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
