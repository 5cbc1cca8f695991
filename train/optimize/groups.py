"""The optimizers of a model: Muon for matrices, AdamW for embeddings, vectors and scalars."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from golf_kernels.muon import Muon
from golf_kernels.sharding import assign
from train.common.errors import UserError
from train.config import Config
from train.model.parameters import classify
from train.optimize.cuda_graph import Captured, GraphChoice, choose_graph
from train.optimize.reduction import Reduction

KINDS = ("matrix", "embedding", "scalar")

# the values of all published scripts
_ADAM_BETA1, _ADAM_EPS = 0.9, 1e-8

Moments = Mapping[str, Mapping[str, Tensor]]
_Work = Callable[[], object]


class Optimizers:
    """All optimizers of a model, which step together. `build_optimizers` makes this object.

    A step reduces the gradients over ranks. Then it has three computations: the norm of this rank's gradients, clipping
    with Muon, and AdamW. There are collectives between the computations. With CUDA graphs, each computation is one
    graph. A single process has one graph for all three.

    Args:
        model: the model whose gradients `zero_grad` clears.
        kinds: result of `split_parameters`.
        muon: Muon for the matrices that this rank owns; None if it owns no matrix.
        adamw: AdamW for embeddings and scalars, the same on every rank; None if the model has none.
        reduction: exchanges gradients and matrices with other ranks. With CUDA graphs it must keep gradients at fixed
            addresses.
        max_norm: largest L2 norm of the gradient over all parameters; 0: no clipping.
        process_group: the group of all ranks; None for one process.
        graph: whether to replay CUDA graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Mapping[str, Mapping[str, nn.Parameter]],
        muon: Muon | None,
        adamw: torch.optim.AdamW | None,
        reduction: Reduction,
        *,
        max_norm: float,
        process_group: dist.ProcessGroup | None,
        graph: GraphChoice,
    ) -> None:
        self.muon = muon
        self.adamw = adamw
        self.reduction = reduction
        self.graph = graph
        self._model = model
        self._named = {"muon": dict(kinds["matrix"]), "adamw": {**kinds["embedding"], **kinds["scalar"]}}
        self._max_norm = max_norm
        self._process_group = process_group
        self._each = [optimizer for optimizer in (muon, adamw) if optimizer is not None]
        self._groups = [group for optimizer in self._each for group in optimizer.param_groups]
        measuring: list[_Work] = [reduction.measure_gradients] if max_norm > 0 else []
        matrices: list[_Work] = [functools.partial(reduction.scale_gradients, max_norm)] if max_norm > 0 else []
        matrices += [muon.step] if muon is not None else []
        others: list[_Work] = [adamw.step] if adamw is not None else []
        self._measure = self._computation(measuring)
        self._update_matrices = self._computation(matrices, muon)
        self._update_others = self._computation(others, adamw)
        self._update_all = self._computation([*measuring, *matrices, *others], muon, adamw)
        for group in self._groups if graph.on else ():
            # a CUDA graph reads learning rate and momentum from the device
            device = group["params"][0].device
            group.update({name: torch.zeros((), device=device) for name in ("lr", "momentum") if name in group})
            if "capturable" in group:
                group["capturable"] = True

    def _computation(self, work: Sequence[_Work], *stepped: torch.optim.Optimizer | None) -> Callable[[], None]:
        """Return a function that calls the functions in `work` in order, or replays them as a CUDA graph.

        `stepped` are the optimizers whose parameters and moments `work` uses. The returned function must not refer to
        `self`: a reference cycle would keep the process group alive after the interpreter's exit, where gloo aborts.
        """
        each_optimizer = self._each

        def run() -> None:
            for each in work:
                each()

        def tensors() -> list[Tensor]:
            found = [p.grad for optimizer in each_optimizer for p in _parameters(optimizer) if p.grad is not None]
            for optimizer in stepped:
                if optimizer is not None:
                    found += _parameters(optimizer)
                    found += [moment for moments in optimizer.state.values() for moment in moments.values()]
            return found

        return Captured(run, tensors) if self.graph.on and work else run

    def step(self, lr_scale: float, momentum: float) -> Tensor | None:
        """Reduce the gradients over ranks, clip them, and update every parameter.

        The gradient of each micro-batch must already be divided by the number of micro-batches.

        Args:
            lr_scale: factor on every learning rate.
            momentum: Muon's momentum.

        Returns:
            The norm of the gradient before clipping, a scalar on the device, which the next step overwrites. None if
            gradients are not clipped.
        """
        norm = self.reduction.norm if self._max_norm > 0 else None
        self.reduction.reduce_gradients()
        for group in self._groups:
            _set(group, "lr", group["base_lr"] * lr_scale)
            if "momentum" in group:
                _set(group, "momentum", momentum)
        if not self.reduction.exchanges:
            self._update_all()
            return norm
        self._measure()
        if self._max_norm > 0:
            self.reduction.sum_squares()
        self._update_matrices()
        # AdamW runs during the all-gather of the matrices
        self.reduction.start_gathering()
        self._update_others()
        self.reduction.finish_gathering()
        return norm

    def zero_grad(self) -> None:
        """Set all gradients of the model to None, also those of parameters that are not trained."""
        for parameter in self._model.parameters():
            parameter.grad = None

    def reset(self) -> None:
        """Set all moments and step counts to zero, as before the first step."""
        # change the moments in place, because a CUDA graph uses these tensors
        for optimizer in self._each:
            for moments in optimizer.state.values():
                torch._foreach_zero_(list(moments.values()))

    def state_dict(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Collect the moments of all ranks, so that a run may resume on another number of ranks.

        Every rank must call this. Learning rates, weight decays and Muon's momentum are not saved, because they follow
        from the settings and the step.

        Returns:
            Optimizer ("muon" or "adamw") -> parameter name -> name of the moment -> tensor.
        """
        muon = self._moments("muon", self.muon)
        if self._process_group is not None:
            of_ranks: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(dist.get_world_size(self._process_group))]
            own = {name: {key: value.cpu() for key, value in moments.items()} for name, moments in muon.items()}
            dist.all_gather_object(of_ranks, own, group=self._process_group)
            muon = {name: moments for of_rank in of_ranks for name, moments in of_rank.items()}
        return {"muon": muon, "adamw": self._moments("adamw", self.adamw)}

    def _moments(self, key: str, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Tensor]]:
        state = {} if optimizer is None else optimizer.state
        return {name: dict(state[parameter]) for name, parameter in self._named[key].items() if parameter in state}

    def load_state_dict(self, state: Mapping[str, Moments]) -> None:
        """Restore a state that `state_dict` returned, bit for bit. Each rank restores the moments that it needs.

        Raises:
            UserError: the checkpoint has the moments of other parameters.
        """
        for key, parameters in self._named.items():
            # a checkpoint before the first step has no moments
            odd = set(state[key]) ^ set(parameters) if state[key] else set()
            if odd:
                name = min(odd)
                found = "moments are missing" if name in parameters else "this run does not train it"
                raise UserError(
                    f"checkpoint, optimizer {key}, {name}: {found}: resume with the settings that wrote the checkpoint"
                )
        for optimizer, key in ((self.muon, "muon"), (self.adamw, "adamw")):
            if optimizer is None:
                continue
            held = set(_parameters(optimizer))
            for name, parameter in self._named[key].items():
                if parameter not in held:
                    continue
                if state[key]:
                    _check_moments(optimizer, name, parameter, state[key][name])
                _load(optimizer, parameter, state[key].get(name, {}))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _set(group: dict[str, Any], name: str, value: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def _check_moments(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, saved: Any) -> None:
    """Raise a UserError if `saved` is not what the optimizer keeps for the parameter."""
    whole = tuple(parameter.shape)
    expected = {"step": (), "exp_avg": whole, "exp_avg_sq": whole}
    if isinstance(optimizer, Muon):
        group = next(group for group in optimizer.param_groups if any(parameter is one for one in group["params"]))
        second = {"second_moment": (*whole[:-1], 1)} if group["normuon"] else {}
        expected = {"momentum_buffer": whole, **second}
    found = saved
    if isinstance(saved, Mapping):
        found = {key: tuple(value.shape) if isinstance(value, Tensor) else value for key, value in saved.items()}
    if found != expected:
        raise UserError(
            f"checkpoint, optimizer state of {name}: expected {expected}, found {found}: resume with the settings that wrote the checkpoint"
        )


def _load(optimizer: torch.optim.Optimizer, parameter: Tensor, saved: Mapping[str, Tensor]) -> None:
    own = optimizer.state.get(parameter, {})
    if saved and own.keys() != saved.keys():
        optimizer.state[parameter] = {name: v.to(parameter.device, copy=True) for name, v in saved.items()}
        return
    # copy in place, because a CUDA graph uses these tensors. Without saved moments, set them to zero.
    for name, value in own.items():
        value.copy_(saved[name] if saved else torch.zeros_like(value))


def split_parameters(model: nn.Module, config: Config) -> dict[str, dict[str, nn.Parameter]]:
    """Return kind ("matrix", "embedding", "scalar") -> parameter name -> trained parameter, in the model's order."""
    kinds: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in KINDS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds[classify(name, config)][name] = parameter
    return kinds


def build_optimizers(
    model: nn.Module,
    config: Config,
    process_group: dist.ProcessGroup | None = None,
    *,
    owned: Sequence[int] | None = None,
) -> Optimizers:
    """Build Muon and AdamW with the learning rates and weight decays of the settings.

    Muon updates matrices: p <- p (1 - lr wd) - lr sqrt(max(1, rows / columns)) update, with Nesterov momentum. AdamW
    updates embeddings and scalars; the two kinds have separate learning rates and weight decays. Moments have the
    parameter's dtype: bfloat16 for bfloat16 embeddings, as published. Matrices are assigned to ranks so that all ranks
    take about the same time for orthogonalization.

    Args:
        model: the model on its final device, with the same weights on every rank.
        config: the settings.
        process_group: the group of all ranks; None for one process.
        owned: indices of the matrices to update, in order to measure the work of one rank in one process; None: all.

    Raises:
        UserError: `optimizer_graph` is `on`, but the device is not CUDA.
    """
    kinds = split_parameters(model, config)
    graph = choose_graph(config, next(model.parameters()).device)
    replicated = [*kinds["embedding"].values(), *kinds["scalar"].values()]
    matrices = list(kinds["matrix"].values())
    reduction = _build_reduction(replicated, matrices, process_group, owned, fixed=graph.on)
    muon = _build_muon(reduction.owned, config) if reduction.owned else None
    rates = {"embedding": (config.tied_embed_lr, config.embedding_decay), "scalar": (config.scalar_lr, config.adam_wd)}
    groups = [
        {"params": list(kinds[kind].values()), "lr": lr, "base_lr": lr, "weight_decay": decay}
        for kind, (lr, decay) in rates.items()
        if kinds[kind]
    ]
    adamw = _build_adamw(groups, config) if groups else None
    return Optimizers(
        model, kinds, muon, adamw, reduction, max_norm=config.grad_clip_norm, process_group=process_group, graph=graph
    )


def _build_reduction(
    replicated: Sequence[nn.Parameter],
    matrices: Sequence[nn.Parameter],
    process_group: dist.ProcessGroup | None,
    owned: Sequence[int] | None,
    *,
    fixed: bool,
) -> Reduction:
    if process_group is None:
        numbers = range(len(matrices)) if owned is None else owned
        others = [matrix for number, matrix in enumerate(matrices) if number not in numbers]
        return Reduction(replicated, [matrices[number] for number in numbers], others=others, fixed=fixed)
    owners = assign(tuple(tuple(matrix.shape) for matrix in matrices), dist.get_world_size(process_group))
    return Reduction(replicated, matrices, owners, process_group)


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
        # among the published scripts, only #122, the one with NorMuon, multiplies the gradient by 1 - momentum
        dampened=config.normuon,
        coefficients=config.muon_coefficients,
    )


def _build_adamw(groups: list[dict[str, Any]], config: Config) -> torch.optim.AdamW:
    # fused kernels update bfloat16 moments in float32 and round them once
    fused = {parameter.device.type for group in groups for parameter in group["params"]} <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, betas=(_ADAM_BETA1, config.beta2), eps=_ADAM_EPS, fused=fused, foreach=not fused)
