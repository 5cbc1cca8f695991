"""What 8 GPUs exchange in a step of each recipe, on paper: bytes from the recipe, time from a link's rate. Computed, not measured."""

from __future__ import annotations

import sys

import torch

from golf_kernels.sharding import assign
from train.config import MICRO_BATCHES, Config
from train.model.gpt import GPT
from train.optimize.groups import split_parameters
from train.recipes import load_recipe, recipe_names

# NVLink of an H100 SXM, one direction; collectives of tens of megabytes reach about three quarters of it
LINK_GBPS = 450.0
REACHED = 0.75


def exchanged_bytes(config: Config, ranks: int = MICRO_BATCHES) -> dict[str, float]:
    """Bytes that one rank sends in a step, by collective.

    Reduce-scatter and all-gather send (W - 1) / W of the whole buffer, an all-reduce twice that; the matrices' buffer
    has as much room for every rank as the fullest one needs.
    """
    with torch.device("meta"):
        model = GPT(config)
    kinds = split_parameters(model, config)
    matrices = list(kinds["matrix"].values())
    owners = assign(tuple(tuple(matrix.shape) for matrix in matrices), ranks)
    shares = [
        sum(m.numel() for m, owner in zip(matrices, owners, strict=True) if owner == rank) for rank in range(ranks)
    ]
    width = matrices[0].element_size()
    rest = [parameter for kind in ("embedding", "scalar") for parameter in kinds[kind].values()]
    sent = (ranks - 1) / ranks
    return {
        "reduce-scatter of matrices": sent * ranks * max(shares) * width,
        "all-gather of matrices": sent * ranks * max(shares) * width,
        "all-reduce of the rest": 2 * sent * sum(parameter.numel() for parameter in rest) * 4,
    }


def table() -> str:
    """Megabytes and milliseconds of every recipe, as Markdown."""
    lines = [
        "| recipe | " + " | ".join(["reduce-scatter MB", "all-gather MB", "all-reduce MB", "ms, computed"]) + " |",
        "|---|---|---|---|---|",
    ]
    for name in recipe_names():
        sent = exchanged_bytes(load_recipe(name).config())
        megabytes = " | ".join(f"{value / 1e6:.1f}" for value in sent.values())
        lines.append(f"| `{name}` | {megabytes} | {sum(sent.values()) / (LINK_GBPS * REACHED * 1e6):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    sys.exit()
