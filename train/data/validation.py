"""The text that is scored, and how its bytes are counted."""

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
        UserError: either is missing, damaged, of another vocabulary, or not the tokenizer of the dataset's manifest.
    """
    path = find_tokenizer(config.data_path, config.vocab_size, config.tokenizer_path)
    manifest = read_manifest(config.data_path)
    # another tokenizer of the same size would count the bytes of other pieces, without any error
    if manifest is not None and path.is_file() and sha256_file(path) != manifest.tokenizer_sha256:
        raise UserError(
            f"{path}: not the tokenizer that made the shards in {config.data_path}: that was {manifest.tokenizer}: unset "
            "TOKENIZER_PATH, or restore the file"
        )
    tables = byte_tables(load_tokenizer(path, config.vocab_size), config.vocab_size)
    seq_len = max(config.train_seq_len, config.window)
    return ValidationText(load_validation_tokens(config.data_path, seq_len, config.vocab_size), tables)
