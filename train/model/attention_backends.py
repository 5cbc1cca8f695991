"""The backends of causal attention: FlashAttention 3 and 4 if installed, and PyTorch's kernels.

To keep attention inside documents, the backends fa3 and flash get each document as a sequence of its own. The other
backends get a mask.
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

# on a CPU, for sequences shorter than this, attention is computed in float32, which is faster than bfloat16
# (docs/log.md)
_LONG_ON_CPU = 512
# FlashAttention 3 on the Hugging Face Hub. The revision is a commit, because the code of a branch could change.
_HUB = "kernels-community/flash-attn3"
_HUB_REVISION = "9542c462013476380ce4b395b9ddc0e8118161ee"

Core = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]


class AttentionBackend(NamedTuple):
    """A backend of causal attention."""

    run: Core
    # function of device, compute dtype, head dimension, and whether the backend may download its library. Returns the
    # reason why the backend cannot run; None: it can run.
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
    # a single query needs no mask, because it is the last position, which sees all keys
    if mask is None and 1 < rows < length:
        # here the last query belongs to the last key, but is_causal aligns the first query with the first key. The
        # flash kernel aligns the last ones. torch.compile cannot trace its public name, causal_lower_right.
        if (
            query.is_cuda
            and _on_cuda(query.device, query.dtype, query.shape[-1], True) is None
            and query.shape[-1] <= 256
        ):
            flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)[0]
            return flash.transpose(1, 2)
        mask = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
    if mask is not None and query.is_cuda:
        # PyTorch's memory-efficient kernel accepts a mask, but needs as many key heads as query heads
        key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    dtype = query.dtype
    if query.is_cpu and dtype == torch.bfloat16 and length < _LONG_ON_CPU:
        query, key, value = query.float(), key.float(), value.float()
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and rows > 1, enable_gqa=True
    )
    return output.transpose(1, 2).to(dtype)


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Repeat each head of keys or values `(B, H_kv, T, D)` for all query heads that share it: `(B, heads, T, D)`."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _sdpa_by(kernel: SDPBackend) -> Core:
    def run(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        # some kernels accept no mask, so let PyTorch choose the kernel
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
    # without a network, or with another version of torch, any error is possible
    except Exception as error:
        return ImportError(f"{_HUB} cannot be loaded: {_first_line(error)}")


def _flash_attention_4() -> Any:
    """Import FlashAttention 4.

    Its functions are no PyTorch operators, so `activate` lets PyTorch's flash attention call them.
    """
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return ImportError(f"torch {torch.__version__} cannot run FlashAttention 4 as its flash attention")
    return _imported("flash_attn.cute")


def activate(name: str) -> None:
    """Let PyTorch's flash attention call FlashAttention 4 if the backend is fa4, else PyTorch's own kernels."""
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
    """Return PyTorch's FlashAttention 2 for sequences of different lengths."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    # since torch 2.13, grouped heads need an argument. Check this here, because torch.compile cannot trace the check.
    grouped = "enable_gqa" in inspect.signature(attend).parameters
    return functools.partial(attend, enable_gqa=True) if grouped else attend


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return error
    # a library that was built for another version of torch may raise any error while it loads its native code
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
    """Import an optional attention library, only once. Return the library, or the error if the import fails.

    `download` allows downloading a library that is not installed.
    """
    if name not in _libraries or (download and isinstance(_libraries[name], ImportError)):
        _libraries[name] = _FINDERS[name](download)
    return _libraries[name]


def load_library(name: str) -> None:
    """Import the library of the chosen backend, if the backend needs one.

    Call this before torch.compile, which cannot trace the import.

    Raises:
        UserError: the library cannot be imported.
    """
    if name in _FINDERS and isinstance(error := _library(name, download=True), ImportError):
        raise UserError(f"attention: {name} cannot run: {error}")


def _flash_library(name: str) -> Core:
    def run(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        library = _library(name)
        if documents is not None and query.shape[1] < key.shape[1]:
            # document offsets need a query at each position, but here only the last positions have queries
            return _sdpa(query, key, value, documents)
        if documents is None:
            # if there are fewer queries than keys, the library aligns the last query with the last key
            output = library.flash_attn_func(query, key, value, causal=True)
        else:
            offsets, longest = documents.offsets(), documents.longest or query.shape[1]
            flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
            output = library.flash_attn_varlen_func(
                *flat, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
            )  # fmt: skip
        # some releases return (output, log-sum-exp)
        attended: Tensor = output[0] if isinstance(output, tuple) else output
        return attended.view_as(query)

    return run


def _flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
    # FlashAttention 2 supports head dimensions up to 256
    if documents is None or query.shape[1] < key.shape[1] or query.shape[-1] > 256:
        return _sdpa_by(SDPBackend.FLASH_ATTENTION)(query, key, value, documents)
    offsets, longest = documents.offsets(), documents.longest or query.shape[1]
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
    # window_size (-1, 0): all earlier keys and no later keys, that is, causal attention
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
"""Names of the backends that get documents as sequences of different lengths. The other backends get a mask."""
