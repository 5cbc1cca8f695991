"""Checks the options of Muon's parameter groups, and converts them to and from the states of other Muon optimizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from golf_kernels.newton_schulz import CoefficientSet, coefficient_set
from golf_kernels.sharding import dtensor_problem, is_dtensor

ADJUST_LR = ("original", "match_rms_adamw")
_NUMBERS = ("lr", "momentum", "weight_decay", "eps", "row_eps")
# numbers that may also be given as tensors
_TENSORS = ("lr", "momentum", "weight_decay")
# options that the states of torch.optim.Muon and of KellerJordan/Muon both have
_REQUIRED = ("lr", "momentum", "weight_decay")
_QUINTIC = coefficient_set("quintic").triples[0]


def coefficients_of(group: dict[str, Any]) -> CoefficientSet:
    triple = group["ns_coefficients"]
    if triple is None:
        return coefficient_set(group["coefficients"])
    return CoefficientSet("ns_coefficients", (tuple(triple),), "the argument ns_coefficients")


def resolved(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a group's `ns_steps` and `ns_coefficients` as numbers, because `torch.optim.Muon` does not accept None.

    Returns an empty dictionary if the coefficients differ between iterations, because `torch.optim.Muon` cannot use
    such coefficients.
    """
    chosen = coefficients_of(group)
    if len(chosen.triples) > 1:
        return {}
    steps = chosen.default_steps if group["ns_steps"] is None else group["ns_steps"]
    return {"ns_steps": steps, "ns_coefficients": chosen.triples[0]}


def adopt(group: dict[str, Any], own: dict[str, Any]) -> None:
    """Adds the options that a loaded group lacks because another kind of Muon saved it. The values come from `own`.

    Args:
        group: the loaded parameter group.
        own: the parameter group of the optimizer that loads.

    Raises:
        ValueError: the optimizer that saved the group is not a Muon.
    """
    missing = [name for name in _REQUIRED if name not in group]
    if missing or "dampening" in group:
        problem = f"no value for {', '.join(missing)}" if missing else "the option dampening, as in torch.optim.SGD"
        raise ValueError(
            f"param_groups: {problem}: expected the state of Muon, torch.optim.Muon or KellerJordan's Muon"
        )
    triple = group.get("ns_coefficients")
    if triple is not None and tuple(triple) == _QUINTIC:
        # torch.optim.Muon saves these numbers by default, and `resolved` saves them for `quintic`
        group["ns_coefficients"] = None
        if "coefficients" not in group and own["coefficients"] != "quintic":
            group["ns_steps"] = own["ns_steps"]
    for name, value in own.items():
        if name != "params":
            group.setdefault(name, value)


def check_group(group: dict[str, Any], divided: bool) -> None:
    """Checks the options and parameters of a group.

    Args:
        group: the group.
        divided: whether the optimizer has a process group.

    Raises:
        ValueError: an option or a parameter is wrong.
    """
    for name in _NUMBERS:
        value = group[name]
        if isinstance(value, Tensor) and name in _TENSORS:
            if value.numel() != 1:
                raise ValueError(
                    f"{name}: expected a float or a tensor of one element, found shape {tuple(value.shape)}"
                )
            value = float(value)
        if not value >= 0.0:
            raise ValueError(f"{name}: expected a number >= 0, found {value}")
    if not 0.0 <= group["normuon_beta2"] < 1.0:
        raise ValueError(f"normuon_beta2: expected 0 <= beta2 < 1, found {group['normuon_beta2']}")
    if group["adjust_lr_fn"] not in (None, *ADJUST_LR):
        raise ValueError(
            f"adjust_lr_fn: expected None or one of {', '.join(ADJUST_LR)}, found {group['adjust_lr_fn']!r}"
        )
    if group["ns_coefficients"] is not None:
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"ns_coefficients: expected three numbers, found {group['ns_coefficients']}")
        if group["coefficients"] != "quintic":
            raise ValueError("ns_coefficients and coefficients: expected one of them, found both")
    coefficients_of(group).schedule(group["ns_steps"])
    dtype = group["compute_dtype"]
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"compute_dtype: expected a floating dtype, found {dtype}")
    for index, param in enumerate(group["params"]):
        problem = _parameter_problem(param, divided)
        if problem is not None:
            raise ValueError(f"params[{index}]: expected {problem}")


def _parameter_problem(param: Tensor, divided: bool) -> str | None:
    if param.ndim not in (2, 3):
        return (
            f"a matrix or a bank of matrices, found shape {tuple(param.shape)}; "
            "give other parameters to torch.optim.AdamW"
        )
    if not param.dtype.is_floating_point:
        return f"a floating dtype, found {param.dtype}"
    if is_dtensor(param):
        if divided:
            return "no DTensor beside process_group; leave process_group at None, a DTensor's mesh has its ranks"
        return dtensor_problem(param)
    return None
