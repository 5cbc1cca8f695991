from __future__ import annotations

import math

import pytest
import torch

from golf_kernels import dispatch
from golf_kernels.xsa import written_out
from train.config import Config
from train.model.attention import Attention
from train.model.rope import rotary_table

DEVICE = torch.device("cpu")


def heads(count: int, *, seed: int, length: int = 7, dim: int = 6) -> torch.Tensor:
    return torch.randn(2, length, count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_xsa_leaves_nothing_along_the_value() -> None:
    y, v = heads(4, seed=0), heads(2, seed=1)
    found = written_out(y, v)
    for head in range(4):
        along = (found[:, :, head] * v[:, :, head // 2]).sum(-1)
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-13)
        expected = y[:, :, head].clone()
        value = v[:, :, head // 2]
        expected -= (expected * value).sum(-1, keepdim=True) / (value * value).sum(-1, keepdim=True) * value
        torch.testing.assert_close(found[:, :, head], expected, rtol=0, atol=1e-13)


def test_xsa_of_a_multiple_of_the_value_is_zero() -> None:
    v = heads(2, seed=1)
    factors = heads(4, seed=2, dim=1)
    y = torch.stack([factors[:, :, head] * v[:, :, head // 2] for head in range(4)], dim=2)
    torch.testing.assert_close(written_out(y, v), torch.zeros_like(y), rtol=0, atol=1e-14)


def test_xsa_of_a_zero_value_leaves_the_output() -> None:
    y = heads(2, seed=0)
    assert torch.equal(written_out(y, torch.zeros_like(y)), y)


def test_xsa_is_on_in_the_last_layers_alone() -> None:
    config = Config(num_layers=5, model_dim=16, num_heads=2, num_kv_heads=1, xsa_last_n=2)
    assert [Attention(config, layer).xsa for layer in range(5)] == [False, False, False, True, True]


def test_query_gain_multiplies_scores_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
        seen.extend([query, key])
        return query

    monkeypatch.setattr("train.model.attention.causal_attention", core)
    torch.manual_seed(0)
    attention = Attention(Config(model_dim=16, num_heads=2, num_kv_heads=1, qk_gain_init=5.0), 0).double()
    assert attention.q_gain.tolist() == [5.0, 5.0]
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    rotary = rotary_table(4, 8, 1e4, dtype=torch.float64, device=DEVICE)
    # after QK-norm every rotated query has length √D times its head's gain
    attention.q_gain.data.copy_(torch.tensor([2.0, -3.0]))
    attention(x, rotary)
    query, key = seen
    expected = math.sqrt(8) * torch.tensor([2.0, 3.0]).double().expand(1, 4, 2)
    torch.testing.assert_close(query.norm(dim=-1), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(key.norm(dim=-1), torch.full((1, 4, 1), math.sqrt(8)).double(), rtol=1e-5, atol=0)


def test_output_projection_starts_at_zero() -> None:
    attention = Attention(Config(model_dim=16, num_heads=2, num_kv_heads=1), 0)
    rotary = rotary_table(3, 8, 1e4, dtype=torch.float32, device=DEVICE)
    assert attention(torch.randn(1, 3, 16), rotary).count_nonzero() == 0


@pytest.mark.parametrize("xsa", [False, True])
def test_attention_passes_gradcheck(xsa: bool) -> None:
    torch.manual_seed(0)
    config = Config(num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, rope_dims=2, xsa_last_n=int(xsa))
    attention = Attention(config, 0).double()
    names = [name for name, _ in attention.named_parameters()]
    weights = [torch.randn_like(weight, requires_grad=True) for weight in attention.parameters()]
    rotary = rotary_table(3, 2, 1e4, dtype=torch.float64, device=DEVICE)
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    extra = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, extra: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(attention, named, (x, rotary), {"extra_value": extra})

    # one random direction through all the weights at once
    assert torch.autograd.gradcheck(run, (x, extra, *weights), fast_mode=True)


def xsa_attention(**changes: object) -> Attention:
    torch.manual_seed(0)
    attention = Attention(Config(num_layers=1, model_dim=64, num_heads=4, num_kv_heads=2, xsa_last_n=1, **changes), 0)
    attention.output.data.normal_(std=0.1)
    return attention


def inputs_of(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """x, the factors of the result's channels and an upstream gradient."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in ((2, 70, 64), (64,), (2, 70, 64))]


def results_of(attention: Attention, dtype: torch.dtype, device: str, rows_from: int = 0) -> list[torch.Tensor]:
    rotary = rotary_table(70, 16, 1e4, dtype=dtype, device=torch.device(device))
    x, scale, upstream = inputs_of(dtype, device)
    leaves = [x.requires_grad_(), scale.requires_grad_(), *attention.parameters()]
    y = attention(x, rotary, scale=scale, rows_from=rows_from)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream[:, rows_from:])]


@pytest.mark.parametrize("rows_from", [0, 40])
@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.skipif("triton" not in dispatch.available_backends("xsa"), reason=f"{dispatch.triton_problem()}")
def test_xsa_is_the_same_on_triton_kernels(qat: bool, rows_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    attention = xsa_attention(qat=qat).to(device)
    attention.written_out = frozenset(["xsa"])
    usual = results_of(attention, dtype, device, rows_from)
    monkeypatch.setenv("GOLF_BACKEND", "torch,xsa=triton")
    attention.written_out = frozenset()
    for mine, plain in zip(results_of(attention, dtype, device, rows_from), usual, strict=True):
        assert (mine - plain).norm() <= (2e-6 if dtype == torch.float32 else 2e-2) * plain.norm()
