"""QK-norm and rotation on the joint product of queries, keys and values, against float64."""

import functools

import operator_truth
import pytest
import torch
from operator_truth import DEVICE, errors, within
from operator_truth import ELEMENTWISE_DTYPES as DTYPES
from qk_norm_rope_truth import EPS, formula
from qk_norm_rope_truth import heads as separate_heads

from golf_kernels import dispatch
from golf_kernels.qkv_norm_rope import qkv_norm_rope
from train.config import Config
from train.model.attention import Attention
from train.model.compile import write_out
from train.model.rope import rotary_table

random = functools.partial(operator_truth.random, device=DEVICE)
BACKENDS = dispatch.available_backends("qkv_norm_rope", DEVICE)
# batch, length, heads, kv_heads, dim and rotary; rows are no multiple of a block
SIZES = [(2, 67, 8, 4, 64, 16), (3, 7, 5, 1, 10, 6), (1, 9, 6, 3, 80, 40), (1, 33, 2, 6, 8, 0)]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request, monkeypatch, poisoned_memory):
    monkeypatch.setenv("GOLF_BACKEND", f"qkv_norm_rope={request.param}")
    return request.param


def joint(sizes, dtype, uses):
    """Inputs of one call, and gradients for its results: those of the values have attention's and XSA's strides."""
    batch, length, heads, kv_heads, dim, _ = sizes
    tensors = separate_heads(*sizes, dtype, DEVICE)
    values = random(batch, length, kv_heads, dim, seed=5, dtype=dtype)
    qkv = torch.cat([tensors[n].detach().flatten(2) for n in ("q", "k")] + [values.flatten(2)], dim=-1)
    tables = {name: tensors[name] for name in ("cosine", "sine", "gain")}
    gradients = [random(batch, length, n, dim, seed=9 + n, dtype=dtype) for n in (heads, kv_heads)]
    turned = random(batch, kv_heads, length, dim, seed=7, dtype=dtype).transpose(1, 2)
    gradients += [turned, random(batch, length, kv_heads, dim, seed=8, dtype=dtype)][:uses]
    return {"qkv": qkv.requires_grad_(), **tables, "kv_heads": kv_heads, "dim": dim, "uses": uses}, gradients


def written_out(qkv, cosine, sine, gain, *, kv_heads, dim, eps, uses):
    q, k, v = qkv.unflatten(-1, (-1, dim)).split([len(gain), kv_heads, kv_heads], dim=2)
    return (*formula(q, k, cosine, sine, gain, eps=eps), *[v] * uses)


def run(function, inputs, gradients):
    results = function(**inputs, eps=EPS)
    found = torch.autograd.grad(results, [inputs["qkv"], inputs["gain"]], gradients)
    names = ("q_hat", "k_hat", "value", "qkv", "gain")
    return dict(zip(names, [*(r.detach() for r in results[:3]), *found], strict=True))


def in_float64(inputs, gradients):
    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.items() if torch.is_tensor(t)}
    return inputs | wide, [gradient.double() for gradient in gradients]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uses", [1, 2])
def test_errs_no_more_than_the_plain_chain(uses, dtype):
    given = joint(SIZES[0], dtype, uses)
    want = run(written_out, *in_float64(*given))
    found, plain = (errors(run(f, *given), want) for f in (qkv_norm_rope, written_out))
    assert within(found, plain, dtype), (found, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_shapes(sizes, dtype):
    given = joint(sizes, dtype, 2)
    found = errors(run(qkv_norm_rope, *given), run(written_out, *in_float64(*given)))
    assert max(found.values()) <= 2 * torch.finfo(dtype).eps, found


def test_the_joint_gradient_has_the_bits_of_the_separate_ones(backend):
    inputs, gradients = joint(SIZES[0], torch.float32, 1)
    got = run(qkv_norm_rope, inputs, gradients)
    q, k, _ = (part.detach().requires_grad_() for part in inputs["qkv"].unflatten(-1, (-1, 64)).split([8, 4, 4], dim=2))
    with dispatch.forced(f"qk_norm_rope={backend}"):
        tables = [inputs[name] for name in ("cosine", "sine", "gain")]
        results = torch.ops.golf.qk_norm_rope(q, k, *tables, EPS)[:2]
        dq, dk, dgain = torch.autograd.grad(results, [q, k, inputs["gain"]], gradients[:2])
    expected = torch.cat([dq.flatten(2), dk.flatten(2), gradients[2].flatten(2)], dim=-1)
    assert torch.equal(got["qkv"], expected) and torch.equal(got["gain"], dgain)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(shape):
    inputs, gradients = joint((*shape, 4, 2, 8, 4), torch.float32, 2)
    got = run(qkv_norm_rope, inputs, gradients)
    assert got["qkv"].shape == inputs["qkv"].shape and got["gain"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, r"qkv: expected shape \(B, T, 120\) for 4 \+ 2 x 3 heads of 12"),
        ({"uses": 3}, "uses: expected 1 or 2, found 3"),
        ({"eps": -1.0}, "eps: expected a number >= 0"),
    ],
)
def test_wrong_inputs_are_refused(changes, message):
    inputs, _ = joint((1, 3, 4, 2, 12, 4), torch.float32, 2)
    with pytest.raises(ValueError, match=message):
        qkv_norm_rope(**inputs | {"eps": EPS} | changes)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("xsa", [0, 1])
def test_attention_has_the_same_gradients_through_it(xsa, extra, compiled, backend, monkeypatch):
    torch.manual_seed(0)
    config = Config(num_layers=1, model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=8, xsa_last_n=xsa)
    attention = Attention(config, 0).to(DEVICE)
    attention.output.data.normal_(std=0.1)
    rotary = rotary_table(21, 8, 1e4, dtype=torch.float32, device=torch.device(DEVICE))
    x, value = random(2, 21, 64, seed=1).float(), random(2, 21, 32, seed=2).float()
    leaves = [x.requires_grad_(), *attention.parameters(), *([value.requires_grad_()] if extra else [])]
    found = []
    for left_out in (frozenset(["qkv_norm_rope", "qk_norm_rope", "xsa"]), frozenset(["qk_norm_rope", "xsa"])):
        write_out(attention, left_out)
        function = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled else attention
        y = function(x, rotary, extra_value=value if extra else None)
        found.append([y, *torch.autograd.grad(y, leaves, random(2, 21, 64, seed=3).float())])
    assert attention.replacements == {"qkv_norm_rope", "linear_residual"}
    for plain, joined in zip(*found, strict=True):
        assert (plain - joined).norm() <= 2e-6 * plain.norm()
