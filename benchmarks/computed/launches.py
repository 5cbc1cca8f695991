"""Launch every Triton kernel on tensors without data (device `meta`).

The shapes are those of the recipes, and of the `cases` that each operator declares (`golf_kernels.operators`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure.tokens import rank_sequences
from golf_kernels import dispatch, operators, window_nll
from train.config import Config
from train.evaluate.scoring import BATCH_SEQS
from train.model.gpt import GPT
from train.optimize.groups import build_optimizers
from train.recipes import load_recipe, recipe_names


class _Dispatched(TorchDispatchMode):
    """Calls an operator's backend for tensors on `meta`.

    Without this mode PyTorch would call the operator's fake implementation.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "golf":
            return dispatch.call(func._overloadpacket.__name__, *args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_backend(backend: dispatch.Backend, without: Collection[str] = ()) -> Iterator[None]:
    """Run operators on `backend` if they have it, otherwise on PyTorch. Operators in `without` run on PyTorch.

    This skips the check whether the backend can run on this machine.
    """
    left_out = {op for name in without for op in dispatch.members(name)}
    having = {op for op, name, _ in dispatch.registered() if name == backend} - left_out

    def call(op: str, *args: Any) -> Any:
        return dispatch.run_on(backend if op in having else "torch", op, *args)

    with mock.patch.object(dispatch, "call", call), _Dispatched():
        yield


def launch_case(operator: operators.Operator, case: Mapping[str, Any], make: operators.Make) -> list[Tensor]:
    """Call an operator twice on inputs from `make`: without gradients, then with gradients.

    Returns the results and gradients of the second call.
    """
    inputs = operator.inputs(make, **case)
    return operators.run(operator.function, inputs, operators.upstream_gradients(operator.function, inputs, make))


def launch_everything(without: Collection[str] = ()) -> None:
    """Launch the kernels of every recipe and every declared case, but not those of the operators in `without`."""
    with torch.device("meta"):
        for name in recipe_names():
            launch_recipe(load_recipe(name).config(device="cuda"), without)
    launch_cases(without)


def launch_recipe(config: Config, without: Collection[str] = ()) -> None:
    """Launch the kernels of one GPU's training step and evaluation.

    Both run without recurrence and, if the recipe has recurrence, once more with it.
    """
    model = GPT(config)
    ids = torch.empty(rank_sequences(config), config.train_seq_len, dtype=torch.int64)
    count, stride = BATCH_SEQS, config.eval_stride
    late = config.window - (stride or config.window)
    windows = torch.empty(count, config.window, dtype=torch.int64)
    text = torch.empty(config.window + (count - 1) * stride, dtype=torch.int64)
    for recurrence in sorted({False, bool(config.recur_layers)}):
        with on_backend("triton", without):
            model(ids, ids, recurrence=recurrence).backward()
        with on_backend("triton", without), torch.no_grad():
            states = [model.hidden(windows, recurrence=recurrence, rows_from=first) for first in {0, late}]
            if stride and model.overlap_problem is None:
                states.append(
                    model.overlapping_hidden(text, windows=count, stride=stride, recurrence=recurrence, rows_from=late)
                )
            for hidden in states:
                rows = hidden.flatten(0, 1)
                targets = torch.empty(len(rows), dtype=torch.int64)
                window_nll(rows, model.head_weight, targets, logits_rounding=config.logits_rounding)
    muon = build_optimizers(model, config).muon
    assert muon is not None
    for group in muon.param_groups:
        # the dtype that Muon uses on a GPU; the default depends on the device
        group["compute_dtype"] = torch.bfloat16
    with on_backend("triton", without):
        muon.step()


def launch_cases(without: Collection[str] = ()) -> None:
    with on_backend("triton", without):
        for operator in operators.declared().values():
            for case in operator.cases:
                launch_case(operator, case, _empty)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
