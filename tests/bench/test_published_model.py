"""The yardstick's layers compute what the published scripts write, bit for bit, with the trainer's parameters."""

import pytest
import torch
import torch.nn.functional as F
from model_systems import narrow_config, random_ids, random_model

from benchmarks.measure.published_model import PublishedAttention, PublishedMLP, published_model
from train.config import Config
from train.model.attention import Attention
from train.model.mlp import MLP
from train.model.rope import rotary_table, rotate


def test_attention_is_bit_for_bit_the_scripts_straight_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # short bfloat16 sequences go through float32 on a CPU, but not on a GPU
    monkeypatch.setattr("train.model.attention_backends._LONG_ON_CPU", 0)
    torch.manual_seed(0)
    attention = Attention(Config(num_layers=1, model_dim=64, num_heads=4, num_kv_heads=2, xsa_last_n=0), 0)
    attention.output.data.normal_()
    attention.q_gain.data.normal_()
    rotary = rotary_table(29, 8, 1e4, dtype=torch.bfloat16, device=torch.device("cpu"))
    x, upstream = torch.randn(2, 2, 29, 64).bfloat16()
    leaves = [x.requires_grad_(), torch.randn(64).requires_grad_(), *attention.parameters()]

    def results(y: torch.Tensor) -> list[torch.Tensor]:
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    def straight(x: torch.Tensor, scale: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        q_weight, k_weight, v_weight, o_weight, gain = (weight.bfloat16() for weight in weights)
        query, key, value = (F.linear(x, weight).unflatten(-1, (-1, 16)) for weight in (q_weight, k_weight, v_weight))
        query, key = (rotate(F.rms_norm(part, (16,), eps=2**-23), rotary) for part in (query, key))
        heads = [part.transpose(1, 2) for part in (query * gain[:, None], key, value)]
        output = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
        return scale.bfloat16() * F.linear(output.flatten(-2), o_weight)

    want = results(straight(*leaves))
    published = PublishedAttention(attention)
    for layer in (published, attention):
        found = results(layer(x, rotary, extra_value=None, documents=None, scale=leaves[1]))
        assert [torch.equal(*pair) for pair in zip(found, want, strict=True)] == [layer is published] * len(want)


def test_mlp_is_bit_for_bit_the_scripts_straight_line() -> None:
    torch.manual_seed(0)
    mlp = MLP(Config(model_dim=32, num_heads=1, num_kv_heads=1, mlp_slope=0.5), 0.5)
    mlp.down.data.normal_()
    x, residual, upstream = torch.randn(3, 2, 29, 32).bfloat16()
    leaves = [x.requires_grad_(), torch.randn(32).requires_grad_(), *mlp.parameters()]

    def results(y: torch.Tensor) -> list[torch.Tensor]:
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    x, scale, up, down = leaves
    hidden = F.leaky_relu(F.linear(F.rms_norm(x, (32,), eps=2**-23) * 0.5, up.bfloat16()), 0.5).square()
    want = results(residual + scale.bfloat16() * F.linear(hidden, down.bfloat16()))
    published = PublishedMLP(mlp)
    for layer in (published, mlp):
        found = results(layer(x, residual, scale.bfloat16()))
        assert [torch.equal(*pair) for pair in zip(found, want, strict=True)] == [layer is published] * len(want)


@pytest.mark.parametrize("system", ["sp8192", "frontier"])
def test_the_whole_model_has_the_trainers_names_weights_and_loss(system: str) -> None:
    model = random_model(narrow_config(system))
    published = published_model(model)
    assert list(published.state_dict()) == list(model.state_dict())
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in published.state_dict().items())
    assert not any(isinstance(module, (Attention, MLP)) for module in published.modules())
    assert isinstance(model.blocks[0].attention, Attention) and not model.blocks[0].written_out
    ids = random_ids(model.config)
    losses = [each(ids, ids.roll(-1, 1), recurrence=True) for each in (published, model)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
