"""Reads the model file of a published submission. The file contains no settings, so the caller gives them.

The file is not trusted. The reader decodes at most as many bytes as a model of these settings needs. It refuses
archives with compressed or overlapping entries or wrong checksums. `torch.load` reads only tensors and plain values.
"""

from __future__ import annotations

import io
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from train.artifact.codecs import CODECS, byte_unshuffle
from train.artifact.container import MAGIC
from train.artifact.export import PUBLISHED_FORMATS, PublishedFormat
from train.artifact.published_layouts import Check
from train.artifact.published_names import from_published, published_parameters
from train.common.errors import CodecError, MissingCodec, UserError
from train.config import Config
from train.quantize.tensors import StoredTensors

_ARCHIVE = b"PK\x03\x04"
_SHUFFLED = b"BSHF"
_BEGINNINGS = {
    MAGIC: "an artifact of this project: leave --from out",
    _ARCHIVE: "a torch.save file without compression: give the submission's compressed file",
    b"\x28\xb5\x2f\xfd": "a zstd stream: try --from pr122 or --from pr262",
    b"\xfd7zXZ\0": "an xz stream, which none of these formats is",
}

# most bytes that a tensor's names and archive entries take, besides 4 bytes per element and 2 bytes per row
_BYTES_PER_TENSOR = 4096


def read_published(path: Path, format: str, config: Config) -> StoredTensors:
    """Read the stored tensors of a model with these settings, bit for bit, from a file in the published format `format`.

    Raises:
        UserError: the file has another format or is damaged, or a tensor is missing, unexpected or has a wrong shape.
            The message names the file, the format and the key, and says what was expected and what to do.
        MissingCodec: the codec's package is not installed.
    """
    published, check = PUBLISHED_FORMATS[format], Check(path, format)
    parameters = published_parameters(config)
    elements = sum(parameter.numel() for parameter in parameters.values())
    content = _content(published, check, 6 * elements + _BYTES_PER_TENSOR * (len(parameters) + 1))
    if not isinstance(content, dict) or not published.layout.recognizes(content):
        others = [
            name
            for name, other in PUBLISHED_FORMATS.items()
            if isinstance(content, dict) and other.codec == published.codec and other.layout.recognizes(content)
        ]
        found = f"one with {repr(list(content))[:100]}" if isinstance(content, dict) else "none"
        remedy = (others and f"try --from {others[0]}") or ""
        check.refuse("contents", f"a dictionary with {published.layout.mark}", found, remedy)
    return from_published(published.layout.read(content, parameters, check), config)


def _content(published: PublishedFormat, check: Check, limit: int) -> Any:
    if not check.path.is_file():
        raise UserError(f"{check.path}: no such file: give the compressed model of a submission")
    if check.path.stat().st_size > limit:
        check.refuse("file", f"at most {limit:,} bytes for these settings", f"{check.path.stat().st_size:,}")
    data = check.path.read_bytes()
    try:
        decoded = CODECS[published.codec].decode_up_to(data, limit)
        if len(decoded) > limit:
            raise CodecError(f"more than {limit:,} bytes, which no model of these settings has")
        archive = byte_unshuffle(decoded) if published.stride else bytes(decoded)
        if not archive.startswith(_ARCHIVE):
            raise CodecError(f"expected a torch.save file in the {published.codec} stream, found {archive[:4]!r}")
    except CodecError as error:
        raise UserError(f"{check.path}: read as {check.format}: {error}: {_looks_like(data, check.format)}") from error
    return _unpickled(archive, check)


def _unpickled(archive: bytes, check: Check) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as entries:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries.infolist())
            if not stored or sum(entry.file_size for entry in entries.infolist()) > len(archive):
                raise ValueError("compressed or overlapping entries")
            if damaged := entries.testzip():
                raise ValueError(f"a wrong checksum in {damaged}")
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:
        # for a damaged or hostile file, the unpickler may raise any exception
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        check.refuse("contents", "a torch.save file of tensors, numbers and names", f"another ({reason})")


def _looks_like(data: bytes, format: str) -> str:
    """Return the end of an error message: what the file seems to be, judged by its first bytes, and what to do."""
    for beginning, text in _BEGINNINGS.items():
        if data.startswith(beginning) and f"--from {format}" not in text:
            return f"this is {text}"
    for name, published in PUBLISHED_FORMATS.items():
        with suppress(CodecError, MissingCodec):
            first = bytes(CODECS[published.codec].decode_up_to(data, len(_ARCHIVE)))
            if first.startswith(_SHUFFLED if published.stride else _ARCHIVE) and name != format:
                return f"this is a {published.codec} stream: try --from {name}"
    return "the file is cut or damaged: copy it again"
