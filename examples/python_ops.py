# SPDX-License-Identifier: MIT
"""The operators from Python: a layer of gated linear attention learns to repeat the token three before.

    OUNCE_OPS_LIB=build/libounce_ops.so python3 examples/python_ops.py
"""
import os

import torch

torch.ops.load_library(os.environ["OUNCE_OPS_LIB"])
ops = torch.ops.ounce
VOCAB, HEADS, WIDTH, LAG = 32, 2, 32, 3


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, HEADS * WIDTH)
        self.position = torch.nn.Parameter(torch.randn(64, HEADS * WIDTH))
        self.qkvg = torch.nn.Linear(HEADS * WIDTH, 4 * HEADS * WIDTH)

    def forward(self, tokens, targets):
        x = ops.rms_norm(self.embed(tokens) + self.position[: tokens.size(1)])
        q, k, v, g = self.qkvg(x).unflatten(-1, (4, HEADS, WIDTH)).unbind(2)
        o, _ = ops.chunk_gla(q, k, v, torch.nn.functional.logsigmoid(g))
        return ops.linear_cross_entropy(o.flatten(2), self.embed.weight, targets)[0]  # no logits stored


torch.manual_seed(1)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(101):
    tokens = torch.randint(VOCAB, (16, 64))
    loss = model(tokens, tokens.roll(LAG, 1).index_fill(1, torch.arange(LAG), -100))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
assert loss.item() < 1.0, "it did not learn"
