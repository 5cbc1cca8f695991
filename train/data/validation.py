"""Loads the validation text and counts the bytes of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.common.errors import UserError
from train.common.files import sha256_file
from train.config import Config
from train.data.manifest import read_manifest
from train.data.shards import Tokens, find_shards, load_validation_tokens, read_sidecar
from train.data.tokenizer import byte_tables, find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class ValidationText:
    """A dataset's validation text."""

    tokens: Tokens  # (T + 1,) uint16: the first input and the T targets
    target_bytes: Tokens  # (T,) uint16: the bytes of each target
    has_sidecar: bool  # whether `target_bytes` are from the sidecar, else from the tokenizer's pieces


def load_validation(config: Config) -> ValidationText:
    """Read the validation shards and the tokenizer, and check that they match.

    The bytes of the targets come from the sidecar, if there is one, else from the tokenizer's pieces.

    Raises:
        UserError: a file is missing, is damaged or has another vocabulary, the manifest names another tokenizer, or the
            tokenizer has operators and there is no sidecar.
    """
    path = find_tokenizer(config.data_path, config.vocab_size, config.tokenizer_path)
    manifest = read_manifest(config.data_path)
    # a different tokenizer of the same size would give wrong byte counts without an error
    if manifest is not None and path.is_file() and sha256_file(path) != manifest.tokenizer_sha256:
        raise UserError(
            f"{path}: not the tokenizer that made the shards in {config.data_path}, which is {manifest.tokenizer}: unset "
            "TOKENIZER_PATH, or restore the file"
        )
    sidecar = read_sidecar(find_shards(config.data_path, "val"))
    tokenizer = load_tokenizer(path, config.vocab_size, operators=bool(sidecar))
    seq_len = max(config.train_seq_len, config.window)
    tokens = load_validation_tokens(config.data_path, seq_len, config.vocab_size)
    if sidecar:
        target_bytes = np.concatenate(sidecar)[1 : len(tokens)].astype(np.uint16, copy=False)
    else:
        target_bytes = byte_tables(tokenizer, config.vocab_size).count(tokens)
    return ValidationText(tokens, target_bytes, bool(sidecar))
