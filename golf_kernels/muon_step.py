"""The Triton backend of `muon_step`, one step of Muon. Each kernel launch takes all matrices of a parameter group.

The momentum kernel writes the update directions to Newton-Schulz's workspace. Newton-Schulz orthogonalizes them there,
and the last kernel updates the weights from the workspace. The host never waits for the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from golf_kernels import dispatch, operators
from golf_kernels.muon import Muon, Work, learning_rate_ratio
from golf_kernels.muon_options import coefficients_of
from golf_kernels.newton_schulz import default_compute_dtype, triton_problem
from golf_kernels.sharding import is_dtensor


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        # a float32 tensor on the device is not copied, so that a replayed CUDA graph reads its current value
        return value.reshape(()).to(device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)


def _step_triton(_params: list[Tensor], optimizer: Muon, work: list[Work]) -> None:
    # imported here, because importing golf_kernels must not need Triton
    from golf_kernels import muon_triton
    from golf_kernels import newton_schulz_triton as kernels

    for group, members in work:
        state = [optimizer.moment(p, "momentum_buffer", g) for p in members if (g := p.grad) is not None]
        second = [optimizer.moment(p, "second_moment", p[..., :1]) for p in members] if group["normuon"] else members
        lists = ([p.grad for p in members if p.grad is not None], state, members, second)
        # empty matrices have no address
        matrices = [m for m in zip(*map(kernels.matrices_of, lists), strict=True) if m[2].numel()]
        if not matrices:
            continue
        device = members[0].device
        shapes = tuple((weight.shape[0], weight.shape[1]) for _, _, weight, _ in matrices)
        addresses = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in matrices)
        ratios = tuple(learning_rate_ratio(group["adjust_lr_fn"], *shape) for shape in shapes)
        aligned = all(a % 16 == 0 for row in addresses for a in row) and all(n % 8 == 0 for _, n in shapes)
        dtype = group["compute_dtype"] or default_compute_dtype(members)
        with torch.cuda.device_of(members[0]):
            processors = kernels.processors_of(device)
            plan = kernels.lasting(kernels.make_plan(shapes, kernels.tile_of(dtype), device, processors), device)
            workspace = kernels.Workspace(plan, dtype)
            common = (kernels.lasting(kernels.upload(addresses, device), device), kernels.ROWS)
            muon_triton.momentum(
                plan,
                workspace.work,
                workspace.stats,
                *common,
                beta=_on_device(group["momentum"], device),
                row_eps=group["row_eps"] if group["row_normalize"] else None,
                nesterov=group["nesterov"],
                dampened=group["dampened"],
                aligned=aligned,
            )
            workspace.norms(group["eps"])
            chosen = coefficients_of(group)
            flat = [value for triple in chosen.schedule(group["ns_steps"]) for value in triple]
            start = workspace.iterate(flat, group["eps"], chosen.prescale)
            muon_triton.apply(
                plan,
                workspace.work[start:],
                workspace.stats,
                *common,
                lr=_on_device(group["lr"], device),
                ratios=kernels.lasting(muon_triton.ratio_table(ratios, device), device),
                weight_decay=group["weight_decay"],
                beta2=group["normuon_beta2"] if group["normuon"] else None,
                aligned=aligned,
            )


def _triton_supports(*args: Any) -> str | None:
    if not args:
        return triton_problem([])
    _, optimizer, work = args
    if optimizer.process_group is not None and dist.get_world_size(optimizer.process_group) > 1:
        return "process groups are not supported"
    for group, members in work:
        if any(map(is_dtensor, members)):
            return "DTensor parameters are not supported"
        if isinstance(group["weight_decay"], Tensor):
            return "the Triton kernels take weight_decay as a number, found a tensor"
        tensors = [tensor for p in members for tensor in (p, p.grad, *optimizer.state.get(p, {}).values())]
        if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in tensors):
            return "the Triton kernels take contiguous float32 weights, gradients and moments"
        if group["compute_dtype"] not in (None, torch.float32, torch.bfloat16):
            return f"the Triton kernels multiply in bfloat16 or float32, found {group['compute_dtype']}"
    return triton_problem([])


def _one_step(weights: Sequence[Tensor], gradients: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Returns the weights after the first step of `Muon`, and leaves the given weights unchanged."""
    stepped: list[Tensor] = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for weight, gradient in zip(stepped, gradients, strict=True):
        weight.grad = gradient
    Muon(stepped, lr=0.5, **options).step()
    return [weight.detach() for weight in stepped]


def _inputs(
    make: operators.Make, shapes: Sequence[Sequence[int]] = ((24, 40), (40, 24), (2, 24, 40)), **options: Any
) -> operators.Inputs:
    weights, gradients = ([make(*shape, dtype=torch.float32) for shape in shapes] for _ in range(2))
    return {"weights": weights, "gradients": gradients, **options}


dispatch.register("muon_step", "triton", _step_triton, supports=_triton_supports)
operators.declare(
    operators.Operator(
        "muon_step",
        _one_step,
        _inputs,
        # rows that can be read 16 bytes at a time, and rows that cannot
        cases=[
            {"shapes": [(2048, columns)], "row_normalize": extras, "normuon": extras, "compute_dtype": dtype}
            for columns, dtype, extras in itertools.product((512, 333), (torch.bfloat16, torch.float32), (False, True))
        ],
        called_by="optimize",
        bfloat16_on_cpu=True,
    )
)
