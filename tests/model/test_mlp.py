from __future__ import annotations

import pytest
import torch

from golf_kernels import dispatch
from train.config import Config
from train.model.linear import observe_inputs
from train.model.mlp import MLP


def make(slope: float, gain: float = 0.5) -> MLP:
    torch.manual_seed(0)
    mlp = MLP(Config(model_dim=8, num_heads=1, num_kv_heads=1, mlp_mult=1.5, mlp_slope=slope), gain).double()
    mlp.down.data.normal_()
    return mlp


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(2, 3, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, residual, torch.randn(8, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("observed", [False, True])
def test_mlp_equals_the_formula_observed_or_not(slope: float, observed: bool) -> None:
    mlp = make(slope)
    x, residual, scale = inputs()
    h = 0.5 * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 2**-23) @ mlp.up.T
    a = torch.where(h > 0, h * h, slope * slope * h * h)
    expected = residual + scale * (a @ mlp.down.T)
    seen: dict[str, torch.Tensor] = {}
    if observed:
        with observe_inputs(mlp, lambda name, value: seen.__setitem__(name, value)):
            found = mlp(x, residual, scale)
        torch.testing.assert_close(seen["down"], a, rtol=0, atol=1e-12)
        torch.testing.assert_close(seen["up"] @ mlp.up.T, h, rtol=0, atol=1e-12)
    else:
        found = mlp(x, residual, scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_squared_leaky_relu_has_the_published_values_and_slopes() -> None:
    # with one channel, no norm to speak of and unit weights the MLP is its activation
    mlp = MLP(Config(model_dim=8, num_heads=1, num_kv_heads=1, mlp_mult=1.0, mlp_slope=0.5), 1.0).double()
    mlp.up.data.copy_(torch.eye(8) * 2)
    mlp.down.data.copy_(torch.eye(8))
    x = torch.tensor([[-1.0] * 4 + [1.0] * 4], dtype=torch.float64)
    one, zero = torch.ones(8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    torch.testing.assert_close(mlp(x, zero, one)[0], torch.tensor([1.0] * 4 + [4.0] * 4).double(), rtol=1e-6, atol=0)
    # d/dw of the diagonal of W_up is f'(h) · x, with f'(h) = 2h above zero and 0.5 h below
    mlp(x, zero, one).sum().backward()
    slopes = mlp.up.grad.diagonal() * torch.sign(x[0])
    torch.testing.assert_close(slopes, torch.tensor([-1.0] * 4 + [4.0] * 4).double(), rtol=1e-6, atol=0)


def test_mlp_starts_as_its_residual() -> None:
    mlp = MLP(Config(model_dim=8, num_heads=1, num_kv_heads=1), 1.0)
    x, residual, scale = (value.float() for value in inputs())
    assert torch.equal(mlp(x, residual, scale), residual)


def test_mlp_passes_gradcheck() -> None:
    mlp = make(0.5)
    leaves = [value.requires_grad_() for value in inputs()]

    def run(
        x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        return torch.func.functional_call(mlp, {"up": up, "down": down}, (x, residual, scale))

    assert torch.autograd.gradcheck(
        run, (*leaves, mlp.up.detach().requires_grad_(), mlp.down.detach().requires_grad_())
    )


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.skipif(
    "triton" not in dispatch.available_backends("leaky_relu2_mlp"), reason=f"{dispatch.triton_problem()}"
)
def test_mlp_is_the_same_on_triton_kernels(slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    mlp = MLP(Config(model_dim=64, num_heads=1, num_kv_heads=1, mlp_mult=3.0, mlp_slope=slope), 0.7)
    mlp.down.data.normal_(std=0.1)
    mlp.to(device)
    x = torch.randn(2, 70, 64, device=device, dtype=dtype)
    scale = torch.randn(64, device=device, dtype=dtype)
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("GOLF_BACKEND", f"leaky_relu2_mlp={backend}")
        leaf = x.clone().requires_grad_()
        y = mlp(leaf, leaf, scale)
        found[backend] = [y, *torch.autograd.grad(y.square().sum(), [leaf, mlp.up, mlp.down])]
    for mine, usual in zip(found["triton"], found["torch"], strict=True):
        assert (mine - usual).norm() <= (2e-6 if dtype == torch.float32 else 2e-2) * usual.norm()
