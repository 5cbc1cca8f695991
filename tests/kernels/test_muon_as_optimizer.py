"""What PyTorch's own tests expect of every optimizer."""

import copy

import pytest
import torch
from muon_truth import parameters, set_gradients, train
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau

from golf_kernels import Muon

CONFIGS = [
    {},
    {"lr": 0.02},
    {"lr": torch.tensor(0.02, dtype=torch.float64)},
    {"weight_decay": 0.2},
    {"nesterov": False},
    {"normuon": True, "row_normalize": True},
    {"adjust_lr_fn": "match_rms_adamw", "dampened": False},
]


def least_squares():
    """A weight and its loss, whose least value is 0."""
    weight, inputs, target = parameters(((10, 5), (5, 8), (10, 8)))
    return weight, lambda: (weight @ inputs.detach() - target.detach()).square().sum()


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_steps_go_downhill(options, contiguous):
    weight, loss = least_squares()
    if not contiguous:
        weight.data = weight.data.T.contiguous().T
    optimizer = Muon([weight], **options)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert closure().item() < first and weight.is_contiguous() == contiguous


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: ExponentialLR(o, 0.9),
        lambda o: LinearLR(o, total_iters=40),
        lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
    ],
)
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_schedulers_set_the_rate_of_each_group(schedule, kind):
    weight, loss = least_squares()
    other = parameters()[0]
    optimizer = Muon([{"params": [weight]}, {"params": [other], "lr": kind(0.04)}], lr=kind(0.02))
    scheduler = schedule(optimizer)
    first = loss().item()
    for _ in range(6):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert loss().item() < first
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates[0] == pytest.approx(rates[1] / 2) and rates[0] < 0.019


def test_a_tensor_as_rate_takes_the_steps_of_a_number():
    found, want = (train(Muon(parameters(), lr=lr)) for lr in (torch.tensor(0.1, dtype=torch.float64), 0.1))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_groups_have_their_own_options_and_may_be_empty():
    still, moved = parameters()[:2]
    optimizer = Muon([{"params": [still], "lr": 0.0}, {"params": [moved]}, {"params": []}], lr=0.1)
    set_gradients([still, moved], 0)
    before = [param.detach().clone() for param in (still, moved)]
    optimizer.step()
    assert torch.equal(still, before[0]) and not torch.equal(moved, before[1])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [moved]})


def test_zero_gradients_move_nothing_without_weight_decay():
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = Muon(params, weight_decay=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(torch.equal(param, start) for param, start in zip(params, before, strict=True))


def test_gradients_are_left_as_they_are():
    params = parameters()
    optimizer = Muon(params, row_normalize=True, normuon=True)
    set_gradients(params, 0)
    before = [param.grad.clone() for param in params]
    optimizer.step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, before, strict=True))


@pytest.mark.parametrize("options", CONFIGS)
def test_a_loaded_state_goes_on_bit_for_bit_and_is_not_shared(options):
    optimizer = Muon(parameters(), **options)
    weights = train(optimizer, steps=2)
    state = optimizer.state_dict()
    other = Muon([torch.nn.Parameter(weight.clone()) for weight in weights], **options)
    other.load_state_dict(copy.deepcopy(state))
    again = other.state_dict()
    assert again["param_groups"] == state["param_groups"] and again["state"].keys() == state["state"].keys()
    expected = train(optimizer, start=2, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(train(other, start=2, steps=2), expected, strict=True))
    with pytest.raises(ValueError, match="size of optimizer's group"):
        Muon(parameters()[:1]).load_state_dict(state)


def test_hooks_run_around_steps_and_states():
    seen = []
    optimizer = Muon(parameters())
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before step"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before state"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("after state"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after load"))
    train(optimizer, steps=1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before step", "after step", "before state", "after state", "before load", "after load"]
