"""Chooses the attention backend of a run: the backend in the settings, or the fastest one for the run's shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from golf_kernels import tuned
from train.common.errors import UserError
from train.config import Config
from train.model.attention import Attention
from train.model.attention_backends import BACKENDS, BY_LENGTH, activate, causal_attention, load_library
from train.model.compile import compiles
from train.model.documents import Documents
from train.model.gpt import resolve_compute_dtype

_ROUNDS = 5


class AttentionChoice(NamedTuple):
    """The name of the chosen backend, and the reason for the choice."""

    name: str
    reason: str


def check_attention(config: Config, device: torch.device) -> dict[str, str | None]:
    """Return backend → reason why it cannot run on this machine; None: it can run.

    Raises:
        UserError: `config.attention` names a backend that cannot run here.
    """
    dtype = resolve_compute_dtype(config)
    problems = {
        name: backend.problem(device, dtype, config.head_dim, name == config.attention)
        for name, backend in BACKENDS.items()
    }
    if config.loader == "packed" and device.type == "cuda":
        masked = [name for name in problems if name not in BY_LENGTH]
        problems |= dict.fromkeys(masked, "the document mask of a packed row is too large")
    if (problem := problems.get(config.attention)) is not None:
        able = ", ".join(name for name, other in problems.items() if other is None)
        raise UserError(f"attention: {config.attention} cannot run: {problem}; these can: {able}")
    return problems


def choose_attention(config: Config, device: torch.device, sequences: int) -> AttentionChoice:
    """Choose the backend that `config.attention` names. "auto" means "sdpa" on a CPU and the fastest backend on a GPU.

    If `python -m golf_kernels tune` has measured the fastest backend for batches of `sequences` sequences, it is used.
    Otherwise the forward and backward passes of each backend are timed on such a batch.

    Raises:
        UserError: the named backend cannot run on this machine, or no backend can run.
    """
    problems = check_attention(config, device)
    if config.attention != "auto":
        return AttentionChoice(config.attention, "as set" + _documents(config, config.attention))
    if device.type != "cuda":
        return AttentionChoice("sdpa", f"PyTorch chooses the kernel on {device.type}{_documents(config, 'sdpa')}")
    if (found := tuned.load()) and compiles(config, device):
        decision = found.data.get("attention", {}).get(batch_shape(config, sequences))
        if decision and problems.get(decision["backend"], "unknown") is None:
            return AttentionChoice(
                decision["backend"],
                f"{decision['reason']}, tuned {found.data['tuned']}{_documents(config, decision['backend'])}",
            )
    names = [name for name, problem in problems.items() if problem is None and name != "math"]
    times = _measure(names, config, device, sequences, problems)
    if not times:
        reasons = "; ".join(f"{name}: {problems[name]}" for name in names)
        raise UserError(
            f"attention: no backend can compute this model's heads: {reasons}: set ATTENTION=math, which always works"
        )
    fastest = min(times, key=times.__getitem__)
    measured = ", ".join(f"{name} {time:.3f}" for name, time in sorted(times.items(), key=lambda item: item[1]))
    absent = "".join(f"; {name}: {problem}" for name, problem in problems.items() if problem is not None)
    return AttentionChoice(fastest, f"fastest, ms forward + backward: {measured}{absent}{_documents(config, fastest)}")


def batch_shape(config: Config, sequences: int) -> str:
    """Describe the shapes and dtype of attention's inputs. A measured choice is valid only for the same description."""
    heads = f"{config.num_heads}/{config.num_kv_heads}x{config.head_dim}"
    dtype = str(resolve_compute_dtype(config)).removeprefix("torch.")
    return f"{sequences}x{config.train_seq_len}x{heads}{' documents' if config.document_masking else ''} {dtype}"


def attention_inputs(
    config: Config, sequences: int, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor, Documents | None, Tensor]:
    """Make random queries, keys, values, documents (if the settings mask them) and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, dtype = (sequences, config.train_seq_len), resolve_compute_dtype(config)
    query, key, value = (
        torch.randn(*shape, heads, config.head_dim, device=device, dtype=dtype, generator=generator).requires_grad_()
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    )
    documents = None
    if config.document_masking:
        documents = Documents(torch.rand(shape, device=device, generator=generator) < 1 / 512)
    gradient = torch.randn(query.shape, device=device, dtype=dtype, generator=generator)
    return query, key, value, documents, gradient


def attention_form(
    name: str, config: Config, device: torch.device, documents: Documents | None
) -> Callable[..., Tensor]:
    """Return the attention function of a backend, compiled if the run compiles."""
    form: Callable[..., Tensor] = functools.partial(causal_attention, documents=documents, backend=name)
    # compile here, so that a backend that cannot be compiled fails now, not in the first step
    return torch.compile(form, dynamic=False, fullgraph=True) if compiles(config, device) else form


def _documents(config: Config, name: str) -> str:
    """Return the end of a log line: how this backend keeps attention inside documents."""
    if not config.document_masking:
        return ""
    return f"; documents as {'sequences of different lengths' if name in BY_LENGTH else 'a mask'}"


def use_attention(model: nn.Module, name: str) -> None:
    """Set the attention backend of every layer."""
    load_library(name)
    activate(name)
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = name


def _measure(
    names: list[str], config: Config, device: torch.device, sequences: int, problems: dict[str, str | None]
) -> dict[str, float]:
    """Measure the median milliseconds of one layer's attention with each backend, forward and backward.

    Attention is compiled if the run compiles. The backends take turns. If a backend fails, `problems` gets the reason,
    and the result does not contain the backend.
    """
    query, key, value, documents, gradient = attention_inputs(config, sequences, device, 0)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    forms = {name: attention_form(name, config, device, documents) for name in names}
    for _ in range(_ROUNDS + 1):
        for name, times in rounds.items():
            if problems[name] is not None:
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                activate(name)
                begin.record()
                forms[name](query, key, value).backward(gradient)
                end.record()
                end.synchronize()
            # libraries and the compiler raise many kinds of errors for shapes that they do not support
            except Exception as error:
                problems[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                continue
            times.append(begin.elapsed_time(end))
    # ignore the first round, which loads kernels and allocates memory
    return {name: sorted(times[1:])[_ROUNDS // 2] for name, times in rounds.items() if problems[name] is None}
