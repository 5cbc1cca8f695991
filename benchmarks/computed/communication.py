"""Compute the bytes that 8 GPUs exchange in a training step of each recipe, and the time. Nothing is measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from golf_kernels.sharding import assign
from train.common.distributed import MICRO_BATCHES
from train.config import Config
from train.model.gpt import GPT
from train.optimize.groups import split_parameters
from train.recipes import load_recipe, recipe_names

# GB/s of an H100 SXM's NVLink in one direction, and the fraction of it that collectives of tens of megabytes reach
LINK_GBPS = 450.0
REACHED = 0.75
# bytes per number: gradients and weights are sent in float32
WIDTH = 4


def link_ms(sent: float) -> float:
    return sent / (LINK_GBPS * REACHED * 1e6)


def exchanged_bytes(config: Config, ranks: int = MICRO_BATCHES) -> dict[str, float]:
    """Returns collective → the bytes that one of W ranks sends in a step.

    Reduce-scatter and all-gather send (W - 1) / W of a buffer, all-reduce twice as much.
    """
    with torch.device("meta"):
        kinds = split_parameters(GPT(config), config)
    shapes = tuple((matrix.shape[0], matrix.shape[1]) for matrix in kinds["matrix"].values())
    sizes = [0] * ranks
    for (rows, columns), owner in zip(shapes, assign(shapes, ranks), strict=True):
        sizes[owner] += rows * columns
    # all shards of the buffer are padded to the length of the longest one
    matrices = (ranks - 1) * max(sizes) * WIDTH
    rest = sum(parameter.numel() for kind in ("embedding", "scalar") for parameter in kinds[kind].values())
    return {
        "reduce-scatter of matrices": matrices,
        "all-gather of matrices": matrices,
        "all-reduce of the rest": 2 * (ranks - 1) / ranks * rest * WIDTH,
    }


def table() -> str:
    columns = ["recipe", "reduce-scatter MB", "all-gather MB", "all-reduce MB", "ms, computed"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name in recipe_names():
        sent = exchanged_bytes(load_recipe(name).config())
        megabytes = [f"{value / 1e6:.1f}" for value in sent.values()]
        cells = [f"`{name}`", *megabytes, f"{link_ms(sum(sent.values())):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.computed.communication", description=__doc__)
    parser.parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
