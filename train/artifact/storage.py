"""Writes a quantized model to an artifact, and reads an artifact as tensors or as a model."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.artifact.budget import ArtifactInfo, check_budget
from train.artifact.codecs import CODECS, Codec, byte_shuffle
from train.artifact.container import (
    ITEM_BYTES,
    VERSION,
    ArtifactError,
    Header,
    Section,
    TensorEntry,
    pack,
    unpack,
)
from train.common.errors import UserError
from train.common.files import atomic_write
from train.common.values import ConfigError
from train.config import Config
from train.model.gpt import GPT
from train.model.norm import NORM_EPS
from train.quantize.row_scales import largest_code
from train.quantize.tensors import QuantizedTensor, StoredTensors, dequantize_state, tensor_group

_HEADER_FIELDS = (
    "vocab_size", "document_masking", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "mlp_slope",
    "rope_base", "rope_dims", "rope_train_seq_len", "norm_eps", "logit_softcap", "embed_dtype", "ln_scale", "xsa_last_n",
    "smear_gate", "bigram_vocab_size", "bigram_dim", "trigram", "ve_dim", "ve_layers", "unet_skips", "skip_gates",
    "parallel_start_layer", "parallel_form", "recur_layers", "recur_form", "recur_scale_params",
)  # fmt: skip
# settings added in 0.2.0 or later. The header contains them only if they differ from the default, so that models
# without them give the same bytes as before.
_ADDED_FIELDS = (
    "rotary_table",
    "embed_proj",
    "skip_rows",
    "num_loops",
    "head_gate",
    "softcap_params",
    "rope_scaling",
    "smear_gate_bos_fix",
)
# removed settings, which the header still contains, with the only values that are supported now
_FIXED_FIELDS = {"norm_eps": NORM_EPS, "unet_skips": True}

MODEL_FIELDS = tuple(name for name in (*_HEADER_FIELDS, *_ADDED_FIELDS) if name not in _FIXED_FIELDS)
"""Names of the settings that an artifact stores, which determine what the model computes from its weights."""

# float tensors with fewer elements than this share a section
_OWN_SECTION_ELEMENTS = 4096

_FLOAT_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_FLOAT_TYPES = {name: dtype for dtype, name in _FLOAT_NAMES.items()}

# largest number of sections that are encoded at the same time, because brotli needs several hundred MB for each
_THREADS = 8


@dataclass(frozen=True)
class Artifact:
    """The contents of an artifact."""

    config: Config  # `MODEL_FIELDS` as in the file; the other settings have their defaults
    tensors: StoredTensors
    info: ArtifactInfo


class EncodedArtifact(NamedTuple):
    """An artifact in memory: bytes of the file, and sizes."""

    data: bytes
    info: ArtifactInfo


def write_artifact(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QuantizedTensor | Tensor],
    config: Config,
    *,
    code_bytes: int,
    prefix_bytes: int = 0,
    max_bytes: int | None = None,
    encoded: EncodedArtifact | None = None,
    before_replacing: Callable[[], object] = lambda: None,
) -> ArtifactInfo:
    """Write a quantized model to one file, atomically.

    Args:
        path: the file to write.
        tensors: result of `quantize_model`.
        config: the settings. The artifact stores `MODEL_FIELDS` and is encoded with `codec`.
        code_bytes: size of the submission's code.
        prefix_bytes: size of the paid prefix.
        max_bytes: the cap: largest sum of model, code and paid prefix. None: `config.max_artifact_bytes`.
        encoded: result of `encode_artifact` for these tensors, if already made.
        before_replacing: function that is called before the artifact replaces an earlier file.

    Raises:
        BudgetError: the sum exceeds the cap. Nothing is written.
        UserError: `encode_artifact` raises it, or the folder of `path` does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise UserError(f"{target}: its folder does not exist: create {target.parent} first")
    data, info = encoded or encode_artifact(tensors, config)
    cap = config.max_artifact_bytes if max_bytes is None else max_bytes
    check_budget(str(target), info, code_bytes, cap, prefix_bytes)
    before_replacing()
    atomic_write(target, data)
    return info


def encode_artifact(tensors: Mapping[str, QuantizedTensor | Tensor], config: Config) -> EncodedArtifact:
    """Encode a quantized model as an artifact. The same tensors and settings give the same bytes.

    One section of the artifact contains the query matrices of all layers, another their key matrices, and so on, because
    the codec compresses similar data better together. Several threads encode the sections. The codec brotli takes
    seconds per million weights.

    Raises:
        UserError: a tensor contains NaN or infinity, contains codes outside the range of its bit width or has a dtype
            that the format does not support, or the codec's package is not installed.
    """
    if config.codec not in CODECS:
        raise UserError(f"codec: expected one of {', '.join(CODECS)}, got {config.codec!r}")
    plans, entries = plan_sections(tensors)
    contents = [b"".join(plan.parts) for plan in plans]
    codec = CODECS[config.codec]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        # encode the longest section first, so that the threads finish at about the same time
        order = sorted(range(len(plans)), key=lambda index: -len(contents[index]))
        jobs = {index: pool.submit(encode_section, plans[index], contents[index], codec) for index in order}
        encoded = [jobs[index].result() for index in range(len(plans))]
    values, defaults = config.to_dict() | _FIXED_FIELDS, Config().to_dict()
    added = [name for name in _ADDED_FIELDS if values[name] != defaults[name]]
    header = Header(
        {name: values[name] for name in (*_HEADER_FIELDS, *added)}, [section for section, _ in encoded], entries
    )
    data, header_bytes, json_bytes = pack(header, [payload for _, payload in encoded])
    info = ArtifactInfo(VERSION, len(data), header_bytes, json_bytes, tuple(header.sections), len(entries))
    return EncodedArtifact(data, info)


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact. Every byte is checked.

    Raises:
        ArtifactError: the file is missing, truncated or damaged, has another version, or is no artifact. The message
            names the file and the damaged section or entry, and says what was expected and what to do.
        MissingCodec: the package of a section's codec is not installed.
    """
    source = Path(path)
    header, contents, header_bytes, json_bytes = unpack(source)
    try:
        unknown = set(header.config) - {*_HEADER_FIELDS, *_ADDED_FIELDS}
        if unknown:
            raise ConfigError(f"{min(unknown)}: not expected")
        config = Config.from_dict(header.config)
    except (ConfigError, TypeError) as error:
        raise ArtifactError(
            f"{source}: header, config: expected the model's fields of this version, found others ({error}): read it with "
            "the golf_kernels that wrote it"
        ) from error
    sizes = sum(section.packed_bytes for section in header.sections)
    info = ArtifactInfo(
        VERSION, header_bytes + sizes, header_bytes, json_bytes, tuple(header.sections), len(header.tensors)
    )
    return Artifact(config, _tensors(source, header, contents), info)


def load_model(path: str | os.PathLike[str], config: Config | None = None) -> GPT:
    """Load the model from an artifact, in evaluation mode, on the CPU. Its weights are exactly the dequantized tensors.

    `config` gives the settings that the artifact does not store, such as `device`; None: the defaults.

    Raises:
        ArtifactError: `read_artifact` raises it, or the tensors do not match the model fields.
    """
    return build_model(path, read_artifact(path), config)


def build_model(path: str | os.PathLike[str], artifact: Artifact, config: Config | None = None) -> GPT:
    """Build the model from the result of `read_artifact`, as `load_model` does. Errors name `path`."""
    shape = {name: getattr(artifact.config, name) for name in MODEL_FIELDS}
    _check_size(path, artifact)
    # on the meta device the model draws no weights, which is fast and does not change the random generators
    with torch.device("meta"):
        model = GPT((config or artifact.config).replace(**shape))
    state = dequantize_state(artifact.tensors)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        odd = min(name for name in expected | found if expected.get(name) != found.get(name))
        raise ArtifactError(
            f"{path}: tensor {odd}: expected {expected.get(odd, 'none')}, found {found.get(odd, 'none')}: its tensors do "
            "not match its model fields; write it anew with python -m train"
        )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.load_state_dict({name: tensor.to(dtypes[name]) for name, tensor in state.items()}, assign=True)
    return model.eval()


def _check_size(path: str | os.PathLike[str], artifact: Artifact) -> None:
    """Before the model is built, refuse model fields that describe a far larger model than the tensors can fill."""
    config, count = artifact.config, len(artifact.tensors)
    elements = sum(tensor.shape.numel() for tensor in artifact.tensors.values())
    widths = [
        config.model_dim,
        config.mlp_hidden,
        config.vocab_size,
        config.ve_dim,
        config.recur_scale_params,
        config.skip_rows,
        config.softcap_params,
    ]
    if config.bigram_vocab_size:
        widths += [config.bigram_vocab_size, config.bigram_dim]
    if config.num_layers > count or max(widths) > elements:
        raise ArtifactError(
            f"{path}: expected tensors of {config.num_layers:,} layers and widths up to {max(widths):,}, found {count:,} tensors "
            f"of {elements:,} elements: write it anew with python -m train"
        )


@dataclass(frozen=True)
class SectionPlan:
    """A section to be written. `train.artifact.container` explains `group` and `type`."""

    group: str
    type: str
    parts: list[bytes] = field(default_factory=list)  # bytes of each tensor, in order
    shapes: set[tuple[int, ...]] = field(default_factory=set)  # different shapes of these tensors

    @property
    def floats(self) -> bool:
        return self.type in _FLOAT_TYPES

    @property
    def byte_shape(self) -> tuple[int, int] | None:
        """Number of rows and columns of the section's byte matrices, for `Codec.encode`.

        None: the shapes of the tensors differ. Floats form one matrix, in which each float is a row of 2 or 4 bytes.
        """
        if self.floats:
            return sum(map(len, self.parts)) // ITEM_BYTES[self.type], ITEM_BYTES[self.type]
        rows, columns = min(self.shapes)
        return (rows, columns) if len(self.shapes) == 1 else None


def plan_sections(tensors: Mapping[str, QuantizedTensor | Tensor]) -> tuple[list[SectionPlan], list[TensorEntry]]:
    """Divide tensors into sections. Codes and large float tensors have one section per tensor group and type.

    All row scales share one section. All small float tensors of the same dtype share one section.

    Raises:
        UserError: a tensor contains NaN or infinity, contains codes outside the range of its bit width, or has a dtype
            that the format does not support.
    """
    plans: dict[tuple[str, str], SectionPlan] = {}

    def append(group: str, kind: str, tensor: Tensor) -> int:
        plan = plans.setdefault((group, kind), SectionPlan(group, kind))
        plan.parts.append(_to_bytes(tensor))
        plan.shapes.add(tuple(tensor.shape))
        return list(plans).index((group, kind))

    entries = []
    for name, tensor in tensors.items():
        group = tensor_group(name)
        _check_values(name, tensor)
        if isinstance(tensor, QuantizedTensor):
            section = append(group, f"int{tensor.bits}", tensor.codes)
            scales = append("row scales", "float16", tensor.scales)
            entries.append(TensorEntry(name, tuple(tensor.shape), section, scales))
            continue
        own = group if tensor.numel() >= _OWN_SECTION_ELEMENTS else "small tensors"
        section = append(own, _FLOAT_NAMES[tensor.dtype], tensor)
        entries.append(TensorEntry(name, tuple(tensor.shape), section, None))
    return list(plans.values()), entries


def _check_values(name: str, tensor: QuantizedTensor | Tensor) -> None:
    if not isinstance(tensor, QuantizedTensor):
        if tensor.dtype not in _FLOAT_NAMES:
            raise UserError(
                f"{name}: expected {', '.join(_FLOAT_TYPES)}, got {tensor.dtype}: convert it before writing"
            )
        _need_finite(name, tensor)
        return
    _need_finite(name, tensor.scales)
    if tensor.codes.numel():
        limit = largest_code(tensor.bits)
        low, high = (int(bound) for bound in tensor.codes.aminmax())
        if low < -limit - 1 or high > limit:
            raise UserError(
                f"{name}: expected codes in {-limit - 1}..{limit} for int{tensor.bits}, found {low}..{high}"
            )


def _need_finite(name: str, tensor: Tensor) -> None:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise UserError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite: training diverged")


def encode_section(plan: SectionPlan, content: bytes, codec: Codec) -> tuple[Section, bytes]:
    """Encode a section with the method that gives the fewest bytes; of equal ones, the first.

    The methods are: raw; the codec, if it can encode the section's type; for floats, byte shuffle and then the codec
    (lzma instead of a codec that needs the data's rows and columns).
    """
    choices = [("raw", 0, content)]
    if codec.max_bits == 8 or (not plan.floats and int(plan.type.removeprefix("int")) <= codec.max_bits):
        choices.append((codec.name, 0, codec.encode(content, plan.byte_shape)))
    if plan.floats and codec.max_bits == 8:
        # a shaped codec separates the bytes of floats itself, but does not find repetitions: try lzma after the shuffle
        shuffler = CODECS["lzma"] if codec.shaped else codec
        stride = ITEM_BYTES[plan.type]
        choices.append((shuffler.name, stride, shuffler.encode(byte_shuffle(content, stride))))
    name, stride, packed = min(choices, key=lambda choice: len(choice[2]))
    return Section(plan.group, plan.type, name, stride, len(content), len(packed), zlib.crc32(packed)), packed


def _tensors(source: Path, header: Header, contents: list[bytes | memoryview]) -> StoredTensors:
    offsets = [0] * len(contents)

    def take(index: int, shape: tuple[int, ...]) -> Tensor:
        kind = header.sections[index].type
        count = int(np.prod(shape, dtype=np.int64))
        begin = offsets[index]
        offsets[index] += count * ITEM_BYTES[kind]
        return _from_bytes(contents[index][begin : offsets[index]], kind).reshape(shape)

    tensors: StoredTensors = {}
    for entry in header.tensors:
        values = take(entry.section, entry.shape)
        if entry.scales is None:
            tensors[entry.name] = values
        else:
            scales = take(entry.scales, entry.shape[:1])
            bits = int(header.sections[entry.section].type.removeprefix("int"))
            tensors[entry.name] = QuantizedTensor(values, scales, bits)
        try:
            _check_values(entry.name, tensors[entry.name])
        except UserError as error:
            raise ArtifactError(f"{source}: tensor {error}: write it anew with python -m train") from error
    return tensors


# little-endian on every machine. NumPy has no bfloat16, so its bits are stored as int16.
_NUMPY = {"float16": "<f2", "float32": "<f4", "bfloat16": "<i2"}


def _to_bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.int8:
        return plain.numpy().tobytes()
    kind = _FLOAT_NAMES[plain.dtype]
    bits = plain.view(torch.int16) if kind == "bfloat16" else plain
    return bits.numpy().astype(_NUMPY[kind]).tobytes()


def _from_bytes(content: bytes | memoryview, kind: str) -> Tensor:
    if kind not in _NUMPY:
        return torch.from_numpy(np.frombuffer(content, np.int8).copy())
    array = np.frombuffer(content, _NUMPY[kind])
    values = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    return values.view(torch.bfloat16) if kind == "bfloat16" else values
