"""The embeddings: the tied token embedding, the hashed bigram embedding, and the value embedding that layers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import Config
from train.model.init import constant, matrix, normal_table, zero_matrix
from train.model.linear import linear

# initial values of the published scripts
_TOKEN_DEVIATION = 0.005
_BIGRAM_SCALE = 0.05
_VALUE_SCALE = 0.1
_VALUE_DEVIATION = 0.01


def projects(config: Config, width: int, target: int) -> bool:
    """Whether an embedding of width `width` is projected before it is added to a tensor of width `target`."""
    return config.embed_proj == "always" or width != target


def lookup(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up rows of a table `(rows, width)`: `(*ids.shape, width)` in `dtype`, the compute dtype."""
    # the gradient of a row is a sum over all its tokens: compute the sum in the wider dtype
    wide = table.to(torch.promote_types(table.dtype, dtype))
    return F.embedding(ids, wide).to(dtype)


class TokenEmbedding(nn.Module):
    """The tied embedding E `(V, d)`, initially N(0, 0.005²). The input is rows of E. The logits are hidden · Eᵀ."""

    def __init__(self, vocab_size: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = normal_table(vocab_size, dim, _TOKEN_DEVIATION, dtype)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up the rows of `ids` `(B, T)`: `(B, T, d)` in `dtype`."""
        return lookup(self.weight, ids, dtype)


def bigram_hash(ids: Tensor, rows: int) -> Tensor:
    """Hash each token and its predecessor to a row of the bigram table: `(B, T)` int64 in [0, rows), rows ≥ 2.

    index[0] = rows − 1; index[t] = (36313 · ids[t] XOR 27191 · ids[t−1]) mod (rows − 1). `ids` is `(B, T)` int64.
    Document boundaries are ignored.
    """
    hashed = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (rows - 1)
    return F.pad(hashed, (1, 0), value=rows - 1)


def trigram_hash(ids: Tensor, rows: int) -> Tensor:
    """Hash each token and its two predecessors to a row of the bigram table. For the shapes see `bigram_hash`.

    index[0] = index[1] = rows − 1; index[t] = (36313 · ids[t] XOR 27191 · ids[t−1] XOR 51497 · ids[t−2]) mod (rows − 1)

    Source: #1019 with TRIGRAM on; #1392 has it off.
    """
    hashed = (36313 * ids[:, 2:] ^ 27191 * ids[:, 1:-1] ^ 51497 * ids[:, :-2]) % (rows - 1)
    return F.pad(hashed, (min(ids.shape[1], 2), 0), value=rows - 1)


class BigramHash(nn.Module):
    """The bigram embedding, which is added to the token embedding: scale · W · table[bigram_hash].

    With `trigram` it is scale · W · (table[bigram_hash] + table[trigram_hash]), from the same table. The table
    `(rows, width)` is initially zero, the scale 0.05. W `(dim, width)` is drawn with gain 1/√(2·layers): if W were
    zero, too, table and W would never get a gradient. With `qat`, W is fake-quantized in training.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        dim: int,
        num_layers: int,
        *,
        project: bool = True,
        orthogonal: bool,
        dtype: torch.dtype,
        qat: str | None = None,
        trigram: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = normal_table(rows, width, 0.0, dtype)
        self.proj = matrix(dim, width, orthogonal=orthogonal, gain=(2 * num_layers) ** -0.5) if project else None
        self.scale = constant(_BIGRAM_SCALE)
        self.qat = qat
        self.trigram = trigram

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the bigram embedding of `ids` `(B, T)`: `(B, T, dim)` in `dtype`."""
        rows = lookup(self.embedding, bigram_hash(ids, self.embedding.shape[0]), dtype)
        if self.trigram:
            rows = rows + lookup(self.embedding, trigram_hash(ids, self.embedding.shape[0]), dtype)
        return self.scale.to(dtype) * _projected(rows, self.proj, self.qat if self.training else None)


class ValueEmbedding(nn.Module):
    """A token embedding that some layers add to their values: layer_scales[i] · h, where h = scale · W · table[ids].

    `layers` lists the physical layers that add the embedding, and i is a layer's index in this list. Initially the
    table `(V, width)` is N(0, 0.01²), the scale is 0.1, each layer scale is 1, and W `(kv_dim, width)` is orthogonal,
    or zero without `orthogonal`. With `qat`, W is fake-quantized in training.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        kv_dim: int,
        layers: tuple[int, ...],
        *,
        project: bool = True,
        orthogonal: bool,
        dtype: torch.dtype,
        qat: str | None = None,
    ) -> None:
        super().__init__()
        self.embedding = normal_table(vocab_size, width, _VALUE_DEVIATION, dtype)
        self.proj = None
        if project:
            self.proj = matrix(kv_dim, width, orthogonal=True) if orthogonal else zero_matrix(kv_dim, width)
        self.scale = constant(_VALUE_SCALE)
        self.layer_scales = constant(1.0, len(layers))
        self.layers = layers
        self.qat = qat

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute h of `ids` `(B, T)`: `(B, T, kv_dim)` in `dtype`."""
        rows = lookup(self.embedding, ids, dtype)
        return self.scale.to(dtype) * _projected(rows, self.proj, self.qat if self.training else None)

    def of_layer(self, layer: int, shared: Tensor) -> Tensor | None:
        """Compute what a physical layer adds to its values, from h = `shared`. None if the layer is not in `layers`."""
        if layer not in self.layers:
            return None
        return self.layer_scales[self.layers.index(layer)].to(shared.dtype) * shared


def _projected(rows: Tensor, proj: Tensor | None, fake_quantize: str | None) -> Tensor:
    return rows if proj is None else linear(rows, proj, fake_quantize=fake_quantize)
