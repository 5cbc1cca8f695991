"""The data of a run, opened once: training shards, validation text, and the text that a recipe brings along."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config import Config
from train.data.loaders import Loader, TrainingShards, make_loader
from train.data.paid_prefix import known_targets
from train.data.shards import find_shards
from train.data.validation import ValidationText, load_validation


class Dataset:
    """What lies in `config.data_path`; each part is read when it is first asked for, and kept.

    Args:
        config: where the data is, the sequence lengths, and the order of the training tokens.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def training(self) -> TrainingShards:
        """The training shards, which all loaders share."""
        return TrainingShards(find_shards(self.config.data_path, "train"), self.config.vocab_size)

    @cached_property
    def validation(self) -> ValidationText:
        """The text that is scored."""
        return load_validation(self.config)

    @cached_property
    def known_targets(self) -> np.ndarray | None:
        """Which targets of the validation text cost no nats, `(T,)` bool; None without a paid prefix."""
        return known_targets(self.config, self.validation.tokens)

    def loader(self, ranks: Ranks) -> Loader:
        """Training batches from the first one on.

        Raises:
            UserError: see `make_loader`.
        """
        return make_loader(self.training, self.config, ranks)

    def check(self) -> None:
        """Read all that a run will read.

        Raises:
            UserError: shards, tokenizer or manifest are missing, damaged or of another vocabulary.
        """
        _ = self.known_targets
        self.loader(Ranks())


def prepare_data(config: Config, ranks: Ranks) -> None:
    """Build the shards of the recipe's own text if it has one and they are not there yet.

    Raises:
        UserError: the data is missing and the recipe has no text to make it from.
    """
    path = Path(config.data_path)
    if not config.data_path:
        raise UserError("data_path: not set: give a folder of shards (python -m train.data makes one)")

    def build() -> None:
        if path.exists():
            return
        if config.corpus:
            from train.data.build import build_dataset
            from train.data.corpus import split_documents, stdlib_documents

            print(
                "text: the Python standard library's own sources and documentation (nothing is downloaded)", flush=True
            )
            parts = split_documents(stdlib_documents())
            build_dataset(*parts, path, config.vocab_size, name="stdlib", source="Python standard library")
        else:
            raise UserError(
                f"data_path: {path} does not exist: make it with python -m train.data (fineweb --variant "
                f"sp{config.vocab_size}, see its --help for repositories; or text PATH… for your own), or set DATA_PATH"
            )

    ranks.on_main(build)
