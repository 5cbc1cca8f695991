"""Continues a text token by token, and decodes tokens to characters."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from train.common.errors import UserError
from train.data.case_operators import restore_parts, transform
from train.data.shards import BOS
from train.data.tokenizer import SPACE, find_operator
from train.model.decoder import Decoder, sample
from train.model.gpt import GPT


def encode(tokenizer: SentencePieceProcessor, prompt: str) -> list[int]:
    """Encode the beginning of a document: BOS, then the tokens of `prompt`, which the tokenizer normalizes."""
    return [BOS, *tokenizer.Encode(transform(prompt) if find_operator(tokenizer) else prompt)]


def continue_text(
    model: GPT,
    ids: Sequence[int],
    tokens: int,
    *,
    window: int,
    temperature: float,
    seed: int | Sequence[int],
    recurrence: bool = True,
) -> Iterator[int]:
    """Yield up to `tokens` tokens that continue the text `ids`. Stop before a BOS, which would begin a new document.

    Each token is drawn from softmax(logits / temperature), with random numbers from `np.random.default_rng(seed)`.
    Temperature 0 takes the likeliest token.

    The model must be in evaluation mode. It reads at most `window` tokens, with the rotary base of a text of `window`
    tokens, as in the evaluation. When the window is full, its first half is dropped, and the model reads the second
    half again as the beginning of a text.

    Raises:
        UserError: a logit is NaN or infinite.
    """
    device = model.embedding.weight.device
    context = list(ids[-window:])
    decoder, unread = Decoder(model, 1, window, recurrence=recurrence), context
    random = np.random.default_rng(seed)
    for _ in range(tokens):
        if decoder.past.length + len(unread) > window:
            context = context[-(window // 2) - 1 :]
            decoder, unread = Decoder(model, 1, window, recurrence=recurrence), context
        logits = decoder.step(torch.tensor([unread], device=device))
        if not logits.isfinite().all():
            raise UserError("the model's logits are not numbers: training diverged: lower MATRIX_LR and train again")
        token = int(sample(logits, torch.tensor([random.random()], dtype=torch.float64, device=device), temperature))
        if token == BOS:
            return
        yield token
        unread = [token]
        context = context + unread


def characters(tokenizer: SentencePieceProcessor, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of each token in `ids`. Invalid or unprintable characters become �.

    If a character consists of several byte tokens, it is yielded with the last of them.
    """
    parts = _decoded(tokenizer, ids)
    yield from map(_printable, restore_parts(parts) if find_operator(tokenizer) else parts)


def _decoded(tokenizer: SentencePieceProcessor, ids: Iterable[int]) -> Iterator[str]:
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for index in ids:
        yield utf8.decode(_bytes(tokenizer, index))
    yield utf8.decode(b"", final=True)


def _bytes(tokenizer: SentencePieceProcessor, index: int) -> bytes:
    piece: str = tokenizer.IdToPiece(index)
    if tokenizer.IsByte(index):
        # the name of a byte piece is <0xNN>
        return bytes.fromhex(piece[3:5])
    if tokenizer.IsControl(index) or tokenizer.IsUnknown(index) or tokenizer.IsUnused(index):
        return b""
    return piece.replace(SPACE, " ").encode()


def _printable(text: str) -> str:
    # replace control characters, which could change the terminal
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
