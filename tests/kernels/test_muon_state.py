"""What becomes of an optimizer outside its process: files, copies, states of other optimizers."""

import copy
import io
import pickle

import pytest
import torch
from muon_truth import assert_close, parameters, train

from golf_kernels import Muon

OPTIONS = {"lr": 0.02, "normuon": True, "row_normalize": True, "compute_dtype": torch.float64}


def test_the_state_survives_a_file():
    straight = train(Muon(parameters(), **OPTIONS), steps=6)
    first = Muon(parameters(), **OPTIONS)
    weights = train(first, steps=3)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    params = [torch.nn.Parameter(w) for w in weights]
    second = Muon(params, lr=9.0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert_close(train(second, start=3, steps=3), straight, 1e-12)


def test_the_state_goes_to_torch_and_back():
    def moments(optimizer):
        return [entry["momentum_buffer"] for entry in optimizer.state.values()]

    # ns_steps and ns_coefficients are None here, which torch cannot read
    ours = Muon(parameters(), lr=0.03, momentum=0.9, weight_decay=0.2)
    weights = train(ours, steps=2)
    theirs = torch.optim.Muon([torch.nn.Parameter(w) for w in weights])
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert theirs.param_groups[0]["lr"] == 0.03 and theirs.param_groups[0]["ns_steps"] == 5
    after = train(theirs, start=2, steps=1)
    expected = train(ours, start=2, steps=1)
    assert_close(moments(theirs), moments(ours), 1e-12)
    # torch multiplies in bfloat16
    assert_close(after, expected, 1e-3)

    back = Muon([torch.nn.Parameter(w) for w in expected])
    back.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert back.param_groups[0]["lr"] == 0.03 and back.param_groups[0]["weight_decay"] == 0.2
    assert_close(train(back, start=3, steps=2), train(ours, start=3, steps=2), 1e-12)


KEPT = {
    "row_normalize": True, "normuon": True, "dampened": False, "coefficients": "aol", "compute_dtype": torch.float64,
}  # fmt: skip


@pytest.mark.parametrize("origin", ["torch", "KellerJordan"])
def test_a_foreign_state_leaves_the_options_that_it_lacks(origin):
    theirs = torch.optim.Muon(parameters(), lr=0.03, momentum=0.9)
    train(theirs, steps=1)
    state = copy.deepcopy(theirs.state_dict())
    if origin == "KellerJordan":
        # the parameter group of KellerJordan/Muon's class, whose momentum is torch's
        group = state["param_groups"][0]
        state["param_groups"] = [{name: group[name] for name in ("lr", "weight_decay", "momentum", "params")}]
    ours = Muon(parameters(), **KEPT)
    ours.load_state_dict(state)
    group = ours.param_groups[0]
    assert {name: group[name] for name in KEPT} == KEPT
    assert (group["lr"], group["momentum"], group["weight_decay"], group["ns_steps"]) == (0.03, 0.9, 0.1, None)
    for mine, other in zip(group["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(ours.state[mine]["momentum_buffer"], theirs.state[other]["momentum_buffer"])
    train(ours, steps=1)
    # coefficients that torch was given are not replaced
    state["param_groups"][0]["ns_coefficients"] = (2.0, -1.5, 0.5)
    with pytest.raises(ValueError, match="ns_coefficients and coefficients: expected one of them, found both"):
        Muon(parameters(), **KEPT).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adjust_lr_fn": "adam"}, "adjust_lr_fn: expected None or one of"),
        ({"normuon_beta2": 5.0}, "normuon_beta2: expected"),
        ({"lr": -1.0}, "lr: expected a number >= 0"),
    ],
)
def test_a_state_with_bad_options_or_of_another_optimizer_changes_nothing(change, message):
    optimizer = Muon(parameters(), lr=0.02)
    train(optimizer, steps=1)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0] |= change
    other = torch.optim.AdamW(parameters()).state_dict()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match=r"no value for momentum: expected the state of Muon, torch.optim.Muon or"):
        optimizer.load_state_dict(other)
    with pytest.raises(ValueError, match=r"the option dampening, as in torch.optim.SGD: expected the state of Muon"):
        optimizer.load_state_dict(torch.optim.SGD(parameters(), momentum=0.9).state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(state["momentum_buffer"], before["state"][index]["momentum_buffer"])
        for index, state in optimizer.state_dict()["state"].items()
    )


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_twin_with_its_model_goes_on_alone(way):
    params = parameters()
    optimizer = Muon(params, **OPTIONS)
    train(optimizer, steps=2)
    twin_params, twin = copy.deepcopy((params, optimizer)) if way == "deepcopy" else pickled((params, optimizer))
    before = [param.detach().clone() for param in params]
    assert all(a is b for a, b in zip(twin.param_groups[0]["params"], twin_params, strict=True))
    after = train(twin, start=2, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, train(optimizer, start=2, steps=2), strict=True))


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def test_a_twin_has_the_same_process_group_and_a_file_has_none():
    class Group:
        """Something that is neither copied nor pickled, as a process group."""

        def __reduce_ex__(self, protocol):
            raise TypeError("cannot pickle a process group")

    group = Group()
    optimizer = Muon(parameters(), process_group=group)
    assert copy.deepcopy(optimizer).process_group is group
    assert copy.copy(optimizer).process_group is group
    with pytest.raises(TypeError, match=r"process group.*expected state_dict\(\) .* process_group = None"):
        pickle.dumps(optimizer)
    optimizer.process_group = None
    assert pickled(optimizer).process_group is None
