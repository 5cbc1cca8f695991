"""Check that a recipe's loss curves with and without kernels differ less than those of different seeds.

The first of the `--variants` (`benchmarks.measure.step_variants`) trains from several seeds, the others from the first
seed. All see the same tokens, an eighth of a batch per step. The losses are smoothed. The distance of two curves is
their mean |difference|. The spread is the mean distance between two seeds of the first variant. Every other variant's
distance from the first variant with the same seed must be below the spread; otherwise the exit code is 1. The curves
and a plot go to `--out`. Distances measured on a GPU go to `benchmarks/results/curves/`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measure import common
from benchmarks.measure.argument_types import parse_positive
from benchmarks.measure.step_variants import add_attention, make_variants, row_names, step_config
from benchmarks.measure.tokens import Tokens, rank_sequences, token_source
from train.common.errors import main_guard
from train.common.files import atomic_write
from train.config import Config
from train.model.attention_choice import choose_attention
from train.recipes import recipe_names

# number of steps over which curves are smoothed
SMOOTH = 20
COLUMNS = (
    *("date", "commit", "dirty", "gpu", "driver", "cuda", "torch", "triton", "recipe", "variant", "against", "data"),
    *("steps", "tokens", "seeds", "first_loss", "last_loss", "distance", "spread"),
)
Curves = dict[str, np.ndarray]


def train(config: Config, name: str, tokens: Tokens, steps: int, device: torch.device) -> np.ndarray:
    """Train a variant from the initial weights of the config's seed. Returns the loss of each step."""
    (variant,) = make_variants(config, [name], device, whole=True)
    # losses are read at the end, so that the host runs ahead as in training
    losses = [variant.run(tokens.next(), False).detach() for _ in range(steps)]
    return torch.stack(losses).double().cpu().numpy()


def smoothed(losses: np.ndarray) -> np.ndarray:
    width = min(SMOOTH, len(losses))
    return np.convolve(losses, np.ones(width) / width, "valid")


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the mean |difference| of two smoothed curves, in nats; infinity if a loss is not finite."""
    found = float(np.abs(smoothed(one) - smoothed(other)).mean())
    return found if np.isfinite(found) else float("inf")


def compare(seeds: Sequence[np.ndarray], others: Curves) -> tuple[dict[str, float], float]:
    """Compare loss curves.

    Returns the distance of each curve in `others` from the first curve in `seeds`, and the mean distance between two
    curves in `seeds`.
    """
    pairs = [distance(one, other) for one, other in itertools.combinations(seeds, 2)]
    return {name: distance(curve, seeds[0]) for name, curve in others.items()}, float(np.mean(pairs))


def draw(curves: Curves, title: str, path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.plot(np.arange(len(smoothed(losses))) + min(SMOOTH, len(losses)), smoothed(losses), label=name)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("bench_loss_curves", __doc__.splitlines()[0] if __doc__ else "", rounds=None)
    parser.add_argument("--recipe", default="sp8192_sdclip", choices=recipe_names())
    parser.add_argument(
        "--variants",
        default="torch,golf",
        help="comma-separated: the reference, then variants to compare with it, such as torch,leaky_relu2_mlp=triton",
    )
    parser.add_argument("--steps", type=parse_positive, help="steps of each curve; default 200, or 6 with --tiny")
    parser.add_argument(
        "--seeds", type=parse_positive, default=3, help="seeds of the first variant, at least 2; default 3"
    )
    add_attention(parser)
    parser.add_argument("--data", type=Path, help="folder of shards; default: random tokens")
    parser.add_argument("--out", type=Path, help="folder for curves.csv and curves.png")
    arguments = parser.parse_args(argv)
    device, steps = arguments.device, arguments.steps or (6 if arguments.tiny else 200)
    if arguments.seeds < 2 or steps < 2:
        parser.error("--seeds and --steps: expected at least 2 of each: a single curve has no spread")
    first, *rest = arguments.variants.split(",")
    if not rest:
        parser.error(f"--variants: expected another one to compare {first} with, such as {first},golf")
    first, *rest = row_names([first, *rest], device)
    folder = common.RESULTS / "curves"
    if not arguments.tiny:
        common.check_results_file(device, folder, COLUMNS)
    if arguments.out:
        # an unusable folder raises an error before training
        arguments.out.mkdir(parents=True, exist_ok=True)
    config = step_config(arguments.recipe, device, tiny=arguments.tiny, attention=arguments.attention)
    # the same attention backend for all curves
    config = config.replace(attention=choose_attention(config, device, rank_sequences(config)).name)

    tokens = functools.partial(token_source, config, arguments.data, device)
    starts = [config.replace(seed=config.seed + number) for number in range(arguments.seeds)]
    curves = {f"{first}, seed {start.seed}": train(start, first, tokens(), steps, device) for start in starts}
    seeds = list(curves.values())
    others = {name: train(config, name, tokens(), steps, device) for name in rest}
    curves |= {f"{name}, seed {config.seed}": curve for name, curve in others.items()}
    distances, spread = compare(seeds, others)
    surroundings = common.environment(device)
    data = "random tokens" if arguments.data is None else str(arguments.data)
    step_tokens = rank_sequences(config) * config.train_seq_len
    title = f"{config.recipe}, {steps} steps of {step_tokens:,} tokens ({data}), {surroundings['gpu']}"
    print(f"{title}\nspread of {arguments.seeds} seeds of {first}: {spread:.5f} nats")
    rows, fine = [], True
    for name, found in distances.items():
        fine &= found < spread
        print(
            f"{name}: {others[name][0]:.4f} to {others[name][-1]:.4f} ({first}: {seeds[0][0]:.4f} to {seeds[0][-1]:.4f}), "
            f"distance {found:.5f} nats, {'within' if found < spread else 'NOT within'} the spread of seeds"
        )
        rows.append(
            {"recipe": config.recipe, "variant": name, "against": first, "data": data, "steps": steps}
            | {"tokens": step_tokens, "seeds": arguments.seeds, "distance": found}
            | {"first_loss": float(others[name][0]), "last_loss": float(others[name][-1]), "spread": spread}
        )
    if arguments.out:
        lines = [",".join(["step", *(f'"{name}"' for name in curves)])]
        lines += [",".join(map(str, line)) for line in zip(range(1, steps + 1), *curves.values(), strict=True)]
        atomic_write(arguments.out / "curves.csv", "\n".join(lines) + "\n")
        draw(curves, title, arguments.out / "curves.png")
    path = None if arguments.tiny or not rows else common.append_rows(rows, surroundings, folder, columns=COLUMNS)
    print(f"-> {path.relative_to(common.ROOT)}" if path else "not stored: only full-size GPU results are stored")
    return 0 if fine else 1


if __name__ == "__main__":
    main_guard(main)
