"""A fake FlashAttention 3: an operator with the same shapes, FLOPs and memory traffic that computes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from train.model import attention_backends
from train.model.documents import Documents

# torch.library.Library carries no type hints
_LIBRARY: Any = torch.library.Library("fa3", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


def _backward_fake(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.fa3.attention_backward(dy, *ctx.saved_tensors)
    return gradients


torch.library.register_fake("fa3::attention", _fake, lib=_LIBRARY)
torch.library.register_fake("fa3::attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fa3::attention",
    _backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
    lib=_LIBRARY,
)


@register_flop_formula(torch.ops.fa3.attention)
def forward_flops(q: Any, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of two products, counting only their lower triangle: 2 · B · H · T² · D."""
    batch, length, heads, dim = map(int, q)
    return 2 * batch * heads * length**2 * dim


@register_flop_formula(torch.ops.fa3.attention_backward)
def backward_flops(dy: Any, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of five products, because the backward pass computes the scores again."""
    return forward_flops(dy) * 5 // 2


def _run(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
    # document boundaries are ignored; masking them would only reduce the FLOPs
    found: Tensor = torch.ops.fa3.attention(query, key, value)[0]
    return found


@contextlib.contextmanager
def stand_in() -> Iterator[str]:
    """Replace the attention backend `fa3` with the fake one. Yields the backend's name."""
    backend = attention_backends.AttentionBackend(_run, lambda device, dtype, head_dim, named: None)
    # with an entry for the library, it is not imported
    library = mock.patch.dict(attention_backends._libraries, fa3=None)
    with mock.patch.dict(attention_backends.BACKENDS, fa3=backend), library:
        yield "fa3"
