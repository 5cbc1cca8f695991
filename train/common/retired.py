"""Removed settings, which files of earlier versions still contain."""

from __future__ import annotations

import warnings
from typing import Any

from train.common.values import ConfigError, format_value

REMOVED_IN = "0.2.0"

RETIRED: dict[str, tuple[Any, ...] | None] = {
    "adam_eps": (1e-8,),
    "beta1": (0.9,),
    "compute_dtype": ("auto",),
    "eval_batch_seqs": None,
    "eval_max_tokens": (0,),
    "eval_share_layer0": None,
    "gptq_act_order": (True,),
    "gptq_block_size": (128,),
    "gptq_calib_temperature": (0.8,),
    "gradient_reduction": ("after", "overlapped"),
    "norm_eps": (2**-23,),
    "normuon_beta2": (0.95,),
    "tied_embed_init_std": (0.005,),
    "unet_skips": (True,),
    "val_batch_size": None,
    "val_max_tokens": (0,),
}
"""Settings removed in `REMOVED_IN`: name → values that this version can reproduce; None: the value does not matter.

If a config.json or artifact has another value, loading it gives a warning, or an error if the setting is in
`MODEL_RETIRED`.
"""
MODEL_RETIRED = frozenset({"norm_eps", "unet_skips"})
"""Removed settings that change what the model computes from its weights. Files with other values are refused."""


def check_retired(name: str, value: Any) -> None:
    """Warn if this version cannot reproduce the value of a removed setting; for one in `MODEL_RETIRED`, raise a ConfigError."""
    supported = RETIRED[name]
    if supported is None or value in supported:
        return
    removed, today = f"{name}={format_value(value)}: {name} was removed in {REMOVED_IN}", format_value(supported[0])
    if name in MODEL_RETIRED:
        raise ConfigError(
            f"{removed}, which supports only {today}: use an earlier version of golf_kernels for this file"
        )
    warnings.warn(f"{removed}, which always uses {today}", stacklevel=3)


def refuse_retired(name: str, source: str) -> None:
    """Raise a ConfigError if the setting `name` was removed. The message begins with `source`, such as `--name`."""
    if name in RETIRED:
        raise ConfigError(f"{source}: {name} was removed in {REMOVED_IN}: leave it out")
