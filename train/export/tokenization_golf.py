"""The tokenizer as transformers loads it: `AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer


class GolfTokenizer(PreTrainedTokenizer):
    """Encodes a text as BOS and the tokens of SentencePiece, which normalizes the text."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **settings: Any) -> None:
        self.vocab_file = vocab_file
        self.pieces = SentencePieceProcessor(model_file=vocab_file)
        special = {"pad_token": 0, "bos_token": 1, "eos_token": 1, "unk_token": 3}
        super().__init__(**settings | {name: self.pieces.IdToPiece(index) for name, index in special.items()})

    @property
    def vocab_size(self) -> int:
        return int(self.pieces.vocab_size())

    def get_vocab(self) -> dict[str, int]:
        return {self.pieces.IdToPiece(index): index for index in range(self.vocab_size)}

    def build_inputs_with_special_tokens(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        return [self.bos_token_id, *ids, *(pair or [])]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return str(self.pieces.DecodePieces(tokens))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory, f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model")
        shutil.copyfile(self.vocab_file, path)
        return (str(path),)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self.pieces.EncodeAsPieces(text))

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.pieces.PieceToId(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.pieces.IdToPiece(index))
