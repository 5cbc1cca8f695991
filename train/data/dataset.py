"""The data of a run: training shards and validation text. Each is opened once."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import numpy as np

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config import Config
from train.data.loaders import Loader, make_loader
from train.data.manifest import read_manifest
from train.data.orders import TrainingShards
from train.data.paid_prefix import known_targets
from train.data.shards import find_shards
from train.data.validation import ValidationText, load_validation
from train.recipes import load_recipe


class Dataset:
    """The dataset in `config.data_path`. Training shards and validation text are opened when they are first used."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def training(self) -> TrainingShards:
        return TrainingShards(find_shards(self.config.data_path, "train"), self.config.vocab_size)

    @cached_property
    def validation(self) -> ValidationText:
        return load_validation(self.config)

    @cached_property
    def known_targets(self) -> np.ndarray | None:
        return known_targets(self.config, self.validation.tokens)

    def loader(self, ranks: Ranks) -> Loader:
        """Make a loader of training batches, which begins with the first batch; see `make_loader`."""
        return make_loader(self.training, self.config, ranks)

    def check(self) -> None:
        """Raise a UserError if shards, tokenizer or manifest are missing or damaged, or have another vocabulary."""
        _ = self.known_targets
        self.loader(Ranks())


def prepare_data(config: Config, ranks: Ranks) -> None:
    """If `data_path` does not exist, but is the recipe's own, build it from the text that the setting `corpus` names.

    Raises:
        UserError: `data_path` does not exist and cannot be built.
    """
    path = Path(config.data_path)
    if not config.data_path:
        raise UserError("data_path: not set: give a folder of shards (python -m train.data makes one)")

    def build() -> None:
        if path.exists():
            return
        if config.corpus:
            own = load_recipe(config.recipe).config().data_path
            if config.data_path == own:
                from train.data.build import build_stdlib

                build_stdlib(path, config.vocab_size)
                return
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        variant = (
            path.name.removeprefix("fineweb10B_") if path.name.startswith("fineweb10B_sp") else f"sp{config.vocab_size}"
        )
        raise UserError(
            f"data_path: {path} does not exist{hint}: make it with python -m train.data fineweb --variant {variant} (its "
            "--help lists repositories) or python -m train.data text PATH… (your own text), or set DATA_PATH"
        )

    ranks.on_main(build)


def start_compressors(config: Config) -> subprocess.Popen[bytes] | None:
    """Start a process that measures gzip and xz during training, on a dataset that `prepare_data` built.

    The process writes the results into the manifest. Return None if there is nothing to measure.
    """
    info = read_manifest(config.data_path) if config.corpus else None
    if info is None or info.yardsticks:
        return None
    # a process, not a thread: decoding the text would hold the Python lock (GIL) that training needs
    command = "import os, sys; os.nice(10); from train.data import build; build.measure_compressors(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", command, config.data_path], env=environment)
