"""What becomes of an optimizer outside its process: files, copies, states of other optimizers."""

import copy
import io
import pickle

import pytest
import torch
from muon_truth import assert_close, parameters, train

from golf_kernels import Muon

OPTIONS = {"lr": 0.02, "normuon": True, "row_normalize": True, "compute_dtype": torch.float64}


def test_the_state_survives_a_file_and_torch_state_is_taken():
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

    theirs = torch.optim.Muon(parameters(), lr=0.03, momentum=0.9)
    train(theirs, steps=1)
    ours = Muon(parameters())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.03 and ours.param_groups[0]["dampened"] is True
    assert torch.equal(
        ours.state[ours.param_groups[0]["params"][0]]["momentum_buffer"],
        theirs.state[theirs.param_groups[0]["params"][0]]["momentum_buffer"],
    )
    train(ours, steps=1)


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
    with pytest.raises(
        ValueError, match=r"no value for adjust_lr_fn, momentum, .*: expected the state of Muon or torch"
    ):
        optimizer.load_state_dict(other)
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
