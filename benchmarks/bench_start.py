"""Seconds from the start of the trainer to its first step: with an empty compile cache, then again with what that left in it.

Runs the trainer itself on made shards and stops it at its first step. One GPU takes all 8 micro-batches of a step, so an
eighth of the warm-up steps give it about as many as each of 8 GPUs would have.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import common
from benchmarks.measure.step_variants import TINY
from train.common.distributed import MICRO_BATCHES
from train.common.errors import main_guard
from train.config import Config
from train.data.shards import write_shard
from train.data.tokenizer import train_tokenizer
from train.recipes import load_recipe, recipe_names

# seconds that a user should wait at most
GOALS = {"cold": 90.0, "warm": 20.0}
SHORTEST_TEXT = 1 << 20


class StartFailed(Exception):
    """The trainer ended before its first step."""


def made_dataset(folder: Path, config: Config) -> Path:
    """Shards of random tokens, enough for a step and a short validation, and a tokenizer of their vocabulary."""
    folder.mkdir()
    # as many different words of three letters as there are tokens give a tokenizer of any size at once
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(word) for word in itertools.islice(itertools.product(letters, repeat=3), 2 * config.vocab_size)]
    documents = [" ".join(words[start : start + 100]) for start in range(0, len(words), 100)]
    train_tokenizer(documents, config.vocab_size, folder / f"fineweb_{config.vocab_size}_bpe.model")
    random = np.random.default_rng(0)
    for split, tokens in (
        ("train", 2 * config.train_batch_tokens),
        ("val", 4 * max(config.train_seq_len, config.window)),
    ):
        ids = random.integers(0, config.vocab_size, max(tokens, SHORTEST_TEXT if split == "train" else 0) + 1)
        write_shard(folder / f"fineweb_{split}_000000.bin", ids.astype(np.uint16))
    return folder


def first_step(command: Sequence[str], environ: dict[str, str]) -> str:
    """The trainer's line about its first step; the process is stopped then.

    Raises:
        StartFailed: it ended without one; the message is what it last said.
    """
    said: list[str] = []
    process = subprocess.Popen(
        command, cwd=common.ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in process.stdout or ():
            said.append(line.rstrip())
            if line.startswith("first step after "):
                return said[-1]
    finally:
        process.kill()
        process.wait()
    raise StartFailed("\n".join(said[-8:]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("bench_start", (__doc__ or "").splitlines()[0], rounds=None)
    parser.add_argument("--recipe", default="sp8192_sdclip", choices=recipe_names())
    parser.add_argument("--kernels", default="", help="GOLF_BACKEND of the trainer, such as muon_step=triton")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(arguments.recipe)
    changes = {"warmup_steps": math.ceil(recipe.config().warmup_steps / MICRO_BATCHES), "device": arguments.device.type}
    if arguments.tiny:
        changes |= TINY | {"train_batch_tokens": MICRO_BATCHES * TINY["train_seq_len"], "compile": "off"}
    config = recipe.config(**changes)
    surroundings = common.environment(arguments.device)
    with tempfile.TemporaryDirectory() as work:
        data = made_dataset(Path(work, "data"), config)
        environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{work}/cache", "TRITON_CACHE_DIR": f"{work}/cache/triton"}
        environ |= {"GOLF_BACKEND": arguments.kernels} if arguments.kernels else {}
        settings = changes | {"data_path": str(data), "runs_dir": f"{work}/runs", "code_form": "plain"}
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        for cache, goal in GOALS.items():
            command = [sys.executable, "-m", "train", "--recipe", arguments.recipe, "--run_id", cache, *flags]
            try:
                line = first_step(command, environ)
            except StartFailed as error:
                print(f"{arguments.recipe}, {cache}: no first step:\n{error}", file=sys.stderr)
                return 1
            metrics = Path(work, "runs", cache, "metrics.jsonl").read_text().splitlines()
            seconds = next(record["seconds"] for record in map(json.loads, metrics) if record["kind"] == "start")
            print(f"{arguments.recipe}, {cache} cache, on {surroundings['gpu']}, goal {goal:.0f} s: {line}", flush=True)
            row = {"op": f"start {arguments.recipe}", "impl": arguments.kernels or "torch", "mode": f"{cache} cache"}
            row |= {"shape": f"{config.train_batch_tokens} tokens", "dtype": "bf16"} | {"n": 1}
            row |= dict.fromkeys(("p50", "p20", "p80"), 1e3 * seconds)
            if not arguments.tiny:
                common.append_rows([row], surroundings)
    return 0


if __name__ == "__main__":
    main_guard(main)
