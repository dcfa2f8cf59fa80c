# SPDX-License-Identifier: MIT
"""Times public optimizers on the matrices of `ounce bench optim`, beside torch's fused AdamW.

    python3 tests/bench/peers_optim.py [--json FILE] [--rounds N]

Both programs time the same fused AdamW kernel in every round: their rows compare by `of_torch`.
"""
import argparse
import json
import statistics

import torch

from peers import machine


def model(layers=24, width=2048, inner=5632):
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    parameters = []
    for shape in shapes * layers:
        p = torch.nn.Parameter(torch.randn(shape, device="cuda").mul_(0.02).bfloat16())
        p.grad = torch.randn(shape, device="cuda").mul_(1e-3).bfloat16()
        parameters.append(p)
    return parameters


def peers(parameters):
    yield "torch fused AdamW", lambda: torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    yield "torch foreach AdamW", lambda: torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    yield "torch Muon", lambda: torch.optim.Muon(parameters, lr=1e-4)


def seconds(step):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(1)
    parameters = model()
    optimizers, state, times = {}, {}, {}
    for name, make in peers(parameters):
        before = torch.cuda.memory_allocated()
        optimizers[name] = make()
        optimizers[name].step()
        state[name] = torch.cuda.memory_allocated() - before
        times[name] = []
    for _ in range(arguments.rounds):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))
    torch_ms = statistics.median(times["torch fused AdamW"])
    where = machine(torch.device("cuda"))
    for name, values in times.items():
        ms = statistics.median(values)
        print(f"optim    {name:26} {ms:9.3f} ms  / torch {ms / torch_ms:7.3f}  state {state[name] / 2**20:8.1f} MiB")
        row = {"t": "optim-peer", "optimizer": name, "matrices": len(parameters), "ms": ms,
               "torch_ms": torch_ms, "of_torch": ms / torch_ms, "state_bytes": state[name],
               "rounds": len(values), **where}
        if arguments.json:
            with open(arguments.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
