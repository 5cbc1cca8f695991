"""The model of #2014 and #2135 as straight-line float64 code, from its published formulas alone.

A model is a dictionary of 18 tensors, layers stacked in front: attn_gate (L, H, 12), attn_scale (L, d), down (L, d, m),
embedding (V, d), k (L, kv, d), lambda_post (L, from, into), lambda_resid (L, lane), mlp_scale (L, d), o (L, d, d),
q (L, d, d), q_gain (L, H), resid_mix (L, 2, d), skip_gates (8, d), skip_weights (8, d), smear_lambda (1,), smear_w (1, 12),
up (L, m, d), v (L, kv, d).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.model.gpt import GPT

EPS = 1.1920928955078125e-07
SHAPES: dict[str, tuple[tuple[int, ...], float, float]] = {
    "attn_gate": ((11, 4, 12), 2, 0), "attn_scale": ((11, 32), 0.3, 1), "down": ((11, 32, 128), 0.15, 0),
    "embedding": ((64, 32), 1.5, 0), "k": ((11, 16, 32), 0.3, 0), "lambda_post": ((11, 2, 2), 0.3, 1),
    "lambda_resid": ((11, 2), 0.2, 1.1), "mlp_scale": ((11, 32), 0.3, 1), "o": ((11, 32, 32), 0.3, 0),
    "q": ((11, 32, 32), 0.3, 0), "q_gain": ((11, 4), 0.5, 2), "resid_mix": ((11, 2, 32), 0.3, 0),
    "skip_gates": ((8, 32), 1, 0), "skip_weights": ((8, 32), 0.3, 1), "smear_lambda": ((1,), 0.3, 0.7),
    "smear_w": ((1, 12), 1, 0), "up": ((11, 128, 32), 0.3, 0), "v": ((11, 16, 32), 0.3, 0),
}  # fmt: skip
"""Tensor number k of the small model: shape, factor and summand of wave k."""


def wave(k: int, *shape: int) -> Tensor:
    """Float64 numbers in [-1, 1) from whole numbers, the same everywhere."""
    i = torch.arange(math.prod(shape))
    h = ((37 + 2 * k) * i * i + (101 + 7 * k) * i + 577 * k + 11) % 10007
    return (2 * h.double() / 10007 - 1).reshape(shape)


def small_tensors() -> dict[str, Tensor]:
    """The small model. The numbers of the published scripts are those of its tensors rounded to float32."""
    made = {name: factor * wave(k, *shape) + base for k, (name, (shape, factor, base)) in enumerate(SHAPES.items())}
    made["resid_mix"][:, 0] += 1
    return made


def small_ids(bos: Sequence[int], start: int = 7) -> Tensor:
    """The 25 ids of the small model's text, with BOS at these positions."""
    ids = torch.tensor([2 + (5 * j * j + 11 * j + start) % 62 for j in range(25)])
    ids[list(bos)] = 1
    return ids


def parameter_names(layers: int) -> dict[str, list[str]]:
    """Name here → the parameters of a `GPT` that it stacks, or the one that it is."""
    per_layer = {
        "attn_gate": "attention.gate", "attn_scale": "attn_scale", "down": "mlp.down", "k": "attention.key",
        "mlp_scale": "mlp_scale", "o": "attention.output", "q": "attention.query", "q_gain": "attention.q_gain",
        "resid_mix": "resid_mix", "up": "mlp.up", "v": "attention.value",
    }  # fmt: skip
    single = {
        "embedding": "embedding.weight", "lambda_post": "lane_post", "lambda_resid": "lane_resid",
        "skip_gates": "skips.gates", "skip_weights": "skips.weights", "smear_lambda": "smear.scale", "smear_w": "smear.gate",
    }  # fmt: skip
    stacked = {name: [f"blocks.{layer}.{part}" for layer in range(layers)] for name, part in per_layer.items()}
    return stacked | {name: [part] for name, part in single.items()}


def collect(values: dict[str, Any], layers: int) -> dict[str, Tensor]:
    """The 18 tensors of a dictionary with the names of a `GPT`: its parameters, gradients or averages."""
    found = {}
    for name, parts in parameter_names(layers).items():
        tensor = torch.stack([values[part] for part in parts]) if len(parts) > 1 else values[parts[0]]
        found[name] = tensor.reshape(1) if name == "smear_lambda" else tensor
    return found


def assign(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Give a `GPT` these tensors, also an embedding of another vocabulary."""
    own = dict(model.named_parameters())
    model.embedding.weight = torch.nn.Parameter(tensors["embedding"].to(own["embedding.weight"].dtype))
    own["embedding.weight"] = model.embedding.weight
    with torch.no_grad():
        for name, parts in parameter_names(len(model.blocks)).items():
            for part, value in zip(parts, tensors[name] if len(parts) > 1 else [tensors[name]], strict=True):
                own[part].copy_(value.reshape(own[part].shape))


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def frequencies(dims: int) -> list[float]:
    """base^(-2i/dims) in float32, rounded to bfloat16."""
    return [float(torch.tensor(1e4 ** (-2 * i / dims), dtype=torch.float32).bfloat16()) for i in range(dims // 2)]


def rotated(x: Tensor, dims: int) -> Tensor:
    """`x` `(T, D)` with its first `dims` dimensions rotated, halves (a, b) by t · frequency."""
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * torch.tensor(frequencies(dims), dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x[:, : dims // 2], x[:, dims // 2 : dims], x[:, dims:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=1)


def forward(
    p: dict[str, Tensor], ids: Tensor, *, loops: bool, bos_mask: bool, pieces: Sequence[int], dims: int = 4
) -> dict[str, Any]:
    """All that a test compares, for `ids` `(T,)`. Attention stays inside each piece; `pieces` are their starts."""
    heads, layers = p["q_gain"].shape[1], len(p["q"])
    head_dim, kv_heads = p["q"].shape[1] // heads, p["k"].shape[1] * heads // p["q"].shape[1]
    piece = torch.zeros(len(ids), dtype=torch.int64)
    piece[list(pieces)] = 1
    piece = piece.cumsum(0)
    visible = (piece[:, None] == piece[None, :]) & torch.ones(len(ids), len(ids)).tril().bool()
    seen: dict[str, Any] = {"gates": {}, "lanes": {}}

    e = p["embedding"][ids]
    smeared = e.clone()
    for t in range(1, len(ids)):
        if not (bos_mask and ids[t] == 1):
            smeared[t] = e[t] + p["smear_lambda"] * torch.sigmoid(p["smear_w"][0] @ e[t, :12]) * e[t - 1]
    x = x0 = seen["x0"] = rms(smeared)

    def attention(layer: int, n: Tensor) -> Tensor:
        outputs = []
        gates = torch.sigmoid(0.5 * n[:, :12] @ p["attn_gate"][layer].T)
        for head in range(heads):
            mine = slice(head * head_dim, (head + 1) * head_dim)
            group = head // (heads // kv_heads)
            theirs = slice(group * head_dim, (group + 1) * head_dim)
            query = rotated(rms(n @ p["q"][layer, mine].T), dims) * p["q_gain"][layer, head]
            key, value = rotated(rms(n @ p["k"][layer, theirs].T), dims), n @ p["v"][layer, theirs].T
            scores = (query @ key.T / math.sqrt(head_dim)).masked_fill(~visible, -math.inf)
            y = torch.softmax(scores, dim=1) @ value
            unit = value / value.norm(dim=1, keepdim=True)
            y = y - (y * unit).sum(1, keepdim=True) * unit
            outputs.append(y * gates[:, head : head + 1])
        seen["gates"].setdefault(layer, gates)
        return p["attn_scale"][layer] * (torch.cat(outputs, dim=1) @ p["o"][layer].T)

    def mlp(layer: int, n: Tensor) -> Tensor:
        h = n @ p["up"][layer].T
        h = torch.where(h > 0, h, 0.5 * h)
        return p["mlp_scale"][layer] * ((h * h) @ p["down"][layer].T)

    def normed(layer: int, x: Tensor) -> Tensor:
        return rms(x) / math.sqrt(layer + 1)

    def serial(layer: int, x: Tensor) -> Tensor:
        h = p["resid_mix"][layer, 0] * x + p["resid_mix"][layer, 1] * x0
        u = h + attention(layer, normed(layer, h))
        return u + mlp(layer, normed(layer, u))

    order = [*range(3), *([3, 4, 5] * (3 if loops else 1)), *range(6, layers)]
    middle = len(order) // 2
    pushed = []
    for layer in order[:middle]:
        x = serial(layer, x)
        pushed.append(x)
    lanes: tuple[Tensor, ...] | None = None
    for run, layer in enumerate(order[middle:]):
        if layer >= 8 and lanes is None:
            lanes = (x, x)
        stream = x if lanes is None else lanes[0]
        if pushed and run < 8:
            source, gate = p["skip_weights"][run] * pushed.pop(), torch.sigmoid(p["skip_gates"][run])
            stream = source + gate * (stream - source)
        if lanes is None:
            x = serial(layer, stream)
            continue
        h = p["resid_mix"][layer, 0] * stream + p["resid_mix"][layer, 1] * x0
        y, m = attention(layer, normed(layer, h)), mlp(layer, normed(layer, lanes[1]))
        r, post = p["lambda_resid"][layer], p["lambda_post"][layer]
        lanes = tuple(
            r[lane] * old + post[0, lane] * y + post[1, lane] * m for lane, old in enumerate((stream, lanes[1]))
        )
        seen["lanes"][layer] = lanes
    assert lanes is not None
    seen["logits"] = 30 * torch.tanh(rms(0.5 * (lanes[0] + lanes[1])) @ p["embedding"].T / 30)
    return seen
