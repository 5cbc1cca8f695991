"""Switches of Inductor, torch.compile's compiler: what is worth a measurement, and what is set because it won one.

`python -m benchmarks.bench_step --ways torch --inductor all` measures each beside the step without it. One that makes the
step faster beyond the spread gets the row that shows it as its `figure`, and is set from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch


class Switch(NamedTuple):
    """Settings of Inductor that belong together.

    Attributes:
        name: for people.
        options: names in `torch._inductor.config`, as torch.compile's `options` takes them, and their values.
        why: what speaks for it.
        figure: the measurement for which it is set: GPU, commit, ms per step without and with it; empty: not set.
    """

    name: str
    options: Mapping[str, Any]
    why: str
    figure: str = ""


SWITCHES = (
    Switch(
        "mix_order_reduction_off",
        {"triton.mix_order_reduction": False},
        "TORCHINDUCTOR_MIX_ORDER_REDUCTION=0: #1420 reports 5.9 ms less per backward pass with torch 2.11",
    ),
    Switch("pdl", {"triton.enable_pdl": True}, "TORCHINDUCTOR_ENABLE_PDL=1: a kernel begins while the last one ends"),
    Switch("combo_kernels", {"combo_kernels": True}, "independent small kernels in one launch"),
    Switch(
        "auto_chunker",
        {"auto_chunker.enable": True},
        "TORCHINDUCTOR_AUTO_CHUNKER=1: head and loss in chunks, for vocabularies from 4,096 on",
    ),
    Switch(
        "tma_matmul",
        {
            "max_autotune_gemm": True,
            "max_autotune_gemm_backends": "ATEN,TRITON",
            "triton.enable_persistent_tma_matmul": True,
            "triton.enable_template_tma_store": True,
        },
        "ENABLE_PERSISTENT_TMA_MATMUL=1 and ENABLE_TEMPLATE_TMA_STORE=1, which only tuned products use",
    ),
    Switch(
        "cutlass_epilogues",
        {
            "max_autotune_gemm": True,
            "max_autotune_gemm_backends": "ATEN,CUTLASS",
            "cuda.cutlass_epilogue_fusion_enabled": True,
        },
        "CUTLASS_EPILOGUE_FUSION=1: passes inside the products; needs NVIDIA's CUTLASS sources",
    ),
)


def missing_options(options: Iterable[str]) -> list[str]:
    """The names among `options` that this torch's Inductor does not have."""
    # imported here: only a compiled model needs it
    from torch._inductor import config

    known = config.get_config_copy()
    return [name for name in options if name not in known]


def chosen_options(switches: Iterable[Switch] = SWITCHES) -> tuple[dict[str, Any], str]:
    """The options of all switches that have a figure, and what the log says of them.

    A switch that this torch does not have is left out, and the log says so.
    """
    options: dict[str, Any] = {}
    said = []
    for switch in switches:
        if not switch.figure:
            continue
        if missing := missing_options(switch.options):
            said.append(f"{switch.name} left out, torch {torch.__version__} has no {', '.join(missing)}")
        else:
            options |= switch.options
            said.append(f"{switch.name} ({switch.figure})")
    return options, "; ".join(said) or "no switch set, none has won a measurement yet"


def parse_switch(text: str) -> Switch:
    """A switch by its name in `SWITCHES`, or one option as NAME=VALUE.

    Raises:
        ValueError: there is no such switch or option, or the value is not of its type.
    """
    from torch._inductor import config

    name, is_option, value = text.partition("=")
    known = {switch.name: switch for switch in SWITCHES}
    if not is_option and name not in known:
        raise ValueError(f"{name!r} is no switch: expected all, NAME=VALUE, or one of {', '.join(known)}")
    switch = known[name] if not is_option else Switch(text, {name: value}, "asked for")
    if missing := missing_options(switch.options):
        raise ValueError(f"torch {torch.__version__} has no switch {', '.join(missing)}")
    if not is_option:
        return switch
    before = config.get_config_copy()[name]
    if isinstance(before, bool):
        if value not in ("True", "False"):
            raise ValueError(f"{name}: expected True or False, got {value!r}")
        return switch._replace(options={name: value == "True"})
    if not isinstance(before, (int, float, str)):
        raise ValueError(f"{name}: only switches that hold a number or a text can be set here")
    try:
        return switch._replace(options={name: type(before)(value)})
    except ValueError:
        raise ValueError(f"{name}: expected a value like {before!r}, got {value!r}") from None
