"""CaseOps: replaces capital ASCII letters by operators and small letters, and counts the original bytes of each token.

Published as `lossless_caps_caseops_v1`. An operator is one private-use character. A word is a maximal sequence of ASCII
letters. All other characters stay unchanged.

    word                             written as
    hello                            hello
    HELLO (two letters or more)      ALLCAPS hello
    Hello, H                         TITLE hello, TITLE h
    heLLo                            he CAPNEXT l CAPNEXT lo
    HeLlo                            TITLE he CAPNEXT llo
    an operator in the text          ESC and the same operator
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np
from sentencepiece import SentencePieceProcessor

from train.common.errors import UserError
from train.data.shards import BOS, MAX_VOCAB, Tokens

OPERATORS = TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
_OPERATOR_BYTES = 3

_OPERATOR = re.compile(f"([{TITLE}-{ESC}])")
# a word with a capital. The possessive quantifier makes the time linear in the length of a word.
_WORD = re.compile("((?<![A-Za-z])[a-z]*+[A-Z][A-Za-z]*)")
_CAPITAL = re.compile("([A-Z])")
_WRITTEN = re.compile(f"{ESC}([{TITLE}-{ESC}])|{ALLCAPS}([A-Za-z]+)|[{TITLE}{CAPNEXT}]([A-Za-z])")
# text up to an operator whose effect depends on what follows
_CLOSED = re.compile(
    f"(?:[^{TITLE}-{ESC}]|{ESC}[{TITLE}-{ESC}]|[{TITLE}{CAPNEXT}{ESC}](?=.)|{ALLCAPS}[A-Za-z]*(?=[^A-Za-z]))*",
    re.DOTALL,
)
# an operator in transformed UTF-8 text; ESC and the operator after it are one match
_ACTING = re.compile(rb"\xee\x80\x84\xee\x80[\x81-\x84]|\xee\x80[\x81-\x83]")


def transform(text: str) -> str:
    """Replace capitals by operators and small letters. `inverse` restores the text exactly."""
    # looking for single characters is much faster than a regular expression
    if any(operator in text for operator in OPERATORS):
        text = _OPERATOR.sub(rf"{ESC}\1", text)
    parts = _WORD.split(text)
    parts[1::2] = map(_write, parts[1::2])
    return "".join(parts)


@functools.lru_cache(1 << 16)
def _write(word: str) -> str:
    small = word.lower()
    if word[1:] == small[1:]:
        return TITLE + small
    if word.isupper():
        return ALLCAPS + small
    first, rest = word[0], _CAPITAL.sub(rf"{CAPNEXT}\1", word[1:])
    return (TITLE if first.isupper() else "") + (first + rest).lower()


def inverse(transformed: str) -> str:
    """Restore the original text from the result of `transform`.

    Raises:
        UserError: `transform` cannot return this text: an operator is in a wrong place, or the text has a capital
        letter.
    """
    text = restore(transformed)
    written = transform(text)
    if written != transformed:
        pairs = enumerate(itertools.zip_longest(written, transformed))
        at = next(index for index, (expected, found) in pairs if expected != found)
        raise UserError(
            f"character {at} of the transformed text: an operator in a wrong place or a capital: {transformed[at : at + 20]!r}: "
            "expected text that case operators were written into"
        )
    return text


def restore(transformed: str) -> str:
    """Restore capitals like `inverse`, but keep operators that are in a wrong place."""
    return _WRITTEN.sub(lambda match: match[1] or (match[2] or match[3]).upper(), transformed)


def restore_parts(parts: Iterable[str]) -> Iterator[str]:
    """Yield the restored text of a transformed text that comes in parts, each as soon as no later part can change it."""
    held = ""
    for part in parts:
        held += part
        match = _CLOSED.match(held)
        end = match.end() if match else 0
        yield restore(held[:end])
        held = held[end:]
    yield restore(held)


def encode_with_bytes(tokenizer: SentencePieceProcessor, text: str, place: str) -> tuple[Tokens, Tokens]:
    """Encode a document: BOS, then the tokens of its transformed text. Errors begin with `place`.

    Returns:
        The tokens, and each token's number of bytes in the original text. If several byte tokens encode a character,
        the last of them has all bytes. BOS and operators have 0 bytes, except operators that follow ESC.

    Raises:
        UserError: a token has more than 65,535 bytes, for example a token for a very long sequence of spaces.
    """
    data = transform(text).encode()
    encoded = tokenizer.Encode(data, return_type="offset_mapping")
    begins, ends = np.array(encoded["offsets"], dtype=np.int64).reshape(-1, 2).T
    operators = np.array([match.start() for match in _ACTING.finditer(data)], dtype=np.int64)
    acting = np.searchsorted(operators, ends) - np.searchsorted(operators, begins)
    sizes = ends - begins - _OPERATOR_BYTES * acting
    if len(sizes) and int(sizes.max()) >= MAX_VOCAB:
        raise UserError(
            f"{place}: a token has {int(sizes.max()):,} bytes, more than the 65,535 that a sidecar stores: shorten the "
            "run of whitespace"
        )
    ids = np.array([BOS, *encoded["ids"]], dtype=np.uint16)
    return ids, np.concatenate(([0], sizes)).astype(np.uint16)
