"""The optimizer Muon: replaces `torch.optim.Muon`, adds MuonEq-R and NorMuon, and can divide its work among ranks.

One step computes, for each weight matrix w with gradient g, momentum m and second moment s:

    m ← m + (1 − β)·(g − m),  u = g + β·(m − g)     (dampened, as torch.optim.Muon; without Nesterov u = m)
    m ← β·m + g,              u = g + β·m           (not dampened, as the published Parallel Muon)
    u ← u / √(Σ_row u² + row_eps)                   (row_normalize)
    O = newton_schulz(u)
    s ← β₂·s + (1 − β₂)·mean_row(O²);  O ← O / (√s + 1e-10), rescaled to its former Frobenius norm     (normuon)
    w ← w·(1 − lr·weight_decay) − lr·ratio·O,  ratio = √max(1, rows / columns)

One `golf::newton_schulz` call takes all matrices with the same options. The other lines use `torch._foreach` functions.
In the Triton backend (muon_step.py), each kernel launch takes all matrices of a parameter group.
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
from golf_kernels.muon_options import adopt, check_group, coefficients_of, resolved
from golf_kernels.newton_schulz import default_compute_dtype, newton_schulz
from golf_kernels.sharding import is_dtensor, orthogonalize_sharded, placed_as, replicated

_NORMUON_EPS = 1e-10
# a parameter group, and its parameters that have a gradient and are on one device and mesh
Work = tuple[dict[str, Any], list[Tensor]]


class Muon(torch.optim.Optimizer):
    """Muon, with all arguments of `torch.optim.Muon` and some more.

    Code and a `state_dict` made for `torch.optim.Muon` work unchanged. Every option can differ between parameter
    groups. `lr` and `momentum` may change from step to step. The host never waits for the GPU. A CUDA graph can capture
    a step after one ordinary step with the same tensors. For a graph, `lr` and `momentum` must be tensors on the
    device; each replay reads them.

    Args:
        params: matrices `(rows, columns)` and banks of matrices `(b, rows, columns)`, or parameter groups of them.
            DTensors (FSDP2) must be on a mesh of one dimension; each matrix is gathered and orthogonalized on one rank.
            A Conv1d weight also has three dimensions, but is not a bank of matrices: give it to another optimizer.
        lr: learning rate; a float or a one-element tensor.
        weight_decay: decoupled weight decay: w ← w·(1 − lr·weight_decay); a float or a one-element tensor.
        momentum: β; a float or a one-element tensor.
        nesterov: take the Nesterov direction u, which looks ahead by one momentum step, instead of u = m.
        ns_coefficients: (a, b, c) of every iteration, as in `torch.optim.Muon`; None takes `coefficients`.
        eps: smallest divisor of an update: u / max(‖u‖_F, eps).
        ns_steps: number of iterations; None takes the default of the coefficient set, 5 for `quintic`.
        adjust_lr_fn: factor on the learning rate of a matrix. `original` or None: √max(1, rows / columns);
            `match_rms_adamw`: 0.2·√max(rows, columns).
        row_normalize: MuonEq-R: scales each row of the update to length 1 before Newton-Schulz.
        row_eps: number that `row_normalize` adds to a row's squared length. The published 1e-7 belongs to
            `dampened=False`; a dampened update is (1 − β) times as large. Submission #1471 divides by
            max(length, 1e-7); the corresponding row_eps is 1e-14. With 0, a row of zeros becomes NaN.
        normuon: NorMuon: after Newton-Schulz, divides each row by the root of its running second moment.
        normuon_beta2: decay of this second moment, which starts at 0 and has no bias correction.
        dampened: True selects the first momentum formula of `golf_kernels.muon`, False the second. If β is constant,
            both give updates u that differ only by a factor, which Newton-Schulz removes. If β changes, the formulas
            weight old gradients differently.
        coefficients: a name in `golf_kernels.newton_schulz.COEFFICIENTS`.
        compute_dtype: dtype of the Newton-Schulz products. None: float64 for float64 parameters, otherwise bfloat16 on
            CUDA and on a CPU with bfloat16 products, else float32.
        process_group: ranks that divide the Newton-Schulz work. All ranks must hold the same parameters and the same,
            already reduced, gradients. Each rank orthogonalizes the matrices assigned to it by cost. One all-gather
            then sends all results to all ranks. The optimizer's state is the same on every rank, so a `state_dict` fits
            any number of ranks. A deep copy has the same group. An optimizer with a group cannot be pickled.

    Raises:
        ValueError: an option or the shape of a parameter is wrong.
        RuntimeError: `step` finds a complex or sparse gradient, or a DTensor gradient with other placements than its
            parameter.

    Source:
        https://kellerjordan.github.io/posts/muon/; NorMuon arXiv:2510.05491; momentum and row norms:
        submissions of Parameter Golf.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float | Tensor = 0.95,
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
        """Adds a parameter group with its own options. If an option or a parameter is wrong, it adds nothing."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.process_group is not None)
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Returns the state. `torch.optim.Muon` can load the state, but ignores options that only this class has."""
        state = super().state_dict()
        state["param_groups"] = [group | resolved(group) for group in state["param_groups"]]
        return state

    def __getstate__(self) -> dict[str, Any]:
        # the state of torch.optim.Optimizer lacks the process group
        group = None if self.process_group is None else _SameGroup(self.process_group)
        return {**super().__getstate__(), "process_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # an optimizer that is being unpickled has no groups yet, and the groups in its state lack no option
        own = self.__dict__.get("param_groups", state["param_groups"])
        for group, mine in zip(state["param_groups"], own, strict=True):
            adopt(group, mine)
            check_group(group, self.__dict__.get("process_group") is not None)
        super().__setstate__(state)
        held = self.__dict__.setdefault("process_group", None)
        self.process_group = held.group if isinstance(held, _SameGroup) else held

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss; None without a closure.
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
                if is_dtensor(param) and getattr(param.grad, "placements", None) != param.placements:
                    raise RuntimeError(f"Muon: expected a gradient with the parameter's placements {param.placements}")
            places = dict.fromkeys(map(_place, params))
            work += [(group, [param for param in params if _place(param) == place]) for place in places]
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
        """Applies momentum, Nesterov and row normalization. Returns the matrices for Newton-Schulz."""
        grads = [param.grad for param in params if param.grad is not None]
        buffers = [self.moment(param, "momentum_buffer", grad) for param, grad in zip(params, grads, strict=True)]
        momentum = _traced(group["momentum"])
        if isinstance(momentum, Tensor):
            # β in float32 at least, because half precision would round it
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
            updates = [placed_as(_row_normalize(u, group["row_eps"]), u) for u in updates]
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
        """Applies NorMuon and weight decay, then subtracts the scaled updates from the weights."""
        if group["normuon"]:
            rows = [replicated(_wide(o).square().mean(-1, keepdim=True)).to(o.dtype) for o in orthogonal]
            moments = [self.moment(param, "second_moment", row) for param, row in zip(params, rows, strict=True)]
            torch._foreach_lerp_(moments, rows, 1 - group["normuon_beta2"])
            orthogonal = [placed_as(_normuon(o, moment), o) for o, moment in zip(orthogonal, moments, strict=True)]
        lr, decay = (_traced(group[name]) for name in ("lr", "weight_decay"))
        lr, decay = (v.reshape(()).to(params[0].device) if isinstance(v, Tensor) else v for v in (lr, decay))
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
    """Holds the process group in an optimizer's state. A deep copy holds the same group. Pickling raises TypeError."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _SameGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Muon: a process group cannot be pickled: expected state_dict() to be saved, which fits any world size, or "
            "process_group = None before"
        )


def _traced(value: float | Tensor) -> float | Tensor:
    """Converts a number to a tensor while torch.compile traces a step. Inductor would make some numbers constants."""
    if torch.compiler.is_compiling() and not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    return value


def _multiply(tensors: list[Tensor], factor: float | Tensor) -> None:
    if isinstance(factor, Tensor) or not tensors[0].is_cpu:
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        # on a CPU _foreach_mul_ would round the factor to the tensors' dtype, which would change the weight decay
        tensor.mul_(factor)


def learning_rate_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """Returns 0.2·√max(rows, columns) for `match_rms_adamw`, otherwise √max(1, rows / columns)."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(1, columns)))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    # squares overflow float16, and its smallest number is larger than _NORMUON_EPS
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _row_normalize(update: Tensor, row_eps: float) -> Tensor:
    if not update.numel():
        return update
    wide = _wide(update)
    # a row with an entry above 1 is divided by its largest entry first, so that squares do not overflow float32
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


def _place(param: Tensor) -> Any:
    """Returns a parameter's device and, for a DTensor, its mesh. Both must be the same for all tensors of one call."""
    return param.device, getattr(param, "device_mesh", None)


def _call_key(group: dict[str, Any], params: Sequence[Tensor]) -> Any:
    dtype = group["compute_dtype"] or default_compute_dtype(params)
    return coefficients_of(group), group["ns_steps"], group["eps"], dtype, _place(params[0])


def _step_torch(params: list[Tensor], optimizer: Muon, work: list[Work]) -> None:
    if any(param.is_meta for param in params):
        # the constructor accepts meta parameters, because `benchmarks.aot` compiles the Triton step on them
        raise RuntimeError("Muon: expected data, found the device meta; call to_empty() before you make the optimizer")
    optimizer._step(work)


dispatch.register("muon_step", "torch", _step_torch)
