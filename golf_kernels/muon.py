"""Muon on top of `golf::newton_schulz`: a drop-in for `torch.optim.Muon`, with MuonEq-R, NorMuon and sharding over ranks.

One step, for each matrix with gradient g (elementwise parts through `torch._foreach`, one Newton-Schulz call for all):

    m ← m + (1 − β)·(g − m),  u = g + β·(m − g)     (dampened, as torch.optim.Muon; without Nesterov u = m)
    m ← β·m + g,              u = g + β·m           (not dampened, as the published Parallel Muon)
    u ← u / √(Σ_row u² + row_eps)                   (row_normalize)
    O = newton_schulz(u)
    s ← β₂·s + (1 − β₂)·mean_row(O²);  O ← O / (√s + 1e-10), rescaled to its former Frobenius norm     (normuon)
    w ← w·(1 − lr·weight_decay) − lr·ratio·O,  ratio = √max(1, rows / columns)

The Triton backend of `muon_step` (muon_step.py) takes one launch per line for all matrices of a group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from golf_kernels import dispatch
from golf_kernels.newton_schulz import (
    CoefficientSet,
    coefficient_set,
    default_compute_dtype,
    newton_schulz,
)
from golf_kernels.sharding import orthogonalize_sharded

ADJUST_LR = ("original", "match_rms_adamw")
_NORMUON_EPS = 1e-10
# a group, and those of its parameters on one device that have a gradient
Work = tuple[dict[str, Any], list[Tensor]]
# the options of a group of torch.optim.Muon
_OPTIONS = {"lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"}
# the options that it lacks, and their defaults
_EXTRAS: dict[str, Any] = {
    "row_normalize": False,
    "row_eps": 1e-7,
    "normuon": False,
    "normuon_beta2": 0.95,
    "dampened": True,
    "coefficients": "quintic",
    "compute_dtype": None,
}


class Muon(torch.optim.Optimizer):
    """Muon with the arguments of `torch.optim.Muon`, whose calls and `state_dict` work here unchanged.

    Every option can differ between parameter groups, and `lr` and `momentum` may change from step to step. The host
    never waits for the GPU. A step can be captured in a CUDA graph after a step with the same tensors; `lr` and
    `momentum` must then be tensors on the device, which each replay reads.

    Args:
        params: matrices `(rows, columns)` and banks `(b, rows, columns)`, or groups of them.
        lr: learning rate; a float or a one-element tensor.
        weight_decay: decoupled: w ← w·(1 − lr·weight_decay).
        momentum: β; a float or a one-element tensor. If β changes, dampened and not dampened momentum weigh old
            gradients differently; with a constant β they differ by a factor that Newton-Schulz removes.
        nesterov: look ahead by one momentum step.
        ns_coefficients: one (a, b, c) for every iteration, as in `torch.optim.Muon`; None takes `coefficients`.
        eps: updates with a norm below it count as zero.
        ns_steps: iterations; None takes the coefficient set's own number, which is 5 for `quintic`.
        adjust_lr_fn: `original` (None is the same): ratio √max(1, rows / columns); `match_rms_adamw`:
            0.2·√max(rows, columns).
        row_normalize: MuonEq-R: rows of the update to unit length before Newton-Schulz.
        row_eps: added to a row's squared length. The published 1e-7 is for `dampened=False`, because a dampened update
            is (1 − β) times as large; #1471's maximum of the length and 1e-7 is 1e-14 here. With 0 a row of zeros becomes
            NaN.
        normuon: NorMuon: rows scaled by their running second moment after Newton-Schulz.
        normuon_beta2: decay of that second moment, which starts at 0 without bias correction.
        dampened: the first of the two formulas of the momentum in `golf_kernels.muon`; False: the second.
        coefficients: a name in `golf_kernels.newton_schulz.COEFFICIENTS`.
        compute_dtype: of the Newton-Schulz products; None: bfloat16 on CUDA, float32 on a CPU, float64 for float64.
        process_group: ranks that divide the Newton-Schulz work. All must hold the same parameters and the same
            (already reduced) gradients. Each orthogonalizes the matrices assigned to it by cost, and one all-gather
            sends all results to all ranks. The state is the same on every rank, so a `state_dict` fits any world size.
            A deep copy has the same group; an optimizer with a group cannot be pickled.

    Raises:
        ValueError: an option or a parameter's shape does not fit.
        RuntimeError: complex parameters or sparse gradients.

    Source:
        https://kellerjordan.github.io/posts/muon/; NorMuon arXiv:2510.05491; momentum and row norms of the
        Parameter Golf records.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | None = None,
        eps: float = 1e-7,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = None,
        *,
        row_normalize: bool = False,
        row_eps: float = 1e-7,
        normuon: bool = False,
        normuon_beta2: float = 0.95,
        dampened: bool = True,
        coefficients: str = "quintic",
        compute_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.process_group = process_group
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "row_normalize": row_normalize,
            "row_eps": row_eps,
            "normuon": normuon,
            "normuon_beta2": normuon_beta2,
            "dampened": dampened,
            "coefficients": coefficients,
            "compute_dtype": compute_dtype,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters with options of its own; if one does not fit, nothing changes."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        # torch's state lacks it
        group = None if self.process_group is None else _SameGroup(self.process_group)
        return {**super().__getstate__(), "process_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            for name, value in _EXTRAS.items():
                group.setdefault(name, value)
            if missing := _OPTIONS - set(group):
                raise ValueError(
                    f"param_groups: no value for {', '.join(sorted(missing))}: expected the state of Muon or torch.optim.Muon"
                )
            _check_group(group)
        super().__setstate__(state)
        held = self.__dict__.setdefault("process_group", None)
        self.process_group = held.group if isinstance(held, _SameGroup) else held

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work: list[Work] = []
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if param.grad.is_complex() or param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"Muon: expected real dense gradients, found {param.grad.dtype}, {param.grad.layout}"
                    )
            devices = dict.fromkeys(param.device for param in params)
            work += [(group, [param for param in params if param.device == device]) for device in devices]
        if work:
            dispatch.call("muon_step", [param for _, params in work for param in params], self, work)
        return loss

    def _step(self, work: list[Work]) -> None:
        calls: dict[Any, list[Tensor]] = {}
        for group, params in work:
            calls.setdefault(_call_key(group, params), []).extend(self._updates(group, params))
        results = {key: iter(self._orthogonalize(updates, key)) for key, updates in calls.items()}
        for group, params in work:
            orthogonal = [next(results[_call_key(group, params)]) for _ in params]
            self._apply(group, params, orthogonal)

    def _updates(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Momentum, Nesterov and row normalization: the matrices that Newton-Schulz gets."""
        grads = [param.grad for param in params if param.grad is not None]
        buffers = [self.moment(param, "momentum_buffer", grad) for param, grad in zip(params, grads, strict=True)]
        momentum = group["momentum"]
        if isinstance(momentum, Tensor):
            # half precision would round β
            momentum = momentum.reshape(()).to(grads[0].device, _wide_dtype(grads[0]))
            torch._foreach_mul_(buffers, momentum)
            weighted = list(torch._foreach_mul(grads, 1 - momentum)) if group["dampened"] else grads
            torch._foreach_add_(buffers, weighted)
            updates = buffers
            if group["nesterov"]:
                updates = list(torch._foreach_mul(buffers, momentum))
                torch._foreach_add_(updates, weighted)
        elif group["dampened"]:
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            updates = list(torch._foreach_lerp(grads, buffers, momentum)) if group["nesterov"] else buffers
        else:
            _multiply(buffers, momentum)
            torch._foreach_add_(buffers, grads)
            updates = list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers
        if group["row_normalize"]:
            updates = [_row_normalize(u, group["row_eps"]) for u in updates]
        return updates

    def moment(self, param: Tensor, name: str, like: Tensor) -> Tensor:
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        buffer: Tensor = state[name]
        return buffer

    def _orthogonalize(self, updates: list[Tensor], key: Any) -> list[Tensor]:
        chosen, steps, eps, dtype, _ = key
        run = functools.partial(newton_schulz, coefficients=chosen, steps=steps, eps=eps, compute_dtype=dtype)
        if self.process_group is None or dist.get_world_size(self.process_group) == 1:
            return run(updates)
        return orthogonalize_sharded(updates, run, dtype, self.process_group)

    def _apply(self, group: dict[str, Any], params: list[Tensor], orthogonal: list[Tensor]) -> None:
        """NorMuon, scale, weight decay and the update of the weights."""
        if group["normuon"]:
            rows = [_wide(o).square().mean(-1, keepdim=True).to(o.dtype) for o in orthogonal]
            moments = [self.moment(param, "second_moment", row) for param, row in zip(params, rows, strict=True)]
            torch._foreach_lerp_(moments, rows, 1 - group["normuon_beta2"])
            orthogonal = [_normuon(o, moment) for o, moment in zip(orthogonal, moments, strict=True)]
        lr, decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = lr.reshape(()).to(params[0].device)
        _multiply(params, 1 - lr * decay)
        alike: dict[float, list[tuple[Tensor, Tensor]]] = {}
        for param, o in zip(params, orthogonal, strict=True):
            ratio = learning_rate_ratio(group["adjust_lr_fn"], *param.shape[-2:])
            alike.setdefault(ratio, []).append((param, o))
        for ratio, pairs in alike.items():
            moved, updates = (list(column) for column in zip(*pairs, strict=True))
            if isinstance(lr, Tensor):
                torch._foreach_mul_(updates, lr * -ratio)
                torch._foreach_add_(moved, updates)
            else:
                torch._foreach_add_(moved, updates, alpha=-lr * ratio)


class _SameGroup:
    """A process group in an optimizer's state: copies keep it, and pickling refuses it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _SameGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Muon: a process group cannot be pickled: expected state_dict() to be saved, which fits any world size, or "
            "process_group = None before"
        )


def _multiply(tensors: list[Tensor], factor: float | Tensor) -> None:
    if isinstance(factor, Tensor) or not tensors[0].is_cpu:
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        # _foreach_mul_ rounds the factor to the dtype of CPU tensors, which changes the decay
        tensor.mul_(factor)


def learning_rate_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """Factor on the learning rate of a matrix: √max(1, rows / columns), or 0.2·√max(rows, columns)."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(1, columns)))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    # squares overflow float16, whose smallest number is larger than 1e-10
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _row_normalize(update: Tensor, row_eps: float) -> Tensor:
    if not update.numel():
        return update
    wide = _wide(update)
    # rows are divided by their largest entry first, where squares could overflow float32
    unit = wide.abs().amax(-1, keepdim=True).clamp_min(1).reciprocal()
    wide = wide * unit
    return (wide * (wide.square().sum(-1, keepdim=True) + row_eps * unit.square()).rsqrt()).to(update.dtype)


def _normuon(orthogonal: Tensor, second_moment: Tensor) -> Tensor:
    wide = _wide(orthogonal)
    before = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    scaled = wide / (_wide(second_moment).sqrt() + _NORMUON_EPS)
    after = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    rescaled: Tensor = scaled * (before / (after + _NORMUON_EPS))
    return rescaled.to(orthogonal.dtype)


def _call_key(group: dict[str, Any], params: Sequence[Tensor]) -> Any:
    dtype = group["compute_dtype"] or default_compute_dtype(params)
    return coefficients_of(group), group["ns_steps"], group["eps"], dtype, params[0].device


def coefficients_of(group: dict[str, Any]) -> CoefficientSet:
    triple = group["ns_coefficients"]
    if triple is None:
        return coefficient_set(group["coefficients"])
    return CoefficientSet("ns_coefficients", (tuple(triple),), "the argument ns_coefficients")


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay", "eps", "row_eps"):
        value = group[name]
        if isinstance(value, Tensor) and name in ("lr", "momentum"):
            if value.numel() != 1:
                raise ValueError(
                    f"{name}: expected a float or a tensor of one element, found shape {tuple(value.shape)}"
                )
        elif not value >= 0.0:
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
    for index, param in enumerate(group["params"]):
        if param.ndim not in (2, 3):
            raise ValueError(
                f"params[{index}]: expected a matrix or a bank of matrices, found shape {tuple(param.shape)}; "
                "give other parameters to torch.optim.AdamW"
            )


def _step_torch(_params: list[Tensor], optimizer: Muon, work: list[Work]) -> None:
    optimizer._step(work)


dispatch.register("muon_step", "torch", _step_torch)
