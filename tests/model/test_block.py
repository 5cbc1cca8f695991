from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from train.config import Config
from train.model.block import Block, BlockInputs
from train.model.rope import rotary_table

CONFIG = Config(num_layers=4, model_dim=8, num_heads=2, num_kv_heads=1, mlp_slope=0.5, ln_scale=True, xsa_last_n=4)


def make(config: Config = CONFIG, layer: int = 3) -> tuple[Block, torch.Tensor, BlockInputs]:
    torch.manual_seed(0)
    block = Block(config, layer).double()
    for weight in block.parameters():
        weight.data.normal_()
    rotary = rotary_table(3, 4, 1e4, dtype=torch.float64, device=torch.device("cpu"))
    x, x0 = (torch.randn(1, 3, 8, dtype=torch.float64) for _ in range(2))
    return block, x, BlockInputs(x0, rotary)


def norm(x: torch.Tensor) -> torch.Tensor:
    # layer 3 with LN scale: 1/√4
    return 0.5 * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 2**-23)


def parts(block: Block, inputs: BlockInputs):
    def attention(n: torch.Tensor) -> torch.Tensor:
        return block.attn_scale * block.attention(n, inputs.rotary)

    def mlp(n: torch.Tensor) -> torch.Tensor:
        h = n @ block.mlp.up.T
        return block.mlp_scale * (torch.where(h > 0, h, 0.5 * h) ** 2 @ block.mlp.down.T)

    return attention, mlp, lambda x: block.resid_mix[0] * x + block.resid_mix[1] * inputs.x0


def test_serial_and_gptj_forms_equal_their_formulas() -> None:
    block, x, inputs = make()
    attention, mlp, mix = parts(block, inputs)
    h = mix(x)
    u = h + attention(norm(h))
    torch.testing.assert_close(block(x, inputs, form="serial"), u + mlp(norm(u)), rtol=0, atol=1e-11)
    torch.testing.assert_close(block(x, inputs, form="gptj"), u + mlp(norm(h)), rtol=0, atol=1e-11)


def test_lanes_mix_the_embedding_into_the_attention_lane_alone() -> None:
    block, lane0, inputs = make()
    lane1 = torch.randn_like(lane0)
    attention, mlp, mix = parts(block, inputs)
    found0, found1 = block.run_lanes(lane0, lane1, inputs)
    torch.testing.assert_close(found0, mix(lane0) + attention(norm(mix(lane0))), rtol=0, atol=1e-11)
    torch.testing.assert_close(found1, lane1 + mlp(norm(lane1)), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("layer", "ln_scale", "gain"), [(0, True, 1.0), (3, True, 0.5), (3, False, 1.0)])
def test_both_norms_have_the_scale_of_the_layer(layer: int, ln_scale: bool, gain: float) -> None:
    block = Block(CONFIG.replace(ln_scale=ln_scale), layer)
    x = torch.ones(1, 1, 8)
    torch.testing.assert_close(block.normed(x), gain * x, rtol=1e-6, atol=0)
    assert block.mlp.gain == gain


@pytest.mark.parametrize("form", ["serial", "gptj"])
def test_a_block_starts_as_the_identity(form: str) -> None:
    block, x, inputs = Block(CONFIG, 2).double(), *make()[1:]
    assert torch.equal(block(x, inputs, form=form), x)
    assert block.resid_mix.tolist() == [[1.0] * 8, [0.0] * 8]


@pytest.mark.parametrize(("form", "own"), [("serial", True), ("gptj", False), ("lanes", True)])
def test_the_mlp_knows_when_its_input_is_the_residual(form: str, own: bool) -> None:
    block, x, inputs = make()
    seen = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        calls = [node for node in module.graph.nodes if "leaky_relu2_mlp" in str(node.target)]
        # (x, w_up, w_down, residual, scale, slope, norm_eps, gain, add_x, save)
        seen.extend((node.args[3] is None, node.args[8]) for node in calls)
        return module.forward

    def run(x: torch.Tensor, x0: torch.Tensor) -> object:
        return block.run_lanes(x, x0, inputs) if form == "lanes" else block(x, inputs, form=form)

    torch.compile(run, backend=backend, fullgraph=True)(x, inputs.x0)
    assert seen == [(own, own)]


@pytest.mark.parametrize("form", ["serial", "gptj", "lanes"])
def test_block_passes_gradcheck(form: str) -> None:
    block, x, inputs = make()
    names = [name for name, _ in block.named_parameters()]
    leaves = [weight.detach().clone().mul_(0.3).requires_grad_() for weight in block.parameters()]

    class Run(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
            given = inputs._replace(x0=x0)
            return self.block.run_lanes(x, x0, given) if form == "lanes" else self.block(x, given, form=form)

    def run(x: torch.Tensor, x0: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        named = {f"block.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(Run(), named, (x, x0))

    # many weights and a scalar-sized model: one random direction checks all of them at once
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), inputs.x0.requires_grad_(), *leaves), fast_mode=True)
