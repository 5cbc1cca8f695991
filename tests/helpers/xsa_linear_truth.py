"""XSA and the linear layer behind it as people write them, for every back end."""

import torch
import torch.nn.functional as F
import xsa_truth
from operator_truth import errors, exactly, random

from golf_kernels.xsa_linear import xsa_linear

LEAVES = ("output", "value", "weight")


def formula(output, value, weight):
    """The chain as people write it, in the dtype of its inputs."""
    return F.linear(xsa_truth.formula(output, value).flatten(2), weight)


def run(function, tensors, dy):
    """Result and gradients by name."""
    y = function(**tensors)
    found = torch.autograd.grad(y, [tensors[name] for name in LEAVES], dy)
    return dict(zip(("y", *LEAVES), [y.detach(), *found], strict=True))


def call(batch=2, length=5, queries=4, values=2, dim=6, columns=8, dtype=torch.float64, device="cpu"):
    """Random tensors of one call by name, and an upstream gradient."""
    tensors, _ = xsa_truth.heads(batch, length, queries, values, dim, dtype, device)
    width = queries * dim
    weight = random(columns, width, seed=7, dtype=dtype, device=device, size=max(width, 1) ** -0.5)
    dy = random(batch, length, columns, seed=8, dtype=dtype, device=device)
    return tensors | {"weight": weight.requires_grad_()}, dy


def errors_of_both(tensors, dy):
    """Relative errors of the operator and of the plain chain in the same dtype."""
    want = run(formula, exactly(tensors), dy.double())
    return [errors(run(function, tensors, dy), want) for function in (xsa_linear, formula)]
