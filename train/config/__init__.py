"""The configuration of a run: checks the settings, and converts them to and from text and JSON.

A flag (`--name value`) overrides an environment variable (the name in upper case), which overrides the recipe, which
overrides the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.common.retired import RETIRED, check_retired
from train.common.values import ConfigError, check_type, check_value, format_value, parse_steps, parse_text
from train.config.settings import BOOKKEEPING, CHANGEABLE, LOCAL, SECTIONS, Settings

__all__ = [
    "BOOKKEEPING", "CHANGEABLE", "LOCAL", "SECTIONS", "Config", "ConfigError",
    "field_help", "field_names", "field_type", "format_value", "nearest", "parse_value",
]  # fmt: skip


@dataclass(frozen=True)
class Config(Settings):
    """The settings of a run. `python -m train --help` lists them.

    Raises:
        ConfigError: a setting has a wrong type or value, or two settings contradict each other.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, _TYPES[field.name], getattr(self, field.name))
        _check_together(self)

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Make a configuration from the result of `to_dict`, of this or an earlier version.

        Raises:
            ConfigError: a name is unknown, a value is bad, or a removed setting has a value that is no longer supported.
        """
        converted: dict[str, Any] = {}
        for name, value in values.items():
            typed = tuple(value) if isinstance(value, list) else value
            if name in RETIRED:
                check_retired(name, typed)
                continue
            if name == "code_form" and typed in ("minified", "sources"):
                # forms that were removed in 0.2.0. If such a run is quantized again, count the compressed script
                # instead.
                typed = "wrapped"
            if name not in _FIELDS:
                raise ConfigError(f"{name}: no such setting{nearest(name)}")
            check_type(name, _TYPES[name], typed)
            converted[name] = typed
        return cls(**converted)


_FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TYPES = typing.get_type_hints(Config)


def field_names() -> tuple[str, ...]:
    return tuple(_FIELDS)


def field_help(name: str) -> str:
    """Return a setting's meaning, choices and default as one line for `--help`."""
    field = _FIELDS[name]
    choices = ", ".join(format_value(choice) or "empty" for choice in field.metadata["choices"])
    default = int(field.default) if isinstance(field.default, bool) else field.default
    return f"{field.metadata['help']}{f' ({choices})' if choices else ''} [{format_value(default) or 'empty'}]"


def field_type(name: str) -> str:
    """Return the name of a setting's type, for `--help`."""
    return {bool: "0|1", int: "int", float: "float", str: "text"}.get(_TYPES[name], "int,…")


def parse_value(name: str, text: str, source: str) -> Any:
    """Parse a setting's value from the text of an environment variable or flag.

    Errors begin with `source`, the name of the variable or flag.
    """
    return parse_text(_TYPES[name], text, source)


def nearest(name: str) -> str:
    """Return the end of an error message that suggests the most similar setting; "" if no setting is similar."""
    close = difflib.get_close_matches(name.lower(), field_names(), n=1, cutoff=0.6)
    return f"; did you mean {close[0].upper() if name.isupper() else close[0]}?" if close else ""


def _rise(layers: tuple[int, ...], last: int) -> bool:
    return list(layers) == sorted(set(layers)) and all(0 <= layer <= last for layer in layers)


def _check_together(c: Config) -> None:
    """Check that settings do not contradict each other.

    Raises:
        ConfigError: two settings contradict each other.
    """
    growing = len(c.seq_lengths) > 1
    last, recurring, profiled = c.num_layers - 1, c.recur_layers, parse_steps(c.profile_steps)
    contradictions = {
        f"model_dim {c.model_dim} is not a multiple of num_heads {c.num_heads}": c.model_dim % c.num_heads,
        f"num_heads {c.num_heads} is not a multiple of num_kv_heads {c.num_kv_heads}": c.num_heads % c.num_kv_heads,
        f"head size {c.head_dim} is odd: rotary embeddings need pairs": c.head_dim % 2,
        f"rope_dims {c.rope_dims} is odd": c.rope_dims % 2,
        f"rope_dims {c.rope_dims} is more than the head size {c.head_dim}": c.rope_dims > c.head_dim,
        f"mlp_mult {c.mlp_mult} times model_dim {c.model_dim} is not a whole number": c.model_dim * c.mlp_mult % 1,
        f"xsa_last_n {c.xsa_last_n} is more than num_layers {c.num_layers}": c.xsa_last_n > c.num_layers,
        f"parallel_start_layer {c.parallel_start_layer} is not below num_layers {c.num_layers}": (
            c.parallel_start_layer >= c.num_layers
        ),
        f"ve_layers {c.ve_layers} must rise, without repeats, within 0..{last}": not _rise(c.ve_layers, last),
        f"recur_layers {recurring} must rise, without repeats, within 0..{last}": not _rise(recurring, last),
        f"recur_layers {recurring} must be consecutive for recur_form unroll": (
            c.recur_form == "unroll" and recurring and recurring[-1] - recurring[0] + 1 != len(recurring)
        ),
        f"num_loops {c.num_loops} repeats a group of layers: set RECUR_FORM=unroll, or NUM_LOOPS=1": (
            c.num_loops > 1 and c.recur_form == "blend"
        ),
        f"train_batch_tokens {c.train_batch_tokens} is not a multiple of train_seq_len {c.train_seq_len}": (
            c.train_batch_tokens % c.train_seq_len
        ),
        f"train_seq_schedule divides consecutive tokens, but loader is {c.loader}: set LOADER=sequential": (
            growing and c.loader not in ("sequential", "packed")
        ),
        "loader packed joins documents in a row: set DOCUMENT_MASKING=1 and ROPE_SCALING=none": (
            c.loader == "packed" and not (c.document_masking and c.rope_scaling == "none")
        ),
        "seq_change_warmup_steps needs sequences that grow: set TRAIN_SEQ_SCHEDULE, or SEQ_CHANGE_WARMUP_STEPS=0": (
            c.seq_change_warmup_steps and not growing
        ),
        "matrix_clip hessian_sdclip needs Hessians, which only quantizer gptq has": (
            c.matrix_clip == "hessian_sdclip" and c.quantizer != "gptq"
        ),
        f"qat trains with 6-bit rows, but matrix_bits is {c.matrix_bits}: set MATRIX_BITS=6 or QAT=0": (
            c.qat and c.matrix_bits != 6
        ),
        f"target_bytes searches the k of SDClip, but matrix_clip is {c.matrix_clip}: set MATRIX_CLIP=sdclip": (
            c.target_bytes and c.matrix_clip not in ("sdclip", "hessian_sdclip")
        ),
        "bigram_vocab_size 1 leaves no row to hash into: set 0 for no table, or at least 2": c.bigram_vocab_size == 1,
        "trigram uses the bigram table, but there is none: set BIGRAM_VOCAB_SIZE, or TRIGRAM=0": (
            c.trigram and not c.bigram_vocab_size
        ),
        "ve_dim and ve_layers belong together: set both or neither": bool(c.ve_dim) != bool(c.ve_layers),
        f"embed_wd {c.embed_wd} is negative: set at least 0, or -1 for adam_wd": c.embed_wd < 0 and c.embed_wd != -1,
        "swa_enabled and ema_decay both average the weights: set SWA_ENABLED=0 or EMA_DECAY=0": (
            c.swa_enabled and c.ema_decay
        ),
        f"gptq_reserve_seconds {c.gptq_reserve_seconds} leaves no time of max_wallclock_seconds {c.max_wallclock_seconds}": (
            0 < c.max_wallclock_seconds <= c.gptq_reserve_seconds
        ),
        f"profile_steps {c.profile_steps} starts after the last of {c.iterations} iterations: choose earlier steps": (
            profiled and profiled.start >= c.iterations
        ),
    }
    for message, wrong in contradictions.items():
        if wrong:
            raise ConfigError(message)
