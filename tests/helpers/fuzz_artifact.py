"""Fuzz everything that reads artifacts. Fuzzing needs atheris and is not part of `make test`.

    pip install atheris
    python tests/helpers/fuzz_artifact.py --seeds /tmp/corpus
    python tests/helpers/fuzz_artifact.py /tmp/corpus -max_total_time=600 -rss_limit_mb=4096 -timeout=20

Inputs that are worth keeping are in `fuzz_artifact_corpus.txt`, one per line in base64. `test_artifact_fuzz.py` reads
them again. The first byte of an input says what follows:

    0      an artifact file
    1      two bytes H, H bytes of JSON (the header), the sections; the checksums are corrected, so that damage in the
           header or sections is not refused early
    2      a byte that chooses a codec, two bytes with the expected size, a stream of that codec

An input passes if it gives a result or a `UserError`.
"""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__" and "--seeds" not in sys.argv:
    import atheris

    watched = atheris.instrument_imports(include=["train"])
else:
    watched = contextlib.nullcontext()
with watched:
    from train.artifact import container
    from train.artifact.codecs import CODECS, byte_unshuffle
    from train.artifact.storage import build_model, read_artifact, write_artifact
    from train.common.errors import CodecError, UserError
    from train.config import Config
    from train.model.gpt import GPT
    from train.quantize.tensors import QuantizedTensor, StoredTensors

_FILE = Path(tempfile.gettempdir()) / "fuzz_artifact.golf"
_LARGEST = 1 << 22


def one_input(data: bytes, file: Path = _FILE) -> bool:
    """Read one input. Returns whether it was accepted."""
    # a lower bound, so that an input that claims gigabytes is refused sooner; the code path is the same
    container.MAX_UNPACKED_BYTES = _LARGEST
    try:
        if data[:1] == b"\2":
            return _decode(data[1:])
        file.write_bytes(_mended(data[1:]) if data[:1] == b"\1" else data[1:])
        artifact = read_artifact(file)
        assert sum(row.packed_bytes for row in artifact.info.rows()) == file.stat().st_size
        build_model(file, artifact)
        return True
    except UserError:
        return False


def _decode(data: bytes) -> bool:
    if len(data) < 3:
        return False
    codec, size = CODECS[sorted(CODECS)[data[0] % len(CODECS)]], int.from_bytes(data[1:3], "little")
    content = codec.decode(data[3:], size)
    assert len(content) == size
    with contextlib.suppress(CodecError):
        byte_unshuffle(content)
    return True


def _mended(data: bytes) -> bytes:
    length = int.from_bytes(data[:2], "little")
    text, payload = data[2 : 2 + length], data[2 + length :]
    try:
        table = json.loads(text)
        begin = 0
        for section in table["sections"]:
            section[6] = zlib.crc32(payload[begin : begin + section[5]])
            begin += section[5]
        text = json.dumps(table).encode()
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        pass
    packed = zlib.compress(text, 1)
    fields = struct.pack("<8sHII", container.MAGIC, container.VERSION, len(packed), len(text))
    return fields + struct.pack("<I", zlib.crc32(packed, zlib.crc32(fields))) + packed + payload


def seeds() -> list[bytes]:
    """Valid inputs of every kind, from which a fuzzer starts. Those with the codec zlib hold a whole model."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-3, 4, (6, 20), generator=generator).to(torch.int8)
    small: StoredTensors = {
        "blocks.0.w": QuantizedTensor(codes, torch.ones(6).half(), 6),
        "s": torch.ones(3).half(),
        "f": torch.ones(()),
    }
    shape: dict[str, Any] = {"vocab_size": 259, "num_layers": 2, "model_dim": 8, "num_heads": 2, "num_kv_heads": 1}
    tiny = Config(**shape, passthrough_max_elements=70, train_seq_len=8, train_batch_tokens=64)
    whole: StoredTensors = {name: torch.zeros(weight.shape).half() for name, weight in GPT(tiny).named_parameters()}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(CODECS):
            file = Path(folder) / "seed"
            tensors = whole if name == "zlib" else small
            write_artifact(file, tensors, tiny.replace(codec=name), code_bytes=0, max_bytes=10**9)
            data = file.read_bytes()
            (length,) = struct.unpack_from("<I", data, 10)
            table = json.loads(zlib.decompress(data[22 : 22 + length]))
            table["config"] = shape
            text = json.dumps(table, separators=(",", ":")).encode()
            found += [b"\0" + data, b"\1" + len(text).to_bytes(2, "little") + text + data[22 + length :]]
    sample = bytes((i * i) % 7 for i in range(300)) + bytes(range(0, 100, 5)) * 5
    for index, name in enumerate(sorted(CODECS)):
        # the sample's end has bytes that a codec of six-bit codes refuses
        content = sample if CODECS[name].max_bits == 8 else sample[:300]
        for hint in (None, (20, 20)):
            found.append(bytes([2, index]) + len(content).to_bytes(2, "little") + CODECS[name].encode(content, hint))
    return found


def main() -> None:
    """Write seeds, or fuzz with libFuzzer's arguments."""
    if sys.argv[1:2] == ["--seeds"]:
        folder = Path(sys.argv[2])
        folder.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(seeds()):
            (folder / f"seed{index}").write_bytes(data)
        return
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
