"""The backends of causal attention: FlashAttention 3 and 4 if installed, and PyTorch's kernels.

To keep attention inside documents, the backends fa3 and flash take each document as a sequence of its own length.
The other backends take a mask.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.common.errors import UserError
from train.model.documents import Documents

# on shorter sequences PyTorch's kernel, with its backward pass, is slower in bfloat16 than in float32: docs/log.md
_LONG_ON_CPU = 512
# FlashAttention 3 on Hugging Face's hub. A commit, because a branch would run code that nobody has seen
_HUB = "kernels-community/flash-attn3"
_HUB_REVISION = "9542c462013476380ce4b395b9ddc0e8118161ee"

Core = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]


class AttentionBackend(NamedTuple):
    """A backend of causal attention."""

    run: Core
    # says why the backend cannot run on a device, with a compute dtype and a head dimension; None: it can run. The last
    # argument: whether the settings name the backend, which allows it to download its library
    problem: Callable[[torch.device, torch.dtype, int, bool], str | None]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, documents: Documents | None = None, backend: str = "sdpa"
) -> Tensor:
    """Causal grouped-query attention.

    y[t, h] = Σ_{s ≤ t} softmax_s(q[t, h] · k[s, g] / √D) v[s, g], g = ⌊h · H_kv / H⌋

    With `documents`, the sums cover only positions s in the document of t.

    Args:
        query: `(B, R, H, D)`, queries of the last R of T positions; usually R = T.
        key: `(B, T, H_kv, D)`.
        value: `(B, T, H_kv, D)`.
        documents: if given, attention stays inside each document.
        backend: a name in `BACKENDS`.

    Returns:
        y `(B, R, H, D)`.

    Raises:
        ValueError: `backend` is not in `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: expected one of {sorted(BACKENDS)}")
    return BACKENDS[backend].run(query, key, value, documents)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
    rows, length, heads = query.shape[1], key.shape[1], query.shape[2]
    mask = None if documents is None else documents.mask()[:, :, length - rows :]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    # a single query needs no mask: it is the last position, which sees every key
    if mask is None and 1 < rows < length:
        # is_causal aligns the first query with the first key, but here the last query belongs to the last key. The
        # flash kernel aligns the last ones; torch.compile cannot trace its public name, causal_lower_right
        if (
            query.is_cuda
            and _on_cuda(query.device, query.dtype, query.shape[-1], True) is None
            and query.shape[-1] <= 256
        ):
            flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)[0]
            return flash.transpose(1, 2)
        mask = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
    if mask is not None and query.is_cuda:
        # PyTorch's memory-efficient kernel takes a mask, but only as many key heads as query heads
        key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    dtype = query.dtype
    if query.is_cpu and dtype == torch.bfloat16 and length < _LONG_ON_CPU:
        query, key, value = query.float(), key.float(), value.float()
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and rows > 1, enable_gqa=True
    )
    return output.transpose(1, 2).to(dtype)


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Repeat each head of keys or values `(B, H_kv, T, D)` for all its query heads: `(B, heads, T, D)`."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _sdpa_by(kernel: SDPBackend) -> Core:
    def run(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        # not every kernel takes a mask: let PyTorch choose a kernel that does
        if documents is not None or query.shape[1] < key.shape[1]:
            return _sdpa(query, key, value, documents)
        with sdpa_kernel(kernel):
            return _sdpa(query, key, value, None)

    return run


def _flash_attention_3(download: bool) -> Any:
    library = _imported("flash_attn_interface")
    if not download or not isinstance(library, ImportError) or isinstance(hub := _imported("kernels"), ImportError):
        return library
    try:
        return hub.get_kernel(_HUB, revision=_HUB_REVISION)
    # without a network or with another torch, any error is possible
    except Exception as error:
        return ImportError(f"{_HUB} cannot be loaded: {_first_line(error)}")


def _flash_attention_4() -> Any:
    """FlashAttention 4, whose functions are no operators of PyTorch: it runs as PyTorch's flash attention."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return ImportError(f"torch {torch.__version__} cannot run FlashAttention 4 as its flash attention")
    return _imported("flash_attn.cute")


def activate(name: str) -> None:
    """Make PyTorch's flash attention run on FlashAttention 4 for the backend fa4, and on its own kernels for others."""
    global _active
    wanted = "FA4" if name == "fa4" else ""
    if wanted == _active:
        return
    if wanted:
        torch.nn.attention.activate_flash_attention_impl(wanted)
    else:
        torch.nn.attention.restore_flash_attention_impl()
    _active = wanted


def _flash_attention_2(download: bool) -> Any:
    """PyTorch's FlashAttention 2 for sequences of different lengths."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    # from torch 2.13 on, grouped heads need an argument. Check here, because torch.compile cannot trace the check
    grouped = "enable_gqa" in inspect.signature(attend).parameters
    return functools.partial(attend, enable_gqa=True) if grouped else attend


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return error
    # a library built for another torch may raise any error while it loads its native code
    except Exception as error:
        return ImportError(f"{module} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


_FINDERS: dict[str, Callable[[bool], Any]] = {
    "fa3": _flash_attention_3,
    "fa4": lambda download: _flash_attention_4(),
    "flash": _flash_attention_2,
}
_libraries: dict[str, Any] = {}
# the implementation of PyTorch's flash attention that `activate` has set; empty: PyTorch's own
_active = ""


def _library(name: str, download: bool = False) -> Any:
    """Import an optional attention library, once. If the import fails, return the error.

    With `download`, a library that is not installed may be downloaded.
    """
    if name not in _libraries or (download and isinstance(_libraries[name], ImportError)):
        _libraries[name] = _FINDERS[name](download)
    return _libraries[name]


def load_library(name: str) -> None:
    """Import the library of the chosen backend, if it has one. Call this before torch.compile, which cannot trace it.

    Raises:
        UserError: the library cannot be imported.
    """
    if name in _FINDERS and isinstance(error := _library(name, download=True), ImportError):
        raise UserError(f"attention: {name} cannot run: {error}")


def _flash_library(name: str) -> Core:
    def run(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        library = _library(name)
        if documents is not None and query.shape[1] < key.shape[1]:
            # document offsets apply to queries and keys alike, but here only the last positions have queries
            return _sdpa(query, key, value, documents)
        if documents is None:
            # if there are fewer queries than keys, the library aligns the last query with the last key
            output = library.flash_attn_func(query, key, value, causal=True)
        else:
            offsets, longest = documents.offsets(), query.shape[1]
            flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
            output = library.flash_attn_varlen_func(
                *flat, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
            )  # fmt: skip
        # some releases return (output, log-sum-exp)
        attended: Tensor = output[0] if isinstance(output, tuple) else output
        return attended.view_as(query)

    return run


def _flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
    # FlashAttention 2 takes head dimensions up to 256
    if documents is None or query.shape[1] < key.shape[1] or query.shape[-1] > 256:
        return _sdpa_by(SDPBackend.FLASH_ATTENTION)(query, key, value, documents)
    offsets, longest = documents.offsets(), query.shape[1]
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
    # a window of all earlier keys and no later key is causal attention
    attended: Tensor = _library("flash")(*flat, offsets, offsets, longest, longest, window_size=(-1, 0))
    return attended.view_as(query)


def _anywhere(device: torch.device, dtype: torch.dtype, head_dim: int, named: bool) -> str | None:
    return None


def _on_cuda(device: torch.device, dtype: torch.dtype, head_dim: int, named: bool) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return None if head_dim % 8 == 0 else f"needs a head dimension that is a multiple of 8, not {head_dim}"


def _with_library(name: str, remedy: str) -> Callable[[torch.device, torch.dtype, int, bool], str | None]:
    def problem(device: torch.device, dtype: torch.dtype, head_dim: int, named: bool) -> str | None:
        reason = _on_cuda(device, dtype, head_dim, named)
        if reason is None and torch.cuda.get_device_capability(device)[0] < 9:
            reason = "needs a Hopper GPU or newer"
        if reason is None and isinstance(error := _library(name, download=named), ImportError):
            reason = f"{error}: {remedy}"
        return reason

    return problem


BACKENDS: dict[str, AttentionBackend] = {
    "sdpa": AttentionBackend(_sdpa, _anywhere),
    "fa3": AttentionBackend(
        _flash_library("fa3"),
        _with_library(
            "fa3",
            "install FlashAttention 3 (its wheel is flash_attn_3), or pip install kernels and set ATTENTION=fa3 to download it",
        ),
    ),
    "fa4": AttentionBackend(_sdpa_by(SDPBackend.FLASH_ATTENTION), _with_library("fa4", "pip install flash-attn-4")),
    "cudnn": AttentionBackend(_sdpa_by(SDPBackend.CUDNN_ATTENTION), _on_cuda),
    "flash": AttentionBackend(_flash, _on_cuda),
    "math": AttentionBackend(_sdpa_by(SDPBackend.MATH), _anywhere),
}
"""All backends by name. "sdpa" lets PyTorch choose a kernel; "math" computes the formula step by step."""

BY_LENGTH = ("fa3", "flash")
"""Names of the backends that take documents as sequences of different lengths; the others take a mask."""
