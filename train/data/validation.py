"""The text that is scored, and how its bytes are counted."""

from __future__ import annotations

from dataclasses import dataclass

from train.config import Config
from train.data.shards import Tokens, load_validation_tokens
from train.data.tokenizer import ByteTables, byte_tables, find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class ValidationText:
    """A dataset's validation text.

    Attributes:
        tokens: `(T + 1,)` uint16, the first input and the T targets.
        tables: bytes that each target stands for.
    """

    tokens: Tokens
    tables: ByteTables


def load_validation(config: Config) -> ValidationText:
    """Read the validation shards and the tokenizer that `config` names, and check that they belong together.

    Raises:
        UserError: either is missing, damaged, or of another vocabulary.
    """
    path = find_tokenizer(config.data_path, config.vocab_size, config.tokenizer_path)
    tables = byte_tables(load_tokenizer(path, config.vocab_size), config.vocab_size)
    seq_len = max(config.train_seq_len, config.window)
    return ValidationText(load_validation_tokens(config.data_path, seq_len, config.vocab_size), tables)
