"""What 8 GPUs exchange in a step of each recipe, on paper: bytes from the recipe, time from a link's rate. Computed, not measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from golf_kernels.sharding import assign
from train.config import MICRO_BATCHES, Config
from train.model.gpt import GPT
from train.optimize.groups import split_parameters
from train.optimize.overlap import cut, spread
from train.recipes import load_recipe, recipe_names

# NVLink of an H100 SXM, one direction; collectives of tens of megabytes reach about three quarters of it
LINK_GBPS = 450.0
REACHED = 0.75
# gradients and weights travel in float32
WIDTH = 4


def link_ms(sent: float) -> float:
    """Milliseconds that so many bytes from one rank take."""
    return sent / (LINK_GBPS * REACHED * 1e6)


def exchanged_bytes(config: Config, ranks: int = MICRO_BATCHES) -> dict[str, float]:
    """Bytes that one rank sends in a step, by collective.

    Reduce-scatter and all-gather send (W - 1) / W of the whole buffer, an all-reduce twice that.
    """
    kinds = _kinds(config)
    shapes = matrix_shapes(kinds)
    matrices = _scattered_bytes(shapes, assign(tuple(shapes), ranks), range(len(shapes)), ranks)
    rest = sum(parameter.numel() for kind in ("embedding", "scalar") for parameter in kinds[kind].values())
    return {
        "reduce-scatter of matrices": matrices,
        "all-gather of matrices": matrices,
        "all-reduce of the rest": 2 * (ranks - 1) / ranks * rest * WIDTH,
    }


def bucket_bytes(config: Config, ranks: int = MICRO_BATCHES) -> list[float]:
    """Bytes that one rank sends in the reduce-scatter of each bucket, in their order, with GRADIENT_REDUCTION=overlapped."""
    shapes = matrix_shapes(_kinds(config))
    buckets = cut(shapes, ranks)
    owners = spread(assign(tuple(shapes), ranks), shapes, buckets)
    return [_scattered_bytes(shapes, owners, bucket, ranks) for bucket in buckets]


def matrix_shapes(kinds: Mapping[str, Mapping[str, nn.Parameter]]) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices among a model's parameters, in its order."""
    return [(matrix.shape[0], matrix.shape[1]) for matrix in kinds["matrix"].values()]


def _kinds(config: Config) -> dict[str, dict[str, nn.Parameter]]:
    with torch.device("meta"):
        return split_parameters(GPT(config), config)


def _scattered_bytes(
    shapes: Sequence[tuple[int, int]], owners: Sequence[int], numbers: Sequence[int], ranks: int
) -> float:
    # a buffer has as much room for every rank as the fullest one needs
    shares = [0] * ranks
    for number in numbers:
        rows, columns = shapes[number]
        shares[owners[number]] += rows * columns
    return (ranks - 1) / ranks * ranks * max(shares) * WIDTH


def table() -> str:
    """Megabytes and milliseconds of every recipe, in both forms of the reduction, as Markdown.

    Overlapped, the last bucket counts as behind the backward pass, because the pass ends with its gradients.
    """
    columns = [
        "recipe", "reduce-scatter MB", "all-gather MB", "all-reduce MB", "ms, computed",
        "overlapped: reduce-scatters MB", "ms behind the backward pass, computed",
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name in recipe_names():
        config = load_recipe(name).config()
        sent, buckets = exchanged_bytes(config), bucket_bytes(config)
        behind = sum(sent.values()) - sent["reduce-scatter of matrices"] + buckets[-1]
        cells = [
            f"`{name}`",
            *(f"{value / 1e6:.1f}" for value in sent.values()),
            f"{link_ms(sum(sent.values())):.2f}",
            " + ".join(f"{value / 1e6:.1f}" for value in buckets),
            f"{link_ms(behind):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.computed.communication", description=__doc__)
    parser.parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
