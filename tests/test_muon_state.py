"""What becomes of an optimizer outside its process: files, copies, states of other optimizers."""

import copy
import io

import pytest
import torch
from muon_truth import assert_close, parameters, train

from golf_kernels import Muon


def test_the_state_survives_a_file_and_torch_state_is_taken():
    options = {"lr": 0.02, "normuon": True, "row_normalize": True, "compute_dtype": torch.float64}
    straight = train(Muon(parameters(), **options), steps=6)
    first = Muon(parameters(), **options)
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
