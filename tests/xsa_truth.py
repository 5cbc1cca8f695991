"""XSA as people write it, and how results are compared with float64, for every back end."""

import torch
import torch.nn.functional as F

LEAVES = ("output", "value")


def formula(output, value):
    """The chain as people write it, each value repeated for its heads, in the dtype of its inputs."""
    direction = F.normalize(value.repeat_interleave(output.shape[2] // value.shape[2], dim=2), dim=-1)
    return output - (output * direction).sum(dim=-1, keepdim=True) * direction


def run(function, tensors, dy):
    """Result and gradients by name."""
    y = function(**tensors)
    found = torch.autograd.grad(y, [tensors[name] for name in LEAVES], dy)
    return dict(zip(("y", *LEAVES), [y.detach(), *found], strict=True))


def exactly(tensors):
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


def errors(got, want):
    return {name: float((got[name].double() - want[name]).norm() / want[name].norm()) for name in want}
