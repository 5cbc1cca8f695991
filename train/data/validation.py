"""Loads the validation text, and the tables that count its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from train.common.errors import UserError
from train.common.files import sha256_file
from train.config import Config
from train.data.manifest import read_manifest
from train.data.shards import Tokens, load_validation_tokens
from train.data.tokenizer import ByteTables, byte_tables, find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class ValidationText:
    """A dataset's validation text."""

    tokens: Tokens  # (T + 1,) uint16: the first input and the T targets
    tables: ByteTables


def load_validation(config: Config) -> ValidationText:
    """Read the validation shards and the tokenizer, and check that they match.

    Raises:
        UserError: a file is missing, is damaged or has another vocabulary, or the manifest names another tokenizer.
    """
    path = find_tokenizer(config.data_path, config.vocab_size, config.tokenizer_path)
    manifest = read_manifest(config.data_path)
    # another tokenizer of the same size would miscount the bytes without an error
    if manifest is not None and path.is_file() and sha256_file(path) != manifest.tokenizer_sha256:
        raise UserError(
            f"{path}: not the tokenizer that made the shards in {config.data_path}, which is {manifest.tokenizer}: unset "
            "TOKENIZER_PATH, or restore the file"
        )
    tables = byte_tables(load_tokenizer(path, config.vocab_size), config.vocab_size)
    seq_len = max(config.train_seq_len, config.window)
    return ValidationText(load_validation_tokens(config.data_path, seq_len, config.vocab_size), tables)
