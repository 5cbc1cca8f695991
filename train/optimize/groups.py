"""Which parameter is trained by what: Muon for matrices, AdamW for embeddings and for vectors and scalars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from golf_kernels import dispatch
from golf_kernels.muon import Muon
from golf_kernels.sharding import assign
from train.config import Config
from train.errors import UserError
from train.model.inventory import classify
from train.optimize.capture import Captured
from train.optimize.reduction import Reduction

KINDS = ("matrix", "embedding", "scalar")

# #1392 counts and saves these vectors, but none of its optimizers had them
UNTRAINED = "recur_scales"

Moments = Mapping[str, Mapping[str, Tensor]]


class Optimizers:
    """All optimizers of a model, stepped as one; made by `build_optimizers`.

    Args:
        model: whose gradients are dropped by `zero_grad`.
        kinds: `split_parameters(model, …)`.
        muon: Muon over this rank's share of the matrices; None if it has none.
        adamw: AdamW over embeddings and scalars, the same on every rank; None if there are none.
        reduction: what the ranks exchange.
        max_norm: largest norm of the whole gradient; 0: no clipping.
        process_group: process group of all ranks; None for one process.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Mapping[str, Mapping[str, nn.Parameter]],
        muon: Muon | None,
        adamw: torch.optim.AdamW | None,
        reduction: Reduction,
        *,
        max_norm: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.muon = muon
        self.adamw = adamw
        self._model = model
        self._names = {"muon": dict(kinds["matrix"]), "adamw": {**kinds["embedding"], **kinds["scalar"]}}
        self._reduction = reduction
        self._max_norm = max_norm
        self._group = process_group
        self._each = [optimizer for optimizer in (muon, adamw) if optimizer is not None]
        self._step_muon: Callable[[], object] | None = None if muon is None else muon.step
        if muon is not None and captures(muon):
            for group in muon.param_groups:
                device = group["params"][0].device
                group["lr"], group["momentum"] = (torch.zeros((), device=device) for _ in range(2))
            self._step_muon = Captured(muon.step, self._muon_tensors)

    def _muon_tensors(self) -> list[Tensor]:
        assert self.muon is not None
        parameters = [parameter for group in self.muon.param_groups for parameter in group["params"]]
        moments = [moment for p in parameters for moment in self.muon.state.get(p, {}).values()]
        return [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments]

    @property
    def reduction(self) -> Reduction:
        """What the ranks exchange."""
        return self._reduction

    def step(self, lr_scale: float, momentum: float) -> Tensor | None:
        """Reduce the gradients over the ranks, clip them, and move every parameter.

        Every rank must have accumulated the mean over its own micro-batches (loss / accumulation).

        Args:
            lr_scale: factor on the learning rate of every group.
            momentum: Muon's momentum in this step.

        Returns:
            The gradient's norm before clipping (0-dimensional, on the device), None where nothing is clipped.
        """
        self._reduction.reduce_gradients()
        norm = self._reduction.clip_gradients(self._max_norm) if self._max_norm > 0 else None
        for optimizer in self._each:
            for group in optimizer.param_groups:
                _set(group, "lr", group["base_lr"] * lr_scale)
        if self.muon is not None and self._step_muon is not None:
            for group in self.muon.param_groups:
                _set(group, "momentum", momentum)
            self._step_muon()
        # the matrices travel while the replicated parameters are updated
        self._reduction.start_gathering()
        if self.adamw is not None:
            self.adamw.step()
        self._reduction.finish_gathering()
        return norm

    def zero_grad(self) -> None:
        """Drop every gradient of the model, those of parameters in no group too."""
        kept: dict[Tensor, Tensor] = {}
        if isinstance(self._step_muon, Captured) and self._group is None:
            # a graph wants the next gradients where these are
            kept = {p: p.grad for p in self._names["muon"].values() if p.grad is not None}
            torch._foreach_zero_([*kept.values()])
        for parameter in self._model.parameters():
            if parameter not in kept:
                parameter.grad = None

    def reset(self) -> None:
        """Forget all moments and step counts, Muon's momentum included, as after the warm-up."""
        for optimizer in self._each:
            if optimizer is self.muon and isinstance(self._step_muon, Captured):
                # a graph holds these very tensors, and Muon's moments begin as zeros
                moments = [moment for state in optimizer.state.values() for moment in state.values()]
                if moments:
                    torch._foreach_zero_(moments)
            else:
                optimizer.state.clear()

    def state_dict(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The moments of all parameters of all ranks, so that any number of ranks can go on from them.

        Every rank must call it, whichever of them writes it to a file.

        Returns:
            Optimizer ("muon", "adamw") -> parameter name -> name of the moment -> tensor. Rates, decays and momentum
            are not in it: they come from the configuration and the step.
        """
        muon = self._moments("muon", self.muon)
        if self._group is not None:
            shares: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(dist.get_world_size(self._group))]
            own = {name: {key: value.cpu() for key, value in moments.items()} for name, moments in muon.items()}
            dist.all_gather_object(shares, own, group=self._group)
            muon = {name: moments for share in shares for name, moments in share.items()}
        return {"muon": muon, "adamw": self._moments("adamw", self.adamw)}

    def _moments(self, key: str, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Tensor]]:
        state = {} if optimizer is None else optimizer.state
        return {name: dict(state[parameter]) for name, parameter in self._names[key].items() if parameter in state}

    def load_state_dict(self, state: Mapping[str, Moments]) -> None:
        """Go on from `state_dict`'s result, bit for bit; each rank copies what it needs.

        Raises:
            UserError: the checkpoint has moments of other parameters than this run trains.
        """
        for key, parameters in self._names.items():
            # before the first step there are no moments
            odd = set(state[key]) ^ set(parameters) if state[key] else set()
            if odd:
                name = min(odd)
                found = "no moments" if name in parameters else f"moments that this run has no {key} for"
                raise UserError(
                    f"checkpoint, optimizer {key}, {name}: {found}: resume with the checkpoint's own settings"
                )
        self.reset()
        for optimizer, key in ((self.muon, "muon"), (self.adamw, "adamw")):
            if optimizer is None:
                continue
            held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            for name, moments in state[key].items():
                parameter = self._names[key][name]
                if parameter in held:
                    optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in moments.items()}


def captures(muon: Muon) -> bool:
    """Whether Muon's step is replayed as a CUDA graph: where it is the fused one, which reads its rates on the GPU."""
    device = muon.param_groups[0]["params"][0].device.type
    return device == "cuda" and dispatch.choose("muon_step", device=device).backend == "triton"


def _set(group: dict[str, Any], name: str, value: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def split_parameters(model: nn.Module, config: Config) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters of each kind ("matrix", "embedding", "scalar") by name, in the model's order.

    `recur_scales` and whatever takes no gradient are in none.
    """
    kinds: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in KINDS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and UNTRAINED not in name.split("."):
            kinds[classify(name, config)][name] = parameter
    return kinds


def build_optimizers(
    model: nn.Module,
    config: Config,
    process_group: dist.ProcessGroup | None = None,
    *,
    owned: Sequence[int] | None = None,
) -> Optimizers:
    """Muon and AdamW over the classes of parameters, with the configuration's rates and decays.

    Matrices: Muon, p <- p (1 - lr wd) - lr sqrt(max(1, rows / columns)) update, with Nesterov momentum. Embeddings and
    scalars: AdamW, each with its own rate and decoupled decay; moments have the parameter's dtype, so those of bfloat16
    embeddings are bfloat16, as published. Over ranks each matrix has one owner, so that the orthogonalization costs
    every rank about the same.

    Args:
        model: its parameters are on their final device, with the same values on every rank.
        config: `matrix_lr`, `tied_embed_lr`, `scalar_lr`, `muon_*`, `normuon*`, `beta*`, `adam_eps`, `*_wd`,
            `grad_clip_norm`, `gradient_reduction`.
        process_group: process group of all ranks; None for one process.
        owned: without a group, numbers of the matrices that are updated: one rank's share, to measure it alone.
    """
    kinds = split_parameters(model, config)
    matrices = list(kinds["matrix"].values())
    owners: tuple[int, ...] = ()
    if process_group is not None:
        owners = assign(tuple(tuple(matrix.shape) for matrix in matrices), dist.get_world_size(process_group))
    kind: type[Reduction] = Reduction
    if config.gradient_reduction == "overlapped":
        from train.optimize.overlap import OverlappedReduction

        kind = OverlappedReduction
    reduction = kind([*kinds["embedding"].values(), *kinds["scalar"].values()], matrices, owners, process_group)
    updated = reduction.owned if owned is None else [matrices[number] for number in owned]
    muon = _build_muon(updated, config) if updated else None
    rates = {"embedding": (config.tied_embed_lr, config.embedding_decay), "scalar": (config.scalar_lr, config.adam_wd)}
    groups = [
        {"params": list(kinds[kind].values()), "lr": lr, "base_lr": lr, "weight_decay": decay}
        for kind, (lr, decay) in rates.items()
        if kinds[kind]
    ]
    adamw = _build_adamw(groups, config) if groups else None
    return Optimizers(model, kinds, muon, adamw, reduction, max_norm=config.grad_clip_norm, process_group=process_group)


def _build_muon(matrices: Sequence[Tensor], config: Config) -> Muon:
    return Muon(
        [{"params": matrices, "base_lr": config.matrix_lr}],
        lr=config.matrix_lr,
        weight_decay=config.muon_wd,
        momentum=config.muon_momentum,
        nesterov=True,
        ns_steps=config.muon_backend_steps,
        row_normalize=config.muon_eq_r,
        row_eps=config.muon_row_eps,
        normuon=config.normuon,
        normuon_beta2=config.normuon_beta2,
        # among the published forms only #122's NorMuon weighs a gradient by 1 - momentum
        dampened=config.normuon,
        coefficients=config.muon_coefficients,
    )


def _build_adamw(groups: list[dict[str, Any]], config: Config) -> torch.optim.AdamW:
    # the fused kernels compute bfloat16 moments in float32 and round them once
    fused = {parameter.device.type for group in groups for parameter in group["params"]} <= {"cpu", "cuda"}
    return torch.optim.AdamW(
        groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=fused, foreach=not fused
    )
