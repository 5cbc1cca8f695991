"""Tells whether this CPU multiplies bfloat16 faster than float32."""

from __future__ import annotations

import functools
import os

import torch


def multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions (AMX or AVX-512 BF16).

    With them, products in bfloat16 are faster than in float32; docs/log.md has the measurements.
    """
    # Triton's interpreter cannot multiply bfloat16
    return _has_instructions() and os.environ.get("TRITON_INTERPRET") != "1"


@functools.cache
def _has_instructions() -> bool:
    # without oneDNN, PyTorch converts every operand
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
