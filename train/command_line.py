"""Reads the settings of a run from flags, environment variables (names in upper case) and the recipe.

If a flag or variable looks like a misspelt setting, an error names the most similar setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.common.errors import UserError
from train.common.retired import refuse_retired
from train.common.values import ConfigError, format_value, parse_text
from train.config import (
    BOOKKEEPING,
    SECTIONS,
    Config,
    field_help,
    field_names,
    field_type,
    nearest,
    parse_value,
)
from train.data.manifest import read_manifest
from train.recipes import load_recipe, recipe_names

# an environment variable whose name begins with one of these words must be a setting: MUON_MOMENTM is an error
_FAMILIES = frozenset(
    "ADAM BIGRAM COMPRESSOR EMA EMBED EVAL GPTQ LOGIT MATRIX MLP MUON NORMUON PAID PARALLEL QAT QK RECUR ROPE SCALAR SKIP SMEAR "
    "SWA TIED TIE TRAIN TRIGRAM TTT UNET VAL VE VOCAB WARMDOWN WARMUP WEIGHT XSA".split()
)

# name of a setting in other published scripts → its name here
_ALIASES = {
    "weight_quantization_bits": "matrix_bits", "embed_quantization_bits": "embed_bits", "gptq_calibration_batches": "gptq_calib_batches",
    "muon_row_normalize": "muon_eq_r", "skip_gates_enabled": "skip_gates", "sparse_attn_gate_enabled": "head_gate",
    "enable_looping_at": "recur_start_frac", "smear_gate_enabled": "smear_gate", "asym_logit_rescale": "softcap_params",
    "parallel_final_lane": "parallel_form", "rope_yarn": "rope_scaling",
}  # fmt: skip
# name in other published scripts → {value there: value here}, if the values differ
_VALUES = {
    "smear_gate_enabled": {"0": "off", "1": "embedding"},
    "asym_logit_rescale": {"0": "0", "1": "2"},
    "parallel_final_lane": {"mean": "routed"},
    "rope_yarn": {"0": "none"},
}


@dataclass(frozen=True)
class Override:
    """A setting that a flag or an environment variable gives."""

    name: str
    value: Any
    source: str  # "command line", "environment NAME", "the script" (a packed script that contains the value), or the manifest


def resolve(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[Config, list[Override]]:
    """Read the settings from command line, environment and recipe.

    A flag is written `--name value` or `--name=value`. In its name, `-` means `_`. If neither gives `vocab_size`, the
    manifest of the data does, if there is one.

    Returns:
        The configuration, and the given settings that differ from the recipe.

    Raises:
        ConfigError: a name is unknown, a value has a wrong type or is out of range, or settings contradict each other.
    """
    given = given_settings(arguments, environ)
    recipe = load_recipe(given.pop("recipe").value if "recipe" in given else Config.recipe)
    base = recipe.config()
    if "vocab_size" not in given:
        data_path = given["data_path"].value if "data_path" in given else base.data_path
        manifest = read_manifest(data_path) if data_path else None
        if manifest is not None:
            given["vocab_size"] = Override("vocab_size", manifest.vocab_size, f"the manifest in {data_path}")
    config = recipe.config(**{name: override.value for name, override in given.items()})
    return config, [override for name, override in given.items() if getattr(base, name) != override.value]


def given_settings(arguments: Sequence[str], environ: Mapping[str, str]) -> dict[str, Override]:
    """Return name → setting for all settings that flags and environment variables give. A flag overrides a variable.

    Raises:
        ConfigError: a name is unknown or a value has a wrong type.
    """
    given: dict[str, Override] = {}
    for name, text in environ.items():
        if not name.isupper():
            continue
        field = field_of(name)
        refuse_retired(field, f"environment variable {name}")
        if field in field_names():
            value = parse_value(field, _value_of(name, text), name)
            if field in given and given[field].value != value:
                raise ConfigError(f"{name}: {given[field].source} sets {field}, too: unset one of them")
            given[field] = Override(field, value, f"environment {name}")
        elif _looks_like_setting(name):
            raise ConfigError(
                f"{name}: this environment variable looks like a setting, but no setting has this name{nearest(name)} "
                "(unset it, or see python -m train --help)"
            )
    if {"LOOP_START", "LOOP_END"} <= environ.keys():
        first, last = (parse_text(int, environ[name], name) for name in ("LOOP_START", "LOOP_END"))
        given["recur_layers"] = Override(
            "recur_layers", tuple(range(first, last + 1)), "environment LOOP_START and LOOP_END"
        )
    flags = read_flags(arguments)
    for name, text in flags:
        if [other for other, _ in flags].count(name) > 1:
            raise ConfigError(f"--{name}: given twice: leave one out")
        given[name] = Override(name, parse_value(name, text, f"--{name}"), "command line")
    return given


def note_unread(
    config: Config, environ: Mapping[str, str], note: Callable[[str], object], flags: Collection[str] = ()
) -> None:
    """Warn about each environment variable that differs from the run's settings, because a single stage ignores it.

    `note` receives the warnings. `flags` are the settings for which the stage has a flag.
    """
    # a stage reads GOLF_BACKEND, because training and scoring may use different kernels
    ignored = set(field_names()) - BOOKKEEPING - {"golf_backend"}
    for name, text in sorted(environ.items()):
        field = field_of(name)
        if not name.isupper() or field not in ignored:
            continue
        value = getattr(config, field)
        try:
            if parse_value(field, _value_of(name, text), name) == value:
                continue
        except ConfigError:
            pass
        hint = f" (pass --{field} to change it)" if field in flags else ""
        note(f"warning: ignoring {name}={text}; this run was made with {format_value(value) or 'an empty value'}{hint}")


def check_backends() -> None:
    """Check the backends that GOLF_BACKEND forces.

    Raises:
        UserError: a forced backend does not exist or cannot run.
    """
    # imported here, because this module imports torch, which takes seconds
    from golf_kernels import dispatch

    try:
        dispatch.validate()
    except dispatch.BackendError as error:
        raise UserError(str(error)) from error


def help_text() -> str:
    starts = {first: title for title, first in SECTIONS.items()}
    lines = ["Settings: flags (--NAME VALUE) or environment variables (NAME in upper case); default in brackets"]
    for name in field_names():
        if name in starts:
            lines += ["", f"{starts[name]}:"]
        lines.append(f"  {name:<26} {field_type(name):<6} {field_help(name)}")
    lines += ["", "recipes (--recipe NAME):"]
    lines += [f"  {name:<26} {next(iter(load_recipe(name).about.splitlines()), '')}" for name in recipe_names()]
    return "\n".join(lines)


def override_line(override: Override) -> str:
    return f"setting:{override.name}={format_value(override.value)} from:{override.source}"


def read_flags(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return the setting and the text of each flag, in their order.

    Raises:
        ConfigError: a flag is no setting, or its value is missing.
    """
    pairs = []
    remaining = list(arguments)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r}: expected --NAME VALUE; see python -m train --help")
        spelled, equals, text = flag[2:].partition("=")
        spelled = spelled.replace("-", "_")
        name = field_of(spelled)
        refuse_retired(name, f"--{name}")
        if name not in field_names():
            raise ConfigError(f"{flag.partition('=')[0]}: no such setting{nearest(name)}")
        if not equals:
            if not remaining:
                raise ConfigError(f"{flag}: a value is missing")
            text = remaining.pop(0)
        pairs.append((name, _value_of(spelled, text)))
    return pairs


def field_of(name: str) -> str:
    """Return the setting that a flag or an environment variable of this name sets, if there is such a setting."""
    return _ALIASES.get(name.lower(), name.lower())


def _value_of(name: str, text: str) -> str:
    """Translate the value of a setting that has another name here."""
    values = _VALUES.get(name.lower())
    if values is None:
        return text
    if text not in values:
        raise ConfigError(f"{name}: expected {' or '.join(values)}, got {text!r}")
    return values[text]


def _looks_like_setting(name: str) -> bool:
    if name.split("_")[0] in _FAMILIES:
        return True
    return bool(difflib.get_close_matches(name.lower(), [n for n in field_names() if len(n) >= 8], n=1, cutoff=0.88))
