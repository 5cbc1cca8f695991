"""Writes and reads the dictionaries in which published submissions store a model. A dictionary has one of two layouts:

    Mixed   {"w": {NAME.q: int8, NAME.scale: float16, NAME: float16}, "m": {NAME: {"type": "int6"} or "passthrough"}}
    PerRow  {"__quant_format__": TAG, "quantized": {NAME: int8}, "scales": {NAME: float16}, "dtypes": {NAME: "float32"},
            "passthrough": {NAME: float32, or float16 for a matrix}, "qmeta": {NAME: {"scheme": "per_row", "axis": 0}},
            "passthrough_orig_dtypes": {NAME of a matrix: "float32"}}
            If packed, each entry of "quantized" is a vector of uint8 with 6 bits per code, and each entry of "qmeta"
            also has "num_bits": 6, "packed": True, "shape": [rows, columns].

`dtypes` and `passthrough_orig_dtypes` name the dtypes of the parameters in training. An empty `qmeta` or
`passthrough_orig_dtypes` is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from golf_kernels import int6_pack, int6_unpack
from train.common.errors import UserError
from train.quantize.row_scales import largest_code
from train.quantize.tensors import QuantizedTensor, StoredTensors

_NEEDED = ("quantized", "scales", "dtypes", "passthrough")
_OPTIONAL = ("qmeta", "passthrough_orig_dtypes")

_SETTINGS = "give the settings of the model in the file: --recipe NAME --SETTING VALUE"


@dataclass(frozen=True)
class Check:
    """Checks the contents of a published file. Errors name the file, the format and the key."""

    path: Path
    format: str

    def refuse(self, key: str, expected: str, found: str, remedy: str = "") -> NoReturn:
        remedy = remedy or f"it is not a file of format {self.format}"
        raise UserError(f"{self.path}: read as {self.format}: {key}: expected {expected}, found {found}: {remedy}")

    def table(self, content: Mapping[str, Any], name: str, default: object = None) -> dict[str, Any]:
        """Return the dictionary `content[name]`. Refuse the file if it is not a dictionary."""
        table = content.get(name, default)
        if not isinstance(table, dict):
            self.refuse(name, "a dictionary", _described(table))
        return table

    def names(
        self, table: str, found: Collection[str], needed: Collection[str], optional: Collection[str] = ()
    ) -> None:
        """Refuse the file if `found` lacks a name in `needed`, or has a name in neither `needed` nor `optional`."""
        for name in needed:
            if name not in found:
                self.refuse(_key(table, name), "an entry", "none", _SETTINGS)
        for name in found:
            if name not in needed and name not in optional:
                self.refuse(_key(table, name), "no such entry", "one", _SETTINGS)

    def tensor(
        self, table: str, content: Mapping[str, Any], name: str, dtype: torch.dtype, shape: torch.Size
    ) -> Tensor:
        """Return the tensor `content[name]`. Refuse the file if the tensor has another dtype or shape."""
        found = content.get(name)
        plain = type(found) is Tensor and found.layout == torch.strided and found.device.type == "cpu"
        if isinstance(found, Tensor) and plain and found.dtype == dtype and found.shape == shape:
            return found
        # for the error message: a wrong dtype means another format, a wrong shape means other settings
        other_model = found is None or (plain and found.dtype == dtype)
        self.refuse(_key(table, name), _kind(dtype, shape), _described(found), _SETTINGS if other_model else "")

    def coded(self, table: str, name: str, codes: Tensor, scales: Tensor, bits: int) -> QuantizedTensor:
        low, high = (int(bound) for bound in codes.aminmax())
        limit = largest_code(bits)
        if low < -limit - 1 or high > limit:
            self.refuse(_key(table, name), f"int{bits} codes in {-limit - 1}..{limit}", f"{low}..{high}")
        return QuantizedTensor(codes, scales, bits)


class Layout(Protocol):
    """A layout of the dictionary.

    In all methods, `parameters` has the names, shapes and dtypes of the script's model.
    """

    @property
    def mark(self) -> str:
        """Description of the keys by which `recognizes` identifies the layout."""

    def recognizes(self, content: Mapping[str, Any]) -> bool: ...

    def write(self, tensors: StoredTensors, parameters: Mapping[str, Tensor]) -> dict[str, Any]: ...

    def read(self, content: Mapping[str, Any], parameters: Mapping[str, Tensor], check: Check) -> StoredTensors: ...


class Mixed:
    """The layout `Mixed`, shown in the module's docstring."""

    mark = "'w' and 'm'"

    def recognizes(self, content: Mapping[str, Any]) -> bool:
        return "w" in content and "m" in content

    def write(self, tensors: StoredTensors, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        weights: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, QuantizedTensor):
                weights |= {f"{name}.q": tensor.codes, f"{name}.scale": tensor.scales}
                meta[name] = {"type": f"int{tensor.bits}"}
            else:
                weights[name], meta[name] = tensor, "passthrough"
        return {"w": weights, "m": meta}

    def read(self, content: Mapping[str, Any], parameters: Mapping[str, Tensor], check: Check) -> StoredTensors:
        check.names("", content, ["w", "m"])
        weights, meta = check.table(content, "w"), check.table(content, "m")
        check.names("m", meta, parameters)
        tensors: StoredTensors = {}
        read = []
        for name, kind in meta.items():
            shape = parameters[name].shape
            if _same(kind, "passthrough"):
                tensors[name] = check.tensor("w", weights, name, torch.float16, shape)
                read.append(name)
                continue
            # some scripts also state the quantizer, as "method" or in the type's name; their loaders ignore it
            bits = re.match(r"int([2-8])(?!\d)", str(kind.get("type"))) if isinstance(kind, dict) else None
            if bits is None or len(shape) != 2:
                coded = " or {'type': 'int2'} … {'type': 'int8'}" if len(shape) == 2 else ", as it is no matrix"
                check.refuse(_key("m", name), f"'passthrough'{coded}", _described(kind))
            codes = check.tensor("w", weights, f"{name}.q", torch.int8, shape)
            scales = check.tensor("w", weights, f"{name}.scale", torch.float16, torch.Size(shape[:1]))
            tensors[name] = check.coded("w", f"{name}.q", codes, scales, int(bits[1]))
            read += [f"{name}.q", f"{name}.scale"]
        check.names("w", weights, read)
        return tensors


@dataclass(frozen=True)
class PerRow:
    """The layout `PerRow`, shown in the module's docstring. Its files store `tag` under the key "__quant_format__"."""

    tag: str
    packed: bool = False

    @property
    def mark(self) -> str:
        return f"'__quant_format__': {self.tag!r}"

    def recognizes(self, content: Mapping[str, Any]) -> bool:
        return _same(content.get("__quant_format__"), self.tag)

    def write(self, tensors: StoredTensors, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        coded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}
        kept = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        meta = {name: self._meta(tensor.shape) for name, tensor in coded.items()}
        original = {name: _dtype_name(parameters[name]) for name in kept if _is_matrix(name)}
        return {
            "__quant_format__": self.tag,
            "quantized": {name: self._pack(name, tensor.codes) for name, tensor in coded.items()},
            "scales": {name: tensor.scales for name, tensor in coded.items()},
            "dtypes": {name: _dtype_name(parameters[name]) for name in coded},
            "passthrough": {name: tensor if _is_matrix(name) else tensor.float() for name, tensor in kept.items()},
            **({"qmeta": meta} if meta else {}),
            **({"passthrough_orig_dtypes": original} if original else {}),
        }

    def read(self, content: Mapping[str, Any], parameters: Mapping[str, Tensor], check: Check) -> StoredTensors:
        check.names("", content, ["__quant_format__", *_NEEDED], _OPTIONAL)
        quantized, scales, dtypes, kept = (check.table(content, name) for name in _NEEDED)
        meta, original = (check.table(content, name, {}) for name in _OPTIONAL)
        check.names("quantized", quantized, [], [name for name in parameters if parameters[name].ndim == 2])
        check.names("passthrough", kept, [], [name for name in parameters if name not in quantized])
        check.names("quantized or passthrough", [*quantized, *kept], parameters)
        check.names("scales", scales, quantized)
        check.names("dtypes", dtypes, quantized)
        check.names("qmeta", meta, quantized)
        check.names("passthrough_orig_dtypes", original, [name for name in kept if _is_matrix(name)])
        tensors: StoredTensors = {}
        for name in quantized:
            shape = parameters[name].shape
            if not _same(meta[name], self._meta(shape)):
                check.refuse(_key("qmeta", name), repr(self._meta(shape)), _described(meta[name]))
            row_scales = check.tensor("scales", scales, name, torch.float16, torch.Size(shape[:1]))
            if self.packed:
                packed = check.tensor(
                    "quantized", quantized, name, torch.uint8, torch.Size([-(-6 * shape.numel() // 8)])
                )
                codes = int6_unpack(packed.contiguous(), shape.numel()).reshape(shape)
            else:
                codes = check.tensor("quantized", quantized, name, torch.int8, shape)
            tensors[name] = check.coded("quantized", name, codes, row_scales, 6 if self.packed else 8)
        for name in kept:
            dtype = torch.float16 if _is_matrix(name) else torch.float32
            tensors[name] = check.tensor("passthrough", kept, name, dtype, parameters[name].shape)
        for table, names in (("dtypes", dtypes), ("passthrough_orig_dtypes", original)):
            for name, found in names.items():
                expected = _dtype_name(parameters[name])
                if not _same(found, expected):
                    check.refuse(_key(table, name), repr(expected), _described(found), _dtype_remedy(found))
        return tensors

    def _meta(self, shape: torch.Size) -> dict[str, Any]:
        if not self.packed:
            return {"scheme": "per_row", "axis": 0}
        return {"num_bits": 6, "scheme": "per_row", "axis": 0, "packed": True, "shape": list(shape)}

    def _pack(self, name: str, codes: Tensor) -> Tensor:
        if not self.packed:
            return codes
        if codes.numel() and not -32 <= int(codes.min()) <= int(codes.max()) <= 31:
            raise UserError(
                f"{name}: format w6e16 holds codes of 6 bits, found {codes.min()}..{codes.max()}: quantize "
                "its run first: python -m train.quantize RUN --matrix_bits 6 --embed_bits 16"
            )
        return int6_pack(codes.reshape(-1))


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtype_remedy(found: object) -> str:
    return f"add --embed_dtype {found}" if _same(found, "float32") or _same(found, "bfloat16") else ""


def _key(table: str, name: object) -> str:
    return f"{table}[{repr(name)[:100]}]" if table else repr(name)[:100]


def _same(found: object, expected: object) -> bool:
    """Whether two values have the same JSON. 1 differs from True, a tuple equals a list, a tensor equals nothing."""
    try:
        return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False


def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _described(found: object) -> str:
    if isinstance(found, Tensor):
        return _kind(found.dtype, found.shape)
    return "none" if found is None else repr(found)[:100]
