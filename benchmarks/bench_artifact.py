"""Measure artifact size under each codec, and artifact size and bits per byte at several SDClip widths.

    python -m benchmarks.bench_artifact runs/quickstart_20260101-120000
    python -m benchmarks.bench_artifact runs/mine --sigmas 8,10,12.85,16 --curve-codecs ans --max-tokens 1000000
    python -m benchmarks.bench_artifact --made --codecs ans,zstd

Two tables compare the codecs with the order-0 entropy: one for the whole artifact, one for each group of tensors. Each
codec packs the run's artifact on one thread; the packed artifact is read back and compared with the original. After the
tables comes a curve. The matrices are quantized again at several SDClip widths k, and each model is packed, read back
and scored with windows that do not overlap. Only the plot of this curve is written to the run folder. `--made` uses 36
million random codes (Gaussian rows in the shapes of an 11-layer model) instead of a run, and draws no curve.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.measure.common import CheckFailed
from train.artifact.codecs import CODECS
from train.artifact.difference import difference
from train.artifact.make import quantize
from train.artifact.storage import Artifact, encode_section, load_model, plan_sections, read_artifact, write_artifact
from train.checkpoint import load_weights
from train.common.distributed import Ranks, start_ranks
from train.common.errors import UserError, main_guard
from train.common.files import atomic_writer
from train.config import Config
from train.data.dataset import Dataset
from train.evaluate.scoring import evaluate_model
from train.quantize.tensors import QuantizedTensor, StoredTensors
from train.run.folder import RunFolder
from train.run.logger import RunLogger
from train.submission.plots import BLUE, DPI, FAINT, INK, ORANGE

SIGMAS = (5.0, 6.5, 8.0, 10.0, 12.85, 16.0, 20.0, 26.0)
BELOW_ENTROPY = (
    "a codec needs less than the order-0 entropy, which ignores context: codes of a trained model are not independent"
)
_COLORS = (BLUE, ORANGE)


class CodecRow(NamedTuple):
    """A line of the codec table: the size of an artifact packed by one codec, or the entropy of its codes.

    `groups` maps each group of quantized tensors to the bytes of its packed codes. `encode_s` and `read_s` are seconds
    on one thread.
    """

    codec: str
    file_bytes: int
    groups: dict[str, float]
    encode_s: float
    read_s: float

    @property
    def code_bytes(self) -> float:
        return sum(self.groups.values())


class CurvePoint(NamedTuple):
    """A model quantized at one SDClip width k (`sigmas`).

    `model_bytes` has the artifact's bytes under each codec. `matrix_bits` is the order-0 entropy per code of the
    matrices. `val_bpb` is scored with windows that do not overlap.
    """

    sigmas: float
    model_bytes: dict[str, int]
    matrix_bits: float
    val_bpb: float


def entropy_bytes(codes: bytes) -> float:
    """Returns the order-0 entropy in bytes: −Σ n log2(n/N) / 8, with n codes of each value and N codes in all."""
    counts = np.bincount(np.frombuffer(codes, np.uint8))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8) if len(counts) else 0.0


def predicted_bits(bits: int, sigmas: float) -> float:
    """Returns the entropy in bits per code of a Gaussian row under SDClip: ½ log2(πe/2) + b − log2 k.

    b is `bits`, the width k is `sigmas`. Source: #1394.
    """
    return 0.5 * math.log2(math.pi * math.e / 2) + bits - math.log2(sigmas)


def made_tensors(layers: int = 11, dim: int = 512, vocab_size: int = 8192) -> StoredTensors:
    """Returns the large tensors of a model, with random Gaussian rows, quantized by SDClip.

    The matrices have 6 bits at k = 12.85, the embedding has 8 bits at k = 20.
    """
    generator = torch.Generator().manual_seed(0)

    def codes(rows: int, columns: int, bits: int, sigmas: float) -> QuantizedTensor:
        limit = 2 ** (bits - 1) - 1
        values = torch.randn(rows, columns, generator=generator).mul_(limit / sigmas).round_().clamp_(-limit, limit)
        return QuantizedTensor(values.to(torch.int8), torch.rand(rows, generator=generator).half(), bits)

    shapes = {
        "attention.query": (dim, dim),
        "attention.key": (dim // 2, dim),
        "attention.value": (dim // 2, dim),
        "attention.output": (dim, dim),
        "mlp.up": (4 * dim, dim),
        "mlp.down": (dim, 4 * dim),
    }
    made: StoredTensors = {"embedding.weight": codes(vocab_size, dim, 8, 20.0)}
    for layer in range(layers):
        made |= {f"blocks.{layer}.{name}": codes(*shape, 6, 12.85) for name, shape in shapes.items()}
    return made


def codec_rows(tensors: StoredTensors, config: Config, codecs: Sequence[str]) -> list[CodecRow]:
    """Pack the tensors with each codec. Returns a row for the codes' order-0 entropy, then a row for each codec."""
    plans, _ = plan_sections(tensors)
    coded = {plan.group: b"".join(plan.parts) for plan in plans if not plan.floats}
    rows = [CodecRow("entropy", 0, {group: entropy_bytes(codes) for group, codes in coded.items()}, 0.0, 0.0)]
    with tempfile.TemporaryDirectory() as folder:
        path, plain = Path(folder) / "model.golf", Path(folder) / "plain.golf"
        write_artifact(plain, tensors, config.replace(codec="raw"), code_bytes=0, max_bytes=sys.maxsize)
        expected = read_artifact(plain)
        for name in codecs:
            started = time.perf_counter()
            sections = [encode_section(plan, b"".join(plan.parts), CODECS[name])[0] for plan in plans]
            encode_s = time.perf_counter() - started
            info = write_artifact(path, tensors, config.replace(codec=name), code_bytes=0, max_bytes=sys.maxsize)
            started = time.perf_counter()
            found = read_artifact(path)
            read_s = time.perf_counter() - started
            if not difference(expected, found).same:
                raise CheckFailed(f"{name}: the artifact read back differs from the one written")
            groups = {part.group: float(part.packed_bytes) for part in sections if part.group in coded}
            rows.append(CodecRow(name, info.model_bytes, groups, encode_s, read_s))
    return rows


def codec_table(rows: Sequence[CodecRow], codes: int) -> str:
    """Returns the rows as a text table. The first row is the entropy. `codes` is the number of codes."""
    entropy = rows[0].code_bytes
    lines = [
        f"{'codec':<8}  {'file bytes':>12}  {'bits/code':>9}  {'over entropy':>12}  {'encode s':>8}  {'read s':>7}"
    ]
    for row in rows:
        bits, excess = f"{8 * row.code_bytes / max(codes, 1):.4f}", f"{row.code_bytes / max(entropy, 1) - 1:+.2%}"
        seconds = (f"{row.encode_s:.3f}", f"{row.read_s:.3f}", f"{row.file_bytes:,}") if row.file_bytes else "---"
        lines.append(f"{row.codec:<8}  {seconds[2]:>12}  {bits:>9}  {excess:>12}  {seconds[0]:>8}  {seconds[1]:>7}")
    return "\n".join(lines)


def group_table(rows: Sequence[CodecRow], codes: dict[str, int]) -> str:
    """Returns a text table of bits per code: a line for each group, a column for the entropy and for each codec.

    `codes` maps a group to its number of codes.
    """
    width = max(map(len, codes))
    lines = [f"{'group':<{width}}  {'codes':>10}  {'  '.join(f'{row.codec:>8}' for row in rows)}"]
    for group, count in codes.items():
        bits = "  ".join(f"{8 * row.groups[group] / max(count, 1):>8.4f}" for row in rows)
        lines.append(f"{group:<{width}}  {count:>10,}  {bits}")
    return "\n".join(lines)


def curve(
    folder: RunFolder,
    config: Config,
    sigmas: Sequence[float],
    codecs: Sequence[str],
    ranks: Ranks,
    max_tokens: int = 0,
) -> list[CurvePoint]:
    """At each width, quantize a run's weights, pack them with each codec, and score the model that was packed last."""
    model, data = load_weights(folder).to(ranks.device), Dataset(config)
    text = data.validation
    points = []
    with tempfile.TemporaryDirectory() as elsewhere, RunLogger(elsewhere, config.seed, echo=False) as log:
        for k in sigmas:
            clipped = config.replace(matrix_clip="sdclip", matrix_clip_sigmas=k)
            tensors, _ = quantize(clipped, model, data, ranks, log, code_bytes=0)
            path = Path(elsewhere) / "model.golf"
            sizes: dict[str, int] = {}
            read: Artifact | None = None
            for name in codecs:
                info = write_artifact(path, tensors, clipped.replace(codec=name), code_bytes=0, max_bytes=sys.maxsize)
                sizes[name], before, read = info.model_bytes, read, read_artifact(path)
                if before is not None and not difference(before, read).same:
                    raise CheckFailed(f"k {k:g}: the models of {codecs[0]} and {name} differ")
            plans, _ = plan_sections(tensors)
            matrices = [b"".join(plan.parts) for plan in plans if plan.type == f"int{config.matrix_bits}"]
            bits = 8 * sum(map(entropy_bytes, matrices)) / max(sum(map(len, matrices)), 1)
            loaded = load_model(path, clipped).to(ranks.device)
            recurrence = bool(config.recur_layers)
            result = evaluate_model(
                loaded, text.tokens, text.target_bytes, clipped, stride=0, max_tokens=max_tokens, recurrence=recurrence
            )
            points.append(CurvePoint(k, sizes, bits, result.val_bpb))
    return points


def curve_table(points: Sequence[CurvePoint], bits: int) -> str:
    """Returns the points as a text table, with the entropy predicted for Gaussian rows."""
    codecs = list(points[0].model_bytes)
    heads = "  ".join(f"{f'{name} bytes':>14}" for name in codecs)
    lines = [f"{'k':>6}  {'bits/code':>9}  {'predicted':>9}  {heads}  {'val_bpb':>10}"]
    for point in points:
        sizes = "  ".join(f"{point.model_bytes[name]:>14,}" for name in codecs)
        predicted = predicted_bits(bits, point.sigmas)
        lines.append(
            f"{point.sigmas:>6g}  {point.matrix_bits:>9.4f}  {predicted:>9.4f}  {sizes}  {point.val_bpb:>10.6f}"
        )
    return "\n".join(lines)


def plot_curve(path: str | os.PathLike[str], points: Sequence[CurvePoint], title: str) -> None:
    """Draw bits per byte over artifact size, one line per codec."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, color in zip(points[0].model_bytes, _COLORS, strict=False):
        sizes = [point.model_bytes[name] / 1e6 for point in points]
        axis.plot(sizes, [point.val_bpb for point in points], color=color, marker="o", markersize=5, label=name)
    for point in points:
        axis.annotate(
            f"k={point.sigmas:g}", (min(point.model_bytes.values()) / 1e6, point.val_bpb), (-5, -11), color=INK,
            textcoords="offset points", fontsize=8, ha="right",
        )  # fmt: skip
    axis.set(title=title, xlabel="artifact (MB, decimal)", ylabel="val_bpb, flat")
    axis.margins(x=0.12, y=0.12)
    axis.grid(color=FAINT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, title="codec")
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def report_codecs(tensors: StoredTensors, config: Config, codecs: Sequence[str]) -> None:
    rows = codec_rows(tensors, config, codecs)
    plans, _ = plan_sections(tensors)
    codes = {plan.group: sum(map(len, plan.parts)) for plan in plans if not plan.floats}
    print(codec_table(rows, sum(codes.values())))
    if min(row.code_bytes for row in rows) < rows[0].code_bytes:
        print(BELOW_ENTROPY)
    print(f"\n{group_table(rows, codes)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.made == (options.run is not None):
        raise UserError("RUN: give either a run folder or --made")
    if options.made:
        report_codecs(made_tensors(), Config(), options.codecs)
        return 0
    folder = RunFolder(options.run)
    config = folder.trained_config()
    artifact = read_artifact(folder.need(folder.artifact, "python -m train"))
    report_codecs(artifact.tensors, artifact.config, options.codecs)
    if not options.sigmas:
        return 0
    with start_ranks(config.device) as ranks:
        points = curve(folder, config, options.sigmas, options.curve_codecs, ranks, options.max_tokens)
    print(f"\n{curve_table(points, config.matrix_bits)}")
    picture = options.out or folder.path / "size_bpb.png"
    plot_curve(
        picture, points, f"{folder.path.name}: int{config.matrix_bits} {config.quantizer}, SDClip at k deviations"
    )
    print(f"-> {picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_artifact",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, nargs="?", help="run folder with config.json, weights.pt and model.golf"
    )
    parser.add_argument("--made", action="store_true", help="use 36 million random codes instead of a run")
    parser.add_argument("--codecs", type=_codecs, default=list(CODECS), help="codecs of the tables [all]")
    parser.add_argument(
        "--sigmas", type=_numbers, default=SIGMAS, help="SDClip widths k of the curve; '' for no curve [5 to 26]"
    )
    parser.add_argument(
        "--curve-codecs", type=_codecs, default=["brotli", "ans"], help="codecs of the curve, at most 2"
    )
    parser.add_argument("--max-tokens", type=int, default=0, help="tokens to score for the curve; 0 for all [0]")
    parser.add_argument("--out", type=Path, help="the curve's PNG [RUN/size_bpb.png]")
    return parser


def _codecs(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CODECS]
    if unknown:
        raise UserError(f"codecs: expected names among {', '.join(CODECS)}, got {unknown[0]!r}")
    return names


def _numbers(text: str) -> list[float]:
    try:
        return sorted(float(part) for part in text.split(",") if part)
    except ValueError as error:
        raise UserError(f"--sigmas: expected numbers separated by commas, got {text!r}") from error


if __name__ == "__main__":
    main_guard(main)
