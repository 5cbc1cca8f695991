"""Compares two artifacts: model fields, tensors, codes, weights, and bytes per tensor group."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from train.artifact.storage import MODEL_FIELDS, Artifact
from train.common.wording import counted
from train.quantize.tensors import QuantizedTensor


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs. Both errors are None if the shapes differ or one artifact lacks the tensor."""

    name: str
    first: str  # type and shape in the first artifact; "none": the artifact lacks this tensor
    second: str  # the same for the second artifact
    codes_changed: float | None  # fraction of codes that differ; None unless both artifacts store this tensor as codes
    weight_error: float | None  # max |w₁ − w₂|
    relative_error: float | None  # ‖w₁ − w₂‖ / ‖w₁‖


@dataclass(frozen=True)
class Difference:
    """The differences between two artifacts."""

    fields: dict[str, tuple[Any, Any]]  # model field → its two values; only fields that differ
    tensors: list[TensorDifference]
    equal_tensors: int  # number of equal tensors
    model_bytes: tuple[int, int]
    groups: dict[str, tuple[int, int]]  # tensor group → its bytes in the two files, 0 if absent

    @property
    def same(self) -> bool:
        """Whether the two artifacts hold the same model, bit for bit."""
        return not self.fields and not self.tensors

    def to_dict(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self)}

    def text(self, first: str, second: str) -> str:
        """Return the report that `diff` prints. `first` and `second` are the names of the files."""
        lines = [
            f"first   {first}: {self.model_bytes[0]:,} bytes",
            f"second  {second}: {self.model_bytes[1]:,} bytes",
            "",
        ]
        width = max(map(len, self.groups))
        for group, (before, after) in self.groups.items():
            lines.append(f"{group:{width}}  {before:>12,}  {after:>12,}  {after - before:>+12,}")
        before, after = self.model_bytes
        lines += [f"{'total':{width}}  {before:>12,}  {after:>12,}  {after - before:>+12,}", ""]
        lines += [f"field {name}: {a} and {b}" for name, (a, b) in self.fields.items()]
        for row in self.tensors:
            parts = [row.first if row.first == row.second else f"{row.first} and {row.second}"]
            if row.codes_changed is not None:
                parts.append(f"{100 * row.codes_changed:.2f} % of the codes")
            if row.weight_error is not None and row.relative_error is not None:
                parts.append(f"weights by up to {row.weight_error:.4g}, {100 * row.relative_error:.3g} % in norm")
            lines.append(f"tensor {row.name}: {', '.join(parts)}")
        verdict = "the same model" if self.same else f"different in {counted(len(self.tensors), 'tensor')}"
        return "\n".join([*lines, f"{verdict}; equal in {counted(self.equal_tensors, 'tensor')}"])


def difference(first: Artifact, second: Artifact) -> Difference:
    """Compare the contents of two artifacts, which may have different codecs."""
    fields = {
        name: (getattr(first.config, name), getattr(second.config, name))
        for name in MODEL_FIELDS
        if getattr(first.config, name) != getattr(second.config, name)
    }
    names = list(dict.fromkeys([*first.tensors, *second.tensors]))
    rows = [_compare(name, first.tensors.get(name), second.tensors.get(name)) for name in names]
    changed = [row for row in rows if row is not None]
    sizes: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    for artifact, counter in zip((first, second), sizes, strict=True):
        for row in artifact.info.rows():
            counter[row.group] += row.packed_bytes
    groups = {group: (sizes[0][group], sizes[1][group]) for group in {**sizes[0], **sizes[1]}}
    model_bytes = (first.info.model_bytes, second.info.model_bytes)
    return Difference(fields, changed, len(rows) - len(changed), model_bytes, groups)


def _compare(
    name: str, first: QuantizedTensor | Tensor | None, second: QuantizedTensor | Tensor | None
) -> TensorDifference | None:
    kinds = _kind(first), _kind(second)
    if first is None or second is None or first.shape != second.shape:
        return TensorDifference(name, *kinds, None, None, None)
    changed = None
    if isinstance(first, QuantizedTensor) and isinstance(second, QuantizedTensor):
        equal = kinds[0] == kinds[1] and torch.equal(first.codes, second.codes) and _equal(first.scales, second.scales)
        if first.codes.numel():
            changed = (first.codes != second.codes).double().mean().item()
    else:
        equal = (
            kinds[0] == kinds[1] and isinstance(first, Tensor) and isinstance(second, Tensor) and _equal(first, second)
        )
    if equal:
        return None
    before, after = _weights(first), _weights(second)
    error = before - after
    norm = before.norm().item()
    largest = error.abs().max().item() if error.numel() else 0.0
    return TensorDifference(name, *kinds, changed, largest, error.norm().item() / norm if norm else 0.0)


def _equal(first: Tensor, second: Tensor) -> bool:
    # compare bits, because the numbers −0 and 0 are equal
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _kind(tensor: QuantizedTensor | Tensor | None) -> str:
    if tensor is None:
        return "none"
    values = f"int{tensor.bits}" if isinstance(tensor, QuantizedTensor) else str(tensor.dtype).removeprefix("torch.")
    return f"{values} {tuple(tensor.shape)}"


def _weights(tensor: QuantizedTensor | Tensor) -> Tensor:
    return tensor.dequantize().double() if isinstance(tensor, QuantizedTensor) else tensor.double()
