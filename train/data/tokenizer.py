"""SentencePiece BPE with Parameter Golf's settings, and tables with the number of bytes of each token.

The normalization (nmt_nfkc) is lossy: it replaces consecutive whitespace by one space, and removes whitespace at the
beginning and end of a document. Bits per byte are measured on the normalized text.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from train.common.errors import UserError
from train.common.files import atomic_write
from train.data.shards import BOS, MAX_VOCAB, need_data

SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": 0,
    "bos_id": BOS,
    "eos_id": 2,
    "unk_id": 3,
    "hard_vocab_limit": False,
}
# longest sentence in bytes: SentencePiece's trainer drops longer sentences without a warning
MAX_SENTENCE_BYTES = 4192
SPACE = "▁"
_PROBES = (
    "Hello world",
    "a  b\tc\nd",
    "x = 12345 + 67",
    "naïve café – 日本語 🙂 ﬁne",
    "  leading and trailing  ",
    "0 1  2",
)


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, path: str | Path, operators: Sequence[str] = ()
) -> SentencePieceProcessor:
    """Train a BPE tokenizer with the published settings. The same documents give the same tokenizer.

    Documents longer than 4,192 bytes are split at whitespace, because SentencePiece's trainer would drop them.
    `vocab_size` includes 4 special pieces, the `operators`, each a piece of its own, and 256 byte pieces.

    Raises:
        UserError: the text is empty, or too short for `vocab_size` pieces.
    """
    model = io.BytesIO()
    feed = _Feed(documents)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=feed, model_writer=model, vocab_size=vocab_size, minloglevel=2,
            max_sentence_length=MAX_SENTENCE_BYTES, user_defined_symbols=list(operators), **SETTINGS,
        )  # fmt: skip
    except RuntimeError as error:
        if feed.failure is not None:
            raise feed.failure from None
        if not feed.sentences:
            raise UserError("tokenizer: the text is empty: give at least one document with text in it") from None
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        reason = (
            f"its characters alone take {least[1]}: give --vocab {least[1]} or more" if least else str(error).strip()
        )
        raise UserError(f"tokenizer: {vocab_size} pieces can't be trained on this text: {reason}") from None
    data = model.getvalue()
    found = SentencePieceProcessor(model_proto=data).vocab_size()
    if found != vocab_size:
        raise UserError(
            f"tokenizer: the text yields only {found} pieces, not {vocab_size}: give more text, or --vocab {found}"
        )
    _check(SentencePieceProcessor(model_proto=data), path, operators=bool(operators))
    atomic_write(path, data)
    return load_tokenizer(path, vocab_size, operators=bool(operators))


def load_tokenizer(path: str | Path, vocab_size: int = 0, *, operators: bool = False) -> SentencePieceProcessor:
    """Load a SentencePiece model, and check that `byte_tables` counts the bytes of its pieces correctly.

    Args:
        vocab_size: the expected number of pieces; 0: any that shards can store.
        operators: whether pieces may be operators, whose bytes `byte_tables` miscounts (see `find_operator`).

    Raises:
        UserError: the file is missing, is no SentencePiece model or has another vocabulary size, or a byte count would
            be wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such tokenizer: expected the SentencePiece .model file that made the shards")
    tokenizer = SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(file.read_bytes())
    except RuntimeError:
        raise UserError(f"{file}: not a SentencePiece model: expected the .model file that made the shards") from None
    pieces = tokenizer.vocab_size()
    if vocab_size and pieces != vocab_size:
        raise UserError(
            f"{file}: has {pieces} pieces, but vocab_size is {vocab_size}: set VOCAB_SIZE={pieces}, or choose the matching tokenizer"
        )
    if pieces > MAX_VOCAB:
        raise UserError(f"{file}: has {pieces} pieces, expected at most {MAX_VOCAB}: choose a smaller tokenizer")
    _check(tokenizer, file, operators=operators)
    return tokenizer


def is_operator(piece: str) -> bool:
    """Whether a piece has a private-use character, as an operator of CaseOps has. Such a piece has no bytes of text."""
    return any(unicodedata.category(character) == "Co" for character in piece)


def find_operator(tokenizer: SentencePieceProcessor) -> str:
    """Return the tokenizer's first operator, or "" if it has none."""
    return next(filter(is_operator, map(tokenizer.IdToPiece, range(tokenizer.vocab_size()))), "")


def find_tokenizer(data_path: str | Path, vocab_size: int, tokenizer_path: str | Path = "") -> Path:
    """Find a dataset's tokenizer: `tokenizer_path`, or a file in `data_path`, or one in `data_path/../../tokenizers`.

    Raises:
        UserError: there is no tokenizer, or `data_path` has several.
    """
    if tokenizer_path:
        return Path(tokenizer_path)
    folder = need_data(data_path)
    named = re.fullmatch(rf"fineweb10B_(sp{vocab_size}_\w+)", folder.resolve().name)
    published = published_tokenizer(named[1] if named else f"sp{vocab_size}")
    beside = folder.resolve().parent.parent / "tokenizers" / published
    inside = sorted(folder.glob("*.model"))
    if len(inside) > 1:
        raise UserError(
            f"{folder}: holds several tokenizers ({', '.join(path.name for path in inside)}): set TOKENIZER_PATH to one"
        )
    if not inside and not beside.is_file():
        raise UserError(f"{folder}: no tokenizer (*.model) in it, nor {beside}: set TOKENIZER_PATH")
    return inside[0] if inside else beside


def published_tokenizer(variant: str) -> str:
    """Return the file name of a published variant's tokenizer: `fineweb_<V>_bpe.model`, `fineweb_<V>_bpe_NAME.model`."""
    pieces, _, name = variant.removeprefix("sp").partition("_")
    return f"fineweb_{pieces}_bpe{'_' * bool(name)}{name}.model"


@dataclass(frozen=True, eq=False)
class ByteTables:
    """Tables from which the bytes of normalized text of each token are computed.

    bytes(target | previous) = base_bytes[target] + (has_leading_space[target] and not is_boundary[previous])

    Attributes:
        base_bytes: `(V,)` int16, UTF-8 bytes of the piece without a leading space.
        has_leading_space: `(V,)` bool, true if the piece begins with a space.
        is_boundary: `(V,)` bool, true for special tokens. The text has no space after a special token.
    """

    base_bytes: npt.NDArray[np.int16]
    has_leading_space: npt.NDArray[np.bool_]
    is_boundary: npt.NDArray[np.bool_]

    def count(self, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.uint16]:
        """Return the bytes of each target, `(T,)` uint16. `tokens` is `(T + 1,)`: the first input and the T targets."""
        charged: npt.NDArray[np.uint16] = self.base_bytes[tokens[1:]].astype(np.uint16)
        charged += self.has_leading_space[tokens[1:]] & ~self.is_boundary[tokens[:-1]]
        return charged


def byte_tables(tokenizer: SentencePieceProcessor, vocab_size: int) -> ByteTables:
    """Compute the tables of Parameter Golf's `build_sentencepiece_luts`, with max(pieces, vocab_size) entries.

    Control, unknown and unused ids are boundaries between words and count 0 bytes. A byte piece has 1 byte. Any other
    piece has the UTF-8 bytes of its text, without a leading space.
    """
    pieces = tokenizer.vocab_size()
    size = max(pieces, vocab_size)
    base, space, boundary = np.zeros(size, np.int16), np.zeros(size, bool), np.ones(size, bool)
    for index in range(pieces):
        if tokenizer.IsControl(index) or tokenizer.IsUnknown(index) or tokenizer.IsUnused(index):
            continue
        boundary[index] = False
        if tokenizer.IsByte(index):
            base[index] = 1
            continue
        piece = tokenizer.IdToPiece(index)
        space[index] = piece.startswith(SPACE)
        base[index] = len(piece.removeprefix(SPACE).encode())
    return ByteTables(base, space, boundary)


def _check(tokenizer: SentencePieceProcessor, path: str | Path, *, operators: bool) -> None:
    def refuse(reason: str) -> UserError:
        return UserError(
            f"{path}: this tokenizer would miscount bytes: {reason}; train one with `python -m train.data`"
        )

    if tokenizer.bos_id() != BOS:
        raise refuse(f"expected BOS as token {BOS}, found {tokenizer.bos_id()}")
    # without a space piece, a lone space becomes three byte tokens and counts 3 bytes (openai/parameter-golf issue 897)
    if tokenizer.PieceToId(SPACE) == tokenizer.unk_id():
        raise refuse(f"it has no piece {SPACE!r} for a lone space")
    if not operators and (operator := find_operator(tokenizer)):
        raise UserError(
            f"{path}: piece {operator!r} is an operator, which stands for no byte of the text: its dataset needs the sidecar "
            "*_val_bytes_*.bin, which python -m train.data build --case-operators makes"
        )
    if sum(tokenizer.IsByte(index) for index in range(tokenizer.vocab_size())) != 256:
        raise refuse("expected 256 byte pieces, without which unknown text counts 0 bytes")
    for index in range(tokenizer.vocab_size()):
        if SPACE in tokenizer.IdToPiece(index)[1:]:
            raise refuse(
                f"piece {index} {tokenizer.IdToPiece(index)!r} has a space after its first character, which counts 3 bytes"
            )
    tables = byte_tables(tokenizer, tokenizer.vocab_size())
    for probe in _PROBES:
        ids = np.array([BOS, *tokenizer.Encode(probe)])
        counted, length = int(tables.count(ids).sum()), len(tokenizer.Decode(ids[1:].tolist()).encode())
        if counted != length:
            raise refuse(f"{probe!r} is {length} bytes when normalized, its tokens count {counted}")


class _Feed(Iterator[str]):
    """Iterates over sentences.

    If the iteration fails, it stores the exception, because SentencePiece's trainer raises a RuntimeError instead.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self.source = (sentence for document in documents for sentence in _sentences(document))
        self.sentences = 0
        self.failure: BaseException | None = None

    def __next__(self) -> str:
        try:
            sentence = next(self.source)
        except StopIteration:
            raise
        except BaseException as error:
            self.failure = error
            raise
        self.sentences += 1
        return sentence


def _sentences(text: str) -> Iterator[str]:
    data = text.replace("\x00", " ").strip().encode()
    start = 0
    while start < len(data):
        end = start + MAX_SENTENCE_BYTES
        if end < len(data):
            blank = max(data.rfind(b" ", start + 1, end), data.rfind(b"\n", start + 1, end))
            end = blank if blank > 0 else end
            # do not cut a character
            while data[end] & 0xC0 == 0x80:
                end -= 1
        yield data[start:end].decode()
        start = end
