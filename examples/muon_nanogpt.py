"""Muon in a nanoGPT-like script: trains a small GPT on bytes of Python's standard library for 20 steps.

    python examples/muon_nanogpt.py
    python examples/muon_nanogpt.py --optimizer adamw

It takes seconds on a CPU. Only `make_optimizers` differs from a script that uses AdamW alone: Muon trains the matrices
in the blocks, AdamW all other parameters.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import golf_kernels

VOCABULARY, WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 256, 64, 4, 2, 64, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(F.rms_norm(x, (WIDTH,))).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, length, head width)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        x = x + self.down(F.relu(self.up(F.rms_norm(x, (WIDTH,)))).square())
        return x


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(F.rms_norm(x, (WIDTH,)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizers(model: GPT, name: str) -> list[torch.optim.Optimizer]:
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))]
    matrices = list(model.blocks.parameters())
    rest = [*model.tokens.parameters(), *model.positions.parameters(), *model.head.parameters()]
    return [
        golf_kernels.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95)),
    ]


def text() -> Tensor:
    """The bytes of a few modules of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join((folder / name).read_bytes() for name in ("argparse.py", "ast.py", "inspect.py", "typing.py"))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().to(torch.get_default_device())


def train(steps: int = 20, optimizer: str = "muon", seed: int = 1337) -> list[float]:
    """Trains a new model. Returns each step's loss in nats per byte."""
    torch.manual_seed(seed)
    data, model = text(), GPT()
    optimizers = make_optimizers(model, optimizer)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH,))
        window = torch.stack([data[start : start + CONTEXT + 1] for start in starts])  # (batch, context + 1)
        loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}/{steps} loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    arguments = parser.parse_args()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    train(arguments.steps, arguments.optimizer)
