"""A model of golf_kernels in plain PyTorch. It needs only this file and the output of `train.export --to safetensors`:

    model = load("model.safetensors")
    logits = model(ids)  # ids (B, T) int64, logits (B, T, vocab_size)
    ids = model.generate(ids, 50)  # appends 50 tokens, each the likeliest one

Every formula is written out. There are no kernels, no KV cache, no training and no quantization.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOS = 1


class Weights(nn.Module):
    """A module that holds uninitialized parameters: name → shape."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class Golf(Weights):
    """A model. `config` has the settings that `python -m train.artifact inspect` lists, and `window` as attributes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        add_weights(self, config)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the softcapped logits `(B, T, V)`, float32, of token ids `(B, T)`."""
        return golf_logits(self, self.config, ids)

    @torch.no_grad()
    def generate(self, ids: Tensor, tokens: int, temperature: float = 0.0) -> Tensor:
        """Append `tokens` tokens to each row of `ids` `(B, T)`. The model reads the last `window` tokens.

        Temperature 0 takes the likeliest token. Otherwise a token is drawn from softmax(logits / temperature).
        """
        for _ in range(tokens):
            logits = self(ids[:, -self.config.window :])[:, -1]
            if temperature:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)
            else:
                new = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
        return ids


def load(path: str) -> Golf:
    """Load the model from a safetensors file, whose metadata contains the config."""
    from types import SimpleNamespace

    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        model = Golf(SimpleNamespace(**json.loads(file.metadata()["config"])))
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return model.eval()


def add_weights(model: nn.Module, c: Any) -> None:
    """Add all parameters of config `c` to `model`, uninitialized, with the names that they have in weights.pt."""
    d, kv = c.model_dim, c.model_dim // c.num_heads * c.num_kv_heads
    model.embedding = Weights(weight=(c.vocab_size, d))
    if c.bigram_vocab_size:
        model.bigram = Weights(
            embedding=(c.bigram_vocab_size, c.bigram_dim), scale=(), **projection(c, c.bigram_dim, d)
        )
    if c.smear_gate == "published":
        model.smear = Weights(gate=(d,))
    elif c.smear_gate != "off":
        model.smear = Weights(gate=(1, min(12, d)), scale=())
    if c.ve_dim:
        layers = len(c.ve_layers)
        model.ve = Weights(
            embedding=(c.vocab_size, c.ve_dim), scale=(), layer_scales=(layers,), **projection(c, c.ve_dim, kv)
        )
    if skips := c.skip_rows or c.num_layers // 2:
        model.skips = Weights(weights=(skips, d), **({"gates": (skips, d)} if c.skip_gates else {}))
    blocks = nn.ModuleList()
    for _ in range(c.num_layers):
        block = Weights(resid_mix=(2, d), attn_scale=(d,), mlp_scale=(d,))
        block.attention = Weights(query=(d, d), key=(kv, d), value=(kv, d), output=(d, d), q_gain=(c.num_heads,))
        if c.head_gate:
            block.attention.gate = nn.Parameter(torch.empty(c.num_heads, min(12, d)))
        block.mlp = Weights(up=(int(d * c.mlp_mult), d), down=(d, int(d * c.mlp_mult)))
        blocks.append(block)
    model.blocks = blocks
    if c.parallel_start_layer >= 0 and c.parallel_form == "lanes":
        model.lane_mix = nn.Parameter(torch.empty(()))
    if c.parallel_start_layer >= 0 and c.parallel_form == "routed":
        model.lane_resid = nn.Parameter(torch.empty(c.num_layers, 2))
        model.lane_post = nn.Parameter(torch.empty(c.num_layers, 2, 2))
    if c.softcap_params:
        model.softcaps = nn.Parameter(torch.empty(c.softcap_params))
    if c.recur_scale_params:
        model.recur_scales = nn.Parameter(torch.empty(c.recur_scale_params, d))


def golf_logits(model: Any, c: Any, ids: Tensor) -> Tensor:
    """Compute the softcapped logits `(B, T, V)`, float32, of token ids `(B, T)`.

    The rotary base is that of a text of max(T, window) tokens.
    """
    x0 = embed(model, c, ids)
    x0 = rms(smeared(model, c, ids, x0)) if c.smear_gate == "embedding" else smeared(model, c, ids, rms(x0))
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()[None, None]
    if c.document_masking:
        document = (ids == BOS).cumsum(1)
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    values = model.ve.scale * projected(model.ve, model.ve.embedding[ids]) if c.ve_dim else None
    rotary = rotary_table(c, ids.shape[1], x0)

    def attended(x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return the layer's mixed input h, and attn_scale ⊙ attention(h)."""
        block, extra = model.blocks[layer], None
        h = block.resid_mix[0] * x + block.resid_mix[1] * x0
        if values is not None and layer in c.ve_layers:
            extra = model.ve.layer_scales[list(c.ve_layers).index(layer)] * values
        xsa = layer >= c.num_layers - c.xsa_last_n
        return h, block.attn_scale * attention(block.attention, c, gain(c, layer) * rms(h), rotary, mask, extra, xsa)

    def mlp(x: Tensor, layer: int) -> Tensor:
        block = model.blocks[layer]
        hidden = F.leaky_relu(F.linear(gain(c, layer) * rms(x), block.mlp.up), c.mlp_slope) ** 2
        y: Tensor = block.mlp_scale * F.linear(hidden, block.mlp.down)
        return y

    def parallel(layer: int, form: str) -> bool:
        return bool(0 <= c.parallel_start_layer <= layer and c.parallel_form == form)

    def run(x: Tensor, layer: int) -> Tensor:
        h, y = attended(x, layer)
        return h + y + mlp(h if parallel(layer, "gptj") else h + y, layer)

    # order in which the layers run: "unroll" runs the group of repeated layers again; the decoder is the second half
    order, repeated = list(range(c.num_layers)), list(c.recur_layers)
    if repeated and c.recur_form == "unroll":
        order[repeated[-1] + 1 : repeated[-1] + 1] = repeated * c.num_loops
    middle = len(order) // 2
    x, lane, saved = x0, None, []
    for layer in order[:middle]:
        x = run(x, layer)
        saved.append(x)
        if layer in repeated and c.recur_form == "blend":
            repeat = repeated.index(layer)
            weight = model.recur_scales[repeat] if repeat < c.recur_scale_params else 0.5
            x = x + weight * (run(x, layer) - x)
    for row, layer in enumerate(order[middle:]):
        if lane is None and parallel(layer, "routed"):
            lane = x
        if row < (c.skip_rows or c.num_layers // 2) and saved and (lane is None or c.parallel_form == "routed"):
            skip = model.skips.weights[row] * saved.pop()
            if c.skip_gates:
                x = skip + torch.sigmoid(model.skips.gates[row]) * (x - skip)
            else:
                x = x + skip
        if lane is None and parallel(layer, "lanes"):
            lane = x
        if lane is None:
            x = run(x, layer)
            continue
        (h, y), m = attended(x, layer), mlp(lane, layer)
        if c.parallel_form == "lanes":
            x, lane = h + y, lane + m
        else:
            r, p = model.lane_resid[layer], model.lane_post[layer]
            x, lane = r[0] * x + p[0, 0] * y + p[1, 0] * m, r[1] * lane + p[0, 1] * y + p[1, 1] * m
    if lane is not None and c.parallel_form == "routed":
        x = 0.5 * (x + lane)
    elif lane is not None:
        x = lane + model.lane_mix * (x - lane)
    logits = F.linear(rms(x), model.embedding.weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    capped: Tensor = c.logit_softcap * torch.tanh(logits / c.logit_softcap)
    return capped


def embed(model: Any, c: Any, ids: Tensor) -> Tensor:
    """Return the token embedding plus the bigram (and trigram) embedding. The hashes ignore document boundaries."""
    x: Tensor = model.embedding.weight[ids]
    if not c.bigram_vocab_size:
        return x
    rows, last = model.bigram.embedding, c.bigram_vocab_size - 1
    bigrams = F.pad((36313 * ids[:, 1:] ^ 27191 * ids[:, :-1]) % last, (1, 0), value=last)
    found = rows[bigrams]
    if c.trigram:
        trigrams = (36313 * ids[:, 2:] ^ 27191 * ids[:, 1:-1] ^ 51497 * ids[:, :-2]) % last
        found = found + rows[F.pad(trigrams, (min(ids.shape[1], 2), 0), value=last)]
    return x.add(model.bigram.scale * projected(model.bigram, found))


def smeared(model: Any, c: Any, ids: Tensor, x: Tensor) -> Tensor:
    """The smear gate: blends each token's embedding in `x` `(B, T, d)` with the previous token's."""
    if c.smear_gate == "off":
        return x
    before = F.pad(x[:, :-1], (0, 0, 1, 0))
    masked = {"published": c.document_masking, "document": True, "embedding": c.smear_gate_bos_fix}
    if masked[c.smear_gate]:
        before = before * (ids != BOS)[..., None]
    if c.smear_gate == "published":
        gate = torch.sigmoid(model.smear.gate)
        return x + gate * (before - x)
    gate = torch.sigmoid(F.linear(x[..., : model.smear.gate.shape[1]], model.smear.gate))
    y: Tensor = x + model.smear.scale * gate * before
    return y


def projection(c: Any, width: int, target: int) -> dict[str, tuple[int, ...]]:
    """Return {"proj": shape} if an embedding of this width is projected to width `target`, else {}."""
    return {"proj": (target, width)} if c.embed_proj == "always" or width != target else {}


def projected(w: Any, rows: Tensor) -> Tensor:
    return F.linear(rows, w.proj) if hasattr(w, "proj") else rows


def attention(
    w: Any, c: Any, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, extra: Tensor | None, xsa: bool
) -> Tensor:
    """Compute causal grouped-query attention for the normed input `x` `(B, T, d)`, without the residual.

    `mask` is true where a query sees a key. `extra` `(B, T, kv_dim)` is added to the values.
    """
    query, key, value = F.linear(x, w.query), F.linear(x, w.key), F.linear(x, w.value)
    value = value if extra is None else value + extra
    query, key, value = (part.unflatten(-1, (-1, c.model_dim // c.num_heads)) for part in (query, key, value))
    query = rotate(rms(query), rotary) * w.q_gain[:, None]
    key, value = (
        part.repeat_interleave(c.num_heads // c.num_kv_heads, dim=2) for part in (rotate(rms(key), rotary), value)
    )
    query, key, heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    y = F.scaled_dot_product_attention(query, key, heads, attn_mask=mask).transpose(1, 2)
    if xsa:
        # exclusive self-attention: remove the direction of the position's own value vector
        direction = F.normalize(value, dim=-1)
        y = y - (y * direction).sum(-1, keepdim=True) * direction
    if c.head_gate:
        y = y * torch.sigmoid(0.5 * F.linear(x[..., : w.gate.shape[1]], w.gate))[..., None]
    return F.linear(y.flatten(2), w.output)


def rotary_table(c: Any, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines `(length, 1, r/2)` in the dtype of `like`.

    For texts longer than `rope_train_seq_len`, the NTK rule raises the base, unless `rope_scaling` is "none".
    """
    dims, longest = c.rope_dims or c.model_dim // c.num_heads, max(length, c.window)
    base, kind = c.rope_base, c.rotary_table
    if c.rope_scaling == "ntk" and longest > c.rope_train_seq_len:
        kind = "exact"
        if dims > 2:
            base = base * (longest / c.rope_train_seq_len) ** (dims / (dims - 2))
    frequencies = base ** -(torch.arange(0, dims, 2, dtype=torch.float64, device=like.device) / dims)
    positions = torch.arange(length, dtype=torch.float64, device=like.device)
    if kind != "exact":
        frequencies = frequencies.bfloat16().double()
    if kind == "bf16":
        positions = positions.bfloat16().double()
    angles = torch.outer(positions, frequencies)[:, None]
    cosine, sine = angles.cos(), angles.sin()
    if kind == "bf16":
        cosine, sine = cosine.bfloat16(), sine.bfloat16()
    return cosine.to(like.dtype), sine.to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first r dimensions of each head. Their halves (a, b) become (a cos + b sin, b cos - a sin)."""
    cosine, sine = rotary
    half = cosine.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cosine + b * sine, b * cosine - a * sine, rest], dim=-1)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=2.0**-23)


def gain(c: Any, layer: int) -> float:
    """Return the factor on the output of a layer's norms."""
    return 1 / math.sqrt(layer + 1) if c.ln_scale else 1.0
