"""What the published scripts load, from published_tables.txt; nothing here uses the code under test."""

import ast
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import torch
import zstandard
from torch import Tensor

TAGS = {"baseline": "int8_clean_per_row_v1", "pr122": "w6_e16_clean_per_row_v1"}

_TEXT = (Path(__file__).parent / "published_tables.txt").read_text()

# published name → this project's
OWN_NAMES = {
    "tok_emb.weight": "embedding.weight",
    "bigram.embed.weight": "bigram.embedding",
    "bigram.proj.weight": "bigram.proj",
    "bigram.scale": "bigram.scale",
    "smear.gate": "smear.gate",
    "ve_shared.embed.weight": "ve.embedding",
    "ve_shared.proj.weight": "ve.proj",
    "ve_shared.scale": "ve.scale",
    "skip_weights": "skips.weights",
    "skip_gates": "skips.gates",
    "lane_merge": "lane_mix",
    "blocks.N.attn_scale": "blocks.N.attn_scale",
    "blocks.N.mlp_scale": "blocks.N.mlp_scale",
    "blocks.N.resid_mix": "blocks.N.resid_mix",
    "blocks.N.attn.q_gain": "blocks.N.attention.q_gain",
    "blocks.N.attn.c_q.weight": "blocks.N.attention.query",
    "blocks.N.attn.c_k.weight": "blocks.N.attention.key",
    "blocks.N.attn.c_v.weight": "blocks.N.attention.value",
    "blocks.N.attn.proj.weight": "blocks.N.attention.output",
    "blocks.N.mlp.fc.weight": "blocks.N.mlp.up",
    "blocks.N.mlp.proj.weight": "blocks.N.mlp.down",
}
# published as one parameter per row
OWN_LISTS = {"ve_layer_scales": "ve.layer_scales", "recur_scales": "recur_scales"}

LAYERS = {"baseline": 9, "pr122": 8, "pr262": 8, "pr1392": 11, "pr1471": 11}

# a narrow model of the same kind: sizes in the tables → its sizes, and the settings that make it
_SHAPE = ["--model-dim", "16", "--num-heads", "2", "--num-kv-heads", "1", "--num-layers", "3", "--vocab-size", "260"]
_VALUES = [
    "--ve-dim",
    "4",
    "--ve-layers",
    "1,2",
    "--xsa-last-n",
    "3",
    "--rope-dims",
    "4",
    "--parallel-start-layer",
    "2",
]
NARROW: dict[str, tuple[dict[int, int], list[str]]] = {
    "baseline": ({1024: 260, 512: 16, 256: 8, 4: 1, 8: 2}, [*_SHAPE, "--mlp-mult", "16.25"]),
    "pr122": ({2048: 260, 1536: 48, 512: 16, 256: 8, 4: 1, 8: 2, 196608: 192, 98304: 96, 589824: 576}, _SHAPE),
    "pr262": (
        {1024: 260, 1536: 48, 2048: 40, 128: 4, 512: 16, 256: 8, 4: 1, 8: 2},
        [*_SHAPE, "--bigram-vocab-size", "40", "--bigram-dim", "4"],
    ),
    "pr1392": (
        {4096: 260, 2048: 64, 128: 4, 512: 16, 256: 8, 5: 1, 8: 2},
        [*_SHAPE, *_VALUES, "--recur-layers", "0"],
    ),
    "pr1471": (
        {8192: 260, 2048: 64, 128: 4, 512: 16, 256: 8, 5: 1, 8: 2},
        [*_SHAPE, *_VALUES, "--recur-layers", "1"],
    ),
}


@dataclass(frozen=True)
class Kind:
    """A tensor in a table."""

    dtype: str
    sizes: tuple[int, ...]


def table(form: str, *, narrow: bool = False) -> dict[str, Any]:
    """The contents of a file, tensors as `Kind`, in the order of the lines, layer by layer."""
    sizes, layers = (NARROW[form][0], 3) if narrow else ({}, LAYERS[form])
    content: dict[str, Any] = {"__quant_format__": TAGS[form]} if form in TAGS else {}
    section = _TEXT.partition(f"[{form}]\n")[2].partition("\n[")[0]
    lines = [line.split(maxsplit=2) for line in section.strip().splitlines()]
    for (dictionary, in_blocks), group in groupby(lines, lambda line: (line[0], ".N." in line[1])):
        entries = list(group)
        for layer in range(layers if in_blocks else 1):
            for _, name, text in entries:
                value = ast.literal_eval(text) if text[0] in "'{" else _kind(text, sizes)
                if isinstance(value, dict) and "shape" in value:
                    value["shape"] = [sizes.get(size, size) for size in value["shape"]]
                content.setdefault(dictionary, {})[name.replace(".N.", f".{layer}.")] = value
    return content


def _kind(text: str, sizes: dict[int, int]) -> Kind:
    dtype, *numbers = text.split()
    return Kind(dtype, tuple(sizes.get(int(number), int(number)) for number in numbers))


def described(content: Any) -> Any:
    """A file's contents as `table` has them."""
    if isinstance(content, Tensor):
        return Kind(str(content.dtype).removeprefix("torch."), tuple(content.shape))
    return {name: described(value) for name, value in content.items()} if isinstance(content, dict) else content


def random_content(form: str, seed: int = 0) -> dict[str, Any]:
    """Contents of a file of the narrow model, as a published script could have written it."""
    torch.manual_seed(seed)
    content = table(form, narrow=True)
    for dictionary in content.values():
        for name, kind in dictionary.items() if isinstance(dictionary, dict) else ():
            if not isinstance(kind, Kind):
                continue
            six_bits = content.get("m", {}).get(name.removesuffix(".q")) == {"type": "int6"}
            dictionary[name] = {
                "int8": torch.randint(-32 if six_bits else -127, 32 if six_bits else 128, kind.sizes).to(torch.int8),
                "uint8": torch.randint(0, 256, kind.sizes).to(torch.uint8),
                "float16": torch.randn(kind.sizes).abs().half() + 0.01,
                "float32": torch.randn(kind.sizes),
            }[kind.dtype]
    return content


def packed(form: str, content: object) -> bytes:
    """A file with these contents, as a published script writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    if form == "pr1471":
        data = b"BSHF\x02" + data[::2] + data[1::2]
    compress: dict[str, Callable[[bytes], bytes]] = {
        "baseline": zlib.compress,
        "pr122": zstandard.ZstdCompressor().compress,
        "pr262": zstandard.ZstdCompressor().compress,
        "pr1392": lambda data: brotli.compress(data, quality=1),
        "pr1471": lambda data: brotli.compress(data, quality=1),
    }
    return compress[form](data)


def unpacked(form: str, data: bytes) -> dict[str, Any]:
    """The contents of a file, as a published script reads them."""
    decompress: dict[str, Callable[[bytes], bytes]] = {
        "baseline": zlib.decompress,
        "pr122": zstandard.ZstdDecompressor().decompress,
        "pr262": zstandard.ZstdDecompressor().decompress,
        "pr1392": brotli.decompress,
        "pr1471": brotli.decompress,
    }
    content = decompress[form](data)
    if form == "pr1471":
        assert content[:5] == b"BSHF\x02"
        planes = np.frombuffer(content, np.uint8, offset=5)
        even = -(-len(planes) // 2)
        joined = np.empty_like(planes)
        joined[::2], joined[1::2] = planes[:even], planes[even:]
        content = joined.tobytes()
    loaded: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return loaded


def weights(form: str, loaded: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a file's contents, float32, as a published script computes them."""
    found = {}
    if form in TAGS:
        for name, codes in loaded["quantized"].items():
            if form == "pr122":
                rows, columns = loaded["qmeta"][name]["shape"]
                number = int.from_bytes(codes.numpy().tobytes(), "little")
                fields = [number >> 6 * i & 63 for i in range(rows * columns)]
                codes = torch.tensor([f - 64 if f > 31 else f for f in fields]).reshape(rows, columns)
            found[name] = codes.float() * loaded["scales"][name].float()[:, None]
        return found | {name: tensor.float() for name, tensor in loaded["passthrough"].items()}
    for name, kind in loaded["m"].items():
        if kind == "passthrough":
            found[name] = loaded["w"][name].float()
        else:
            found[name] = loaded["w"][f"{name}.q"].float() * loaded["w"][f"{name}.scale"].float()[:, None]
    return found


def own_name(name: str) -> tuple[str, int | None]:
    """This project's parameter that holds a published one, and the row in it."""
    prefix, _, row = name.partition(".")
    if prefix in OWN_LISTS:
        return OWN_LISTS[prefix], int(row)
    general = re.sub(r"(?<=^blocks\.)\d+", "N", name)
    return OWN_NAMES[general].replace(".N.", f".{row.partition('.')[0]}."), None
