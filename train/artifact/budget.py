"""The size budget of a submission: bytes per tensor group, and the check that the total size is at most the cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.artifact.container import Section
from train.common.errors import UserError
from train.common.wording import counted
from train.config import Config


class BudgetError(UserError):
    """The submission is larger than the cap."""


@dataclass(frozen=True)
class BudgetRow:
    """The sizes of one section of an artifact, or of its header."""

    group: str  # the section's group, or "header"
    type: str  # e.g. "int6"
    codec: str
    elements: int
    unpacked_bytes: int
    packed_bytes: int  # bytes in the file

    @property
    def bits_per_element(self) -> float:
        """Bits per value in the file; 0 if the section has no values."""
        return 8 * self.packed_bytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class ArtifactInfo:
    """The sizes of an artifact and its parts."""

    version: int  # version of the container format
    model_bytes: int  # size of the file
    header_bytes: int  # size of preamble and header in the file
    json_bytes: int  # size of the header's JSON, uncompressed
    sections: tuple[Section, ...]
    tensors: int  # number of tensors

    def rows(self) -> list[BudgetRow]:
        """Return the rows of the budget, largest first. The sum of their packed bytes is `model_bytes`."""
        rows = [
            BudgetRow(part.group, part.type, part.codec, part.elements, part.unpacked_bytes, part.packed_bytes)
            for part in self.sections
        ]
        rows.append(BudgetRow("header", "json", "zlib", 0, self.json_bytes, self.header_bytes))
        return sorted(rows, key=lambda row: -row.packed_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "model_bytes": self.model_bytes,
            "header_bytes": self.header_bytes,
            "tensors": self.tensors,
            "groups": [
                {**vars(row), "bits_per_element": row.bits_per_element, "share": row.packed_bytes / self.model_bytes}
                for row in self.rows()
            ],
        }


def budget_table(rows: Sequence[BudgetRow]) -> str:
    """Format the budget as a text table with aligned columns."""
    total = sum(row.packed_bytes for row in rows)
    lines = [("group", "type", "codec", "elements", "unpacked", "packed", "bits/el", "share")]
    for row in rows:
        bits = f"{row.bits_per_element:.3f}" if row.elements else "-"
        share = f"{100 * row.packed_bytes / max(total, 1):.1f} %"
        elements, unpacked, packed = f"{row.elements:,}", f"{row.unpacked_bytes:,}", f"{row.packed_bytes:,}"
        lines.append((row.group, row.type, row.codec, elements, unpacked, packed, bits, share))
    elements, unpacked = f"{sum(row.elements for row in rows):,}", f"{sum(row.unpacked_bytes for row in rows):,}"
    lines.append(("total", "", "", elements, unpacked, f"{total:,}", "", "100.0 %"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = 3
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def check_room(config: Config, counted_bytes: int) -> None:
    """Check that code and paid prefix, `counted_bytes`, leave room for a model.

    Raises:
        BudgetError: they alone reach the cap or a target of the settings.
    """
    limits = {
        "max_artifact_bytes": config.max_artifact_bytes,
        "target_bytes": config.target_bytes,
        "target_mb": config.pruning_target_bytes,
    }
    for name, limit in limits.items():
        if 0 < limit <= counted_bytes:
            raise BudgetError(
                f"{name}: code and paid prefix alone take {counted_bytes:,} bytes, expected fewer than {limit:,}: raise {name.upper()}"
            )


def check_budget(where: str, info: ArtifactInfo, code_bytes: int, max_bytes: int, prefix_bytes: int = 0) -> None:
    """Check that the sum of code, paid prefix and model is at most `max_bytes`.

    Raises:
        BudgetError: the sum is larger. The message contains the budget, the excess and the largest group.
    """
    total = code_bytes + prefix_bytes + info.model_bytes
    if total <= max_bytes:
        return
    rows = info.rows()
    costliest = rows[0]
    raise BudgetError(
        f"{where}: code {code_bytes:,}{f' + paid prefix {prefix_bytes:,}' if prefix_bytes else ''} + model {info.model_bytes:,} = {total:,} bytes, expected at most {max_bytes:,} "
        f"(max_artifact_bytes, or target_bytes below it): {counted(total - max_bytes, 'byte')} over. Nothing was written.\n{budget_table(rows)}\n"
        f"{costliest.group} is the largest, {costliest.packed_bytes:,} bytes: let TARGET_BYTES search the row clips, "
        "lower MATRIX_BITS or EMBED_BITS, or train a smaller model"
    )
