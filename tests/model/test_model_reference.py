"""Whole models against a second implementation: straight-line float64 code from the formulas of recipes section 2."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import frontier_truth
import pytest
import torch
from model_systems import CASES, block_matrices, narrow_config, random_ids, random_model
from torch import Tensor

# one core: more only wait for each other at these widths

EPS = 1.1920928955078125e-07
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
P = dict[str, Tensor]
Table = Callable[[int, int], tuple[float, float]]
"""Cosine and sine of position t in dimension pair i."""


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def exact(dims: int, base: float) -> Table:
    return lambda t, i: (math.cos(t * base ** (-2 * i / dims)), math.sin(t * base ** (-2 * i / dims)))


def rounded(dims: int, base: float) -> Table:
    def entry(t: int, i: int) -> tuple[float, float]:
        angle = eight_bits(t) * eight_bits(base ** (-2 * i / dims))
        return eight_bits(math.cos(angle)), eight_bits(math.sin(angle))

    return entry


def rounded_frequencies(dims: int, base: float) -> Table:
    def entry(t: int, i: int) -> tuple[float, float]:
        angle = t * eight_bits(base ** (-2 * i / dims))
        return math.cos(angle), math.sin(angle)

    return entry


def eight_bits(x: float) -> float:
    """x rounded to bfloat16, which has 8 significant bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256) / 256, exponent)


def rope(x: Tensor, dims: int, table: Table) -> Tensor:
    out = x.clone()
    for t in range(x.shape[0]):
        for i in range(dims // 2):
            cos, sin = table(t, i)
            a, b = x[t, i], x[t, i + dims // 2]
            out[t, i], out[t, i + dims // 2] = a * cos + b * sin, -a * sin + b * cos
    return out


def attention(
    p: P, layer: int, n: Tensor, dims: int, table: Table, *, xsa: bool, extra: Tensor | None = None
) -> Tensor:  # fmt: skip
    prefix, length = f"blocks.{layer}.attention.", len(n)
    q, k, v = (n @ p[prefix + name].T for name in ("query", "key", "value"))
    if extra is not None:
        v = v + extra
    outputs = []
    for head in range(HEADS):
        mine = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        group = head // (HEADS // KV_HEADS)
        theirs = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        query = rope(rms(q[:, mine]), dims, table) * p[prefix + "q_gain"][head]
        key, value = rope(rms(k[:, theirs]), dims, table), v[:, theirs]
        scores = query @ key.T / math.sqrt(HEAD_DIM)
        scores = scores + torch.full((length, length), -math.inf, dtype=n.dtype).triu(1)
        y = torch.softmax(scores, dim=-1) @ value
        if xsa:
            unit = value / value.norm(dim=-1, keepdim=True)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        outputs.append(y)
    return torch.cat(outputs, dim=-1) @ p[prefix + "output"].T


def mlp(p: P, layer: int, n: Tensor, slope: float) -> Tensor:
    h = n @ p[f"blocks.{layer}.mlp.up"].T
    h = torch.where(h > 0, h, slope * h)
    return (h * h) @ p[f"blocks.{layer}.mlp.down"].T


def mix(p: P, layer: int, x: Tensor, x0: Tensor) -> Tensor:
    m = p[f"blocks.{layer}.resid_mix"]
    return m[0] * x + m[1] * x0


def logits(p: P, x: Tensor) -> Tensor:
    return 30 * torch.tanh(rms(x) @ p["embedding.weight"].T / 30)


def serial(
    p: P, layer: int, x: Tensor, x0: Tensor, dims: int, table: Table, slope: float, g: float, *, xsa: bool, extra: Tensor | None = None
) -> Tensor:  # fmt: skip
    x = mix(p, layer, x, x0)
    x = x + p[f"blocks.{layer}.attn_scale"] * attention(p, layer, rms(x) * g, dims, table, xsa=xsa, extra=extra)
    return x + p[f"blocks.{layer}.mlp_scale"] * mlp(p, layer, rms(x) * g, slope)


def smear(p: P, x: Tensor) -> Tensor:
    g = torch.sigmoid(p["smear.gate"])
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return (1 - g) * x + g * before


def value_embedding(p: P, ids: Tensor) -> Tensor:
    return p["ve.scale"] * (p["ve.embedding"][ids] @ p["ve.proj"].T)


def plain_unet(p: P, x: Tensor, layers: int, table: Table) -> Tensor:
    x0, skips = x, []
    for layer in range(layers // 2):
        x = serial(p, layer, x, x0, HEAD_DIM, table, 0.0, 1.0, xsa=False)
        skips.append(x)
    for i, layer in enumerate(range(layers // 2, layers)):
        if skips:
            x = x + p["skips.weights"][i] * skips.pop()
        x = serial(p, layer, x, x0, HEAD_DIM, table, 0.0, 1.0, xsa=False)
    return logits(p, x)


def baseline(p: P, ids: Tensor, recurrence: bool) -> Tensor:
    # beyond the training length the NTK rule applies, and with it the exact table
    table = exact(HEAD_DIM, 1e4 * (len(ids) / 8) ** (8 / 6))
    return plain_unet(p, rms(p["embedding.weight"][ids]), 9, table)


def sp1024(p: P, ids: Tensor, recurrence: bool) -> Tensor:
    rows = [40] + [((36313 * int(ids[t])) ^ (27191 * int(ids[t - 1]))) % 40 for t in range(1, len(ids))]
    bigram = p["bigram.scale"] * (p["bigram.embedding"][rows] @ p["bigram.proj"].T)
    x = smear(p, rms(p["embedding.weight"][ids] + bigram))
    return plain_unet(p, x, 8, exact(HEAD_DIM, 1e4 * (len(ids) / 8) ** (8 / 6)))


def sp2048(p: P, ids: Tensor, recurrence: bool) -> Tensor:
    return plain_unet(p, rms(p["embedding.weight"][ids]), 8, rounded(HEAD_DIM, 1e4))


def sp4096(p: P, ids: Tensor, recurrence: bool) -> Tensor:
    table = exact(4, 1e4 * (len(ids) / 8) ** (4 / 2))
    x = smear(p, rms(p["embedding.weight"][ids]))
    x0, h, skips = x, value_embedding(p, ids), []
    for layer in (0, 1, 2, 3, 4):
        x = serial(p, layer, x, x0, 4, table, 0.5, 1 / math.sqrt(layer + 1), xsa=True)
        skips.append(x)
        if recurrence and layer == 4:
            x = x + 0.5 * (serial(p, layer, x, x0, 4, table, 0.5, 1 / math.sqrt(5), xsa=True) - x)
    for i, layer in enumerate((5, 6)):
        x = x + p["skips.weights"][i] * skips.pop()
        x = serial(p, layer, x, x0, 4, table, 0.5, 1 / math.sqrt(layer + 1), xsa=True)
    for i, layer in enumerate((7, 8, 9, 10), start=2):
        if skips:
            x = x + p["skips.weights"][i] * skips.pop()
        x = mix(p, layer, x, x0)
        extra = p["ve.layer_scales"][layer - 9] * h if layer >= 9 else None
        n = rms(x) / math.sqrt(layer + 1)
        attended = p[f"blocks.{layer}.attn_scale"] * attention(p, layer, n, 4, table, xsa=True, extra=extra)
        x = x + attended + p[f"blocks.{layer}.mlp_scale"] * mlp(p, layer, n, 0.5)
    return logits(p, x)


def sp8192(p: P, ids: Tensor, recurrence: bool) -> Tensor:
    encoder = (0, 1, 2, 3, 4, 5, 3) if recurrence else (0, 1, 2, 3, 4)
    decoder = (4, 5, 6) if recurrence else (5, 6)
    x = rms(p["embedding.weight"][ids])
    x0, h, skips = x, value_embedding(p, ids), []
    table = rounded(4, 1e4)
    for layer in encoder:
        x = serial(p, layer, x, x0, 4, table, 0.5, 1 / math.sqrt(layer + 1), xsa=True)
        skips.append(x)
    for i, layer in enumerate((*decoder, 7)):
        s = p["skips.weights"][i] * skips.pop()
        x = s + torch.sigmoid(p["skips.gates"][i]) * (x - s)
        if layer < 7:
            x = serial(p, layer, x, x0, 4, table, 0.5, 1 / math.sqrt(layer + 1), xsa=True)
    lane0 = lane1 = x
    for layer in (7, 8, 9, 10):
        g = 1 / math.sqrt(layer + 1)
        extra = p["ve.layer_scales"][layer - 9] * h if layer >= 9 else None
        a = mix(p, layer, lane0, x0)
        lane0 = a + p[f"blocks.{layer}.attn_scale"] * attention(p, layer, rms(a) * g, 4, table, xsa=True, extra=extra)
        lane1 = lane1 + p[f"blocks.{layer}.mlp_scale"] * mlp(p, layer, rms(lane1) * g, 0.5)
    return logits(p, p["lane_mix"] * lane0 + (1 - p["lane_mix"]) * lane1)


def frontier(p: P, ids: Tensor, recurrence: bool) -> Tensor:
    starts = [t for t in range(len(ids)) if t == 0 or ids[t] == 1]
    tensors = frontier_truth.collect(p, 11)
    logits: Tensor = frontier_truth.forward(tensors, ids, loops=recurrence, bos_mask=True, pieces=starts)["logits"]
    return logits


REFERENCES = {
    "baseline": baseline,
    "sp1024": sp1024,
    "sp2048": sp2048,
    "sp4096": sp4096,
    "sp8192": sp8192,
    "frontier": frontier,
}


def reference_logits(system: str, parameters: P, ids: Tensor, *, recurrence: bool) -> Tensor:
    return torch.stack([REFERENCES[system](parameters, row, recurrence) for row in ids])


@pytest.mark.parametrize(("system", "recurrence"), CASES)
@torch.no_grad()
def test_logits_equal_the_formulas(system: str, recurrence: bool) -> None:
    config = narrow_config(system)
    model, ids = random_model(config).eval(), random_ids(config)
    expected = reference_logits(system, dict(model.named_parameters()), ids, recurrence=recurrence)
    found = model.logits(ids, recurrence=recurrence)
    assert found.dtype == torch.float64
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("system", "recurrence"), CASES)
@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_of_the_formulas(system: str, recurrence: bool) -> None:
    config = narrow_config(system)
    model, ids = random_model(config).eval(), random_ids(config)
    targets = random_ids(config, seed=2)
    expected = reference_logits(system, dict(model.named_parameters()), ids, recurrence=recurrence)
    nll = torch.logsumexp(expected, dim=-1) - expected.gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(model.loss(ids, targets, recurrence=recurrence), nll.mean(), rtol=0, atol=1e-9)


@torch.no_grad()
def test_loss_of_each_rotary_table_is_that_of_the_formulas() -> None:
    losses = []
    tables = {"exact": exact, "bf16": rounded, "bf16_frequencies": rounded_frequencies}
    for kind, table in tables.items():
        # positions from 257 on lose their last bit
        config = narrow_config("sp2048", num_layers=2, rope_train_seq_len=300, rotary_table=kind, qat=False)
        model, ids = random_model(config).eval(), random_ids(config, 1, 300)
        targets, p = random_ids(config, 1, 300, seed=2), dict(model.named_parameters())
        logits = plain_unet(p, rms(p["embedding.weight"][ids[0]]), 2, table(HEAD_DIM, 1e4))
        expected = torch.nn.functional.cross_entropy(logits, targets[0])
        losses.append(model.loss(ids, targets, recurrence=False))
        torch.testing.assert_close(losses[-1], expected, rtol=0, atol=1e-9)
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-5


@pytest.mark.parametrize("system", ["sp4096", "sp8192"])
@torch.no_grad()
def test_recurrence_changes_the_logits(system: str) -> None:
    config = narrow_config(system)
    model, ids = random_model(config), random_ids(config)
    assert (model.logits(ids, recurrence=True) - model.logits(ids, recurrence=False)).abs().max() > 1e-3


@torch.no_grad()
def test_training_of_sp2048_sees_quantized_matrices_and_evaluation_does_not() -> None:
    config = narrow_config("sp2048")
    model, ids = random_model(config), random_ids(config)
    quantized = {}
    for name, weight in model.named_parameters():
        quantized[name] = weight
        if name in block_matrices(model):
            clip = torch.quantile(weight.abs(), 0.9999984, dim=1).clamp_min(1e-8)[:, None]
            scale = clip / 31
            quantized[name] = torch.round(torch.maximum(torch.minimum(weight, clip), -clip) / scale) * scale
    expected = reference_logits("sp2048", quantized, ids, recurrence=False)
    plain = reference_logits("sp2048", dict(model.named_parameters()), ids, recurrence=False)
    torch.testing.assert_close(model.train().logits(ids, recurrence=False), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.eval().logits(ids, recurrence=False), plain, rtol=0, atol=1e-9)
    assert (expected - plain).abs().max() > 1e-3
