"""torch.compile(optimizer.step) with rates that change every step."""

import pytest
import torch

from golf_kernels import Muon

RATES = (0.1, 0.08, 0.06, 0.04, 0.02)
DECAYS = (0.5, 0.4, 0.3, 0.2, 0.1)
MOMENTA = (0.5, 0.6, 0.7, 0.8, 0.9)


def steps(compiled):
    """The changes of three weights [0, 0] in five steps beside the weight decay, the first with a constant decay of 0.5."""
    torch._dynamo.reset()
    weights = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    options = [{"weight_decay": 0.5, "momentum": 0.0, "nesterov": False}, {"dampened": False}, {"dampened": True}]
    groups = [{"params": [w]} | option for w, option in zip(weights, options, strict=True)]
    optimizer = Muon(groups, compute_dtype=torch.float32)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    found = []
    for index in range(5):
        for group in optimizer.param_groups:
            group["lr"] = RATES[index]
        for group in optimizer.param_groups[1:]:
            group |= {"weight_decay": DECAYS[index], "momentum": MOMENTA[index]}
        before = [weight[0, 0].item() for weight in weights]
        weights[0].grad = torch.eye(2)
        for weight in weights[1:]:
            weight.grad = torch.tensor([[1.0 + index, 2.0], [0.5, 1.0]])
        step()
        decays = [RATES[index] * group["weight_decay"] for group in optimizer.param_groups]
        found.append([w[0, 0].item() - b * (1 - d) for w, b, d in zip(weights, before, decays, strict=True)])
    return found


def test_rate_decay_and_momentum_are_those_of_the_step():
    found = steps(compiled=True)
    # the orthogonalized identity times each rate
    assert [row[0] for row in found] == pytest.approx([-0.11081, -0.08865, -0.06649, -0.04432, -0.02216], abs=1e-5)
    for row, eager in zip(found, steps(compiled=False), strict=True):
        assert row == pytest.approx(eager, abs=1e-6)
