"""The product with the residual in its epilogue, against float64, and a layer that uses it."""

import functools

import operator_truth
import pytest
import torch
from operator_truth import DEVICE, ON_GPU, errors, exactly, within

from golf_kernels import dispatch
from golf_kernels.linear_residual import linear_residual
from train.config import Config
from train.model.block import Block, BlockInputs
from train.model.compile import write_out
from train.model.rope import rotary_table

random = functools.partial(operator_truth.random, device=DEVICE)
BACKENDS = dispatch.available_backends("linear_residual", DEVICE)
# the interpreter multiplies the bit patterns of bfloat16
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16, torch.float32)
LEAVES = ("x", "weight", "residual")


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request, monkeypatch, poisoned_memory):
    monkeypatch.setenv("GOLF_BACKEND", f"linear_residual={request.param}")
    return request.param


def plain(x, weight, residual):
    return residual + x @ weight.T


def made(rows, depth, width, dtype):
    tensors = (random(*rows, depth, seed=0), random(width, depth, seed=1) * depth**-0.5, random(*rows, width, seed=2))
    return {name: t.to(dtype).requires_grad_() for name, t in zip(LEAVES, tensors, strict=True)}


def run(function, tensors):
    y = function(**tensors)
    upstream = random(*y.shape, seed=3, dtype=tensors["x"].dtype).to(y.dtype)
    return {"y": y.detach(), **dict(zip(LEAVES, torch.autograd.grad(y, list(tensors.values()), upstream), strict=True))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# rows and sizes that are no multiple of a tile
@pytest.mark.parametrize("shape", [((2, 67), 64, 256), ((131,), 72, 40), ((1,), 8, 8)], ids=str)
def test_errs_no_more_than_the_plain_product_and_sum(shape, dtype):
    tensors = made(*shape, dtype)
    want = run(plain, exactly(tensors))
    found, usual = (errors(run(f, tensors), want) for f in (linear_residual, plain))
    assert within(found, usual, dtype), (found, usual)
    # the sum is rounded once, where two operations round twice
    assert found["y"] < 0.9 * usual["y"] or dtype == torch.float32 or shape[0] == (1,), (found, usual)


def test_strides_and_no_rows():
    tensors = made((6,), 16, 24, torch.float32)
    views = {
        "x": tensors["x"].detach().T.contiguous().T.requires_grad_(),
        "weight": torch.cat([tensors["weight"]] * 2, dim=1)[:, :16].detach().requires_grad_(),
        "residual": tensors["residual"].detach().repeat_interleave(2, dim=0)[::2].requires_grad_(),
    }
    found, want = run(linear_residual, views), run(plain, exactly(tensors))
    assert all(error < 1e-6 for error in errors(found, want).values())
    empty = made((0,), 16, 24, torch.float32)
    assert run(linear_residual, empty)["weight"].count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (24, 8), r"weight: expected shape \(d, 16\) with d > 0"),
        ("residual", (6, 25), r"residual: expected shape \(6, 24\)"),
        ("residual", (5, 24), r"residual: expected shape \(6, 24\)"),
    ],
)
def test_wrong_inputs_are_refused(name, shape, message):
    tensors = made((6,), 16, 24, torch.float32) | {name: torch.zeros(shape, device=DEVICE)}
    with pytest.raises(ValueError, match=message):
        linear_residual(**tensors)


def test_autocast_multiplies_in_its_dtype_and_adds_in_the_residuals():
    tensors = made((9,), 16, 24, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, want = linear_residual(**tensors), plain(**tensors)
    assert found.dtype == want.dtype == torch.float32
    assert (found - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["serial", "gptj", "lanes"])
def test_a_layer_has_the_same_gradients_through_it(form, compiled):
    torch.manual_seed(0)
    config = Config(num_layers=1, model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=8, xsa_last_n=1, head_gate=True)
    block = Block(config, 0).to(DEVICE)
    for weight in (block.attention.output, block.mlp.down, block.attention.gate, block.attn_scale):
        weight.data.normal_(std=0.3)
    rotary = rotary_table(21, 8, 1e4, dtype=torch.float32, device=torch.device(DEVICE))
    x, x0 = (random(2, 21, 64, seed=seed).float().requires_grad_() for seed in (1, 2))
    leaves = [x, x0, *block.parameters()]
    found = []
    others = frozenset(["leaky_relu2_mlp", "mix_rms_norm", "qk_norm_rope", "qkv_norm_rope", "xsa"])
    for left_out in (others | {"linear_residual"}, others):
        write_out(block, left_out)

        def function(x, x0):
            inputs = BlockInputs(x0, rotary)
            return block.run_lanes(x, x, inputs)[0] if form == "lanes" else block(x, inputs, form=form)

        run_it = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
        y = run_it(x, x0)
        found.append([y, *torch.autograd.grad(y, leaves, random(2, 21, 64, seed=3).float(), materialize_grads=True)])
    assert block.replacements == {"linear_residual"}
    for usual, fused in zip(*found, strict=True):
        assert (usual - fused).norm() <= 2e-6 * usual.norm()
