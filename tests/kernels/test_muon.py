"""Muon against torch.optim.Muon and against its formulas written down in float64."""

import math

import pytest
import torch
from muon_truth import (
    QUINTIC,
    SHAPES,
    Launches,
    assert_close,
    orthogonalized,
    parameters,
    reference,
    set_gradients,
    train,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import _muon

from golf_kernels import COEFFICIENTS, Muon, cpu
from golf_kernels.muon import learning_rate_ratio
from golf_kernels.sharding import newton_schulz_cost

OPTIONS = [
    {},
    {"lr": 0.02, "weight_decay": 0.0},
    {"momentum": 0.8, "nesterov": False},
    {"adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 7, "eps": 1e-3},
    {"lr": torch.tensor(0.01, dtype=torch.float64)},
]

DEVICE_MOMENTUM = {"momentum": torch.tensor(0.95, dtype=torch.float64)}


@pytest.mark.parametrize("options", OPTIONS)
def test_one_to_one_with_torch_in_float64(options, monkeypatch):
    def exact(grad, ns_coefficients, ns_steps, eps):
        return orthogonalized(grad, (ns_coefficients,) * ns_steps, eps)

    # torch rounds to bfloat16 in there, and only in there
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", exact)
    ours, theirs = train(Muon(parameters(), **options)), train(torch.optim.Muon(parameters(), **options))
    assert_close(ours, theirs)


@pytest.mark.parametrize("options", OPTIONS[:6])
def test_one_to_one_with_torch_as_it_is(options):
    shapes = ((48, 80), (80, 48), (64, 64))

    def update(kind, dtype, **more):
        params = parameters(shapes, dtype)
        before = [param.detach().double() for param in params]
        return [a.double() - b for a, b in zip(train(kind(params, **options, **more)), before, strict=True)]

    exact = update(Muon, torch.float64)
    theirs = update(torch.optim.Muon, torch.float32)
    for dtype in (torch.bfloat16, None):
        ours = update(Muon, torch.float32, compute_dtype=dtype)
        for a, b, c in zip(ours, theirs, exact, strict=True):
            # a quarter is room for other summation orders; in float32 we are far closer than that
            assert (a - c).norm() < 1.25 * (b - c).norm()
            assert (a - b).norm() < 2.5 * (b - c).norm()


@pytest.mark.parametrize("fast", [False, True])
def test_products_are_bfloat16_where_a_cpu_has_them(fast, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: fast)
    dtype = torch.bfloat16 if fast else torch.float32
    as_default, named = (train(Muon(parameters(dtype=torch.float32), compute_dtype=d)) for d in (None, dtype))
    other = train(Muon(parameters(dtype=torch.float32), compute_dtype=torch.float32 if fast else torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(as_default, named, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(as_default, other, strict=True))
    # weights in float64 stay exact
    assert_close(train(Muon(parameters(), lr=0.02)), reference(lr=0.02))


def test_triton_s_interpreter_has_no_bfloat16_products(monkeypatch):
    monkeypatch.setattr(cpu, "_has_instructions", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not cpu.multiplies_bfloat16()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert cpu.multiplies_bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"lr": torch.tensor(0.02)}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_half_precision_weights_err_as_torchs(options, dtype):
    def changes(kind, dtype):
        # the same start for all, and one that bfloat16 has
        params = [torch.nn.Parameter(p.detach().bfloat16().to(dtype)) for p in parameters(((48, 80), (80, 48)))]
        before = [param.detach().double() for param in params]
        after = train(kind(params, **({"lr": 0.02} | options)))
        return [a.double() - b for a, b in zip(after, before, strict=True)]

    exact = changes(Muon, torch.float64)
    for ours, theirs, want in zip(changes(Muon, dtype), changes(torch.optim.Muon, dtype), exact, strict=True):
        # weights keep 8 or 11 bits, so most of both errors is the same rounding
        assert (ours - want).norm() < 1.03 * (theirs - want).norm()


@pytest.mark.parametrize("options", [{"row_normalize": True}, {"normuon": True}])
def test_rows_beyond_float16_and_rows_of_zeros(options):
    def train_in(dtype):
        params = parameters(((6, 300), (300, 6)), dtype)
        optimizer = Muon(params, lr=1.0, weight_decay=0.0, dampened=False, **options)
        for step in range(3):
            set_gradients(params, step)
            params[0].grad[1] = 0
            # squares of these are beyond float16
            params[0].grad[2] *= 300
            optimizer.step()
        return [param.detach().double() for param in params]

    assert_close(train_in(torch.float16), train_in(torch.float64), 5e-3)


@pytest.mark.parametrize("options", [{"momentum": torch.tensor(0.99)}, {"momentum": 0.99, "dampened": False}])
def test_momentum_is_not_rounded_to_bfloat16(options):
    def moments(dtype):
        optimizer = Muon(parameters(dtype=dtype), **options)
        train(optimizer, steps=1 if options.get("dampened", True) else 8)
        return [state["momentum_buffer"].double() for state in optimizer.state.values()]

    # 0.99 would become 0.98828, and 1 - 0.99 would become 0.0117; the moments themselves are rounded once a step
    assert_close(moments(torch.bfloat16), moments(torch.float64), 8e-3)


def test_defaults_are_those_of_torch():
    ours, theirs = Muon(parameters()).param_groups[0], torch.optim.Muon(parameters()).param_groups[0]
    resolved = {"ns_coefficients": QUINTIC, "ns_steps": COEFFICIENTS["quintic"].default_steps}
    assert {name: resolved.get(name, ours[name]) for name in theirs if name != "params"} == {
        name: value for name, value in theirs.items() if name != "params"
    }


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"row_normalize": True}, {"row_eps": 1e-7}),
        ({"row_normalize": True, "row_eps": 0.5, "dampened": False}, {"row_eps": 0.5, "dampened": False}),
        ({"normuon": True}, {"beta2": 0.95}),
        ({"normuon": True, "normuon_beta2": 0.5, "nesterov": False}, {"beta2": 0.5, "nesterov": False}),
        ({"dampened": False}, {"dampened": False}),
        ({"dampened": False, "nesterov": False}, {"dampened": False, "nesterov": False}),
        (DEVICE_MOMENTUM, {}),
        (DEVICE_MOMENTUM | {"dampened": False}, {"dampened": False}),
        (DEVICE_MOMENTUM | {"nesterov": False}, {"nesterov": False}),
        (
            {"row_normalize": True, "normuon": True, "weight_decay": 0.0},
            {"row_eps": 1e-7, "beta2": 0.95, "weight_decay": 0.0},
        ),
    ],
)
def test_variants_follow_their_formulas(options, formula):
    assert_close(train(Muon(parameters(), lr=0.02, **options)), reference(lr=0.02, **formula))


@pytest.mark.parametrize("dampened", [False, True])
def test_lr_and_momentum_may_change_every_step(dampened):
    rates, momenta = (0.01, 0.03, 0.02, 0.005), (0.85, 0.9, 0.93, 0.95)

    def change(group, step):
        group["lr"], group["momentum"] = rates[step], momenta[step]

    got = train(Muon(parameters(), lr=0.0, dampened=dampened), change=change)
    assert_close(got, reference(lr=rates, momenta=momenta, dampened=dampened))


def test_dampening_is_a_matter_of_scale_while_momentum_is_constant():
    dampened, plain = (train(Muon(parameters(), lr=0.02, dampened=d)) for d in (True, False))
    assert_close(dampened, plain)

    def change(group, step):
        group["momentum"] = (0.5, 0.7, 0.9, 0.95)[step]

    dampened, plain = (train(Muon(parameters(), lr=0.02, dampened=d), change=change) for d in (True, False))
    assert float((dampened[0] - plain[0]).norm()) > 1e-3


@pytest.mark.parametrize("options", [{}, {"row_normalize": True, "normuon": True, "coefficients": "aol"}])
def test_a_bank_is_its_matrices(options):
    matrices = parameters(((6, 10),) * 3)
    bank = torch.nn.Parameter(torch.stack([m.detach() for m in matrices]))
    ours, theirs = Muon([bank], lr=0.02, **options), Muon(matrices, lr=0.02, **options)
    for step in range(3):
        set_gradients(matrices, step)
        bank.grad = torch.stack([m.grad for m in matrices])
        ours.step()
        theirs.step()
    assert_close(bank.detach(), [m.detach() for m in matrices])


def test_normuon_keeps_the_norm_and_row_normalization_forgets_row_lengths():
    plain, normed = (Muon(parameters(), lr=1.0, weight_decay=0.0, normuon=n) for n in (False, True))
    before = [param.detach().clone() for param in parameters()]
    first, second = train(plain, steps=1), train(normed, steps=1)
    for a, start, param in zip(first, before, normed.param_groups[0]["params"], strict=True):
        update = (start - a) / learning_rate_ratio(None, *a.shape)
        assert_close([normed.state[param]["second_moment"]], [0.05 * update.square().mean(1, keepdim=True)])
    for a, b, start in zip(first, second, before, strict=True):
        assert float((a - start).norm()) == pytest.approx(float((b - start).norm()), rel=1e-9)
        assert float((a - b).norm()) > 1e-3
    results = []
    for factor in (1.0, 50.0):
        params = parameters()
        optimizer = Muon(params, lr=0.1, row_normalize=True, row_eps=0.0)
        set_gradients(params, 0)
        params[0].grad[2] *= factor
        optimizer.step()
        results.append(params[0].detach())
    assert_close([results[0]], [results[1]])


def test_one_call_for_all_groups_that_agree():
    a, b, c, d = parameters()
    groups = [
        {"params": [a, b], "lr": 0.1},
        {"params": [c], "momentum": 0.5, "normuon": True},
        {"params": [d], "coefficients": "cubic"},
    ]
    optimizer = Muon(groups)
    set_gradients([a, b, c, d], 0)
    with Launches() as launches:
        optimizer.step()
    assert launches.sizes == [3, 1]
    alone = parameters()
    separate = [Muon([alone[0], alone[1]], lr=0.1), Muon([alone[2]], momentum=0.5, normuon=True)]
    separate.append(Muon([alone[3]], coefficients="cubic"))
    set_gradients(alone, 0)
    for optimizer in separate:
        optimizer.step()
    assert_close([a.detach(), b.detach(), c.detach(), d.detach()], [p.detach() for p in alone])


def test_parameters_of_a_group_may_lie_on_several_devices():
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(6, 10, device=device)) for device in ("cpu", "cuda", "cpu")]
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer = Muon(params, lr=torch.tensor(0.02), normuon=True)
        with Launches() as launches:
            optimizer.step()
        assert launches.sizes == [2, 1]
        assert [optimizer.state[param]["momentum_buffer"].device.type for param in params] == ["cpu", "cuda", "cpu"]


def test_parameters_without_a_gradient_stay():
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = Muon(params)
    optimizer.step()
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [False, True, False, False]
    assert params[1] not in optimizer.state


def test_the_closure_runs_with_gradients_and_its_loss_comes_back():
    (weight,) = params = parameters(((3, 4),))
    optimizer = Muon(params)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = float(weight.detach().square().sum())
    assert float(optimizer.step(closure).detach()) == pytest.approx(before)
    assert float(weight.detach().square().sum()) < before


def test_the_step_never_waits_for_the_gpu():
    with FakeTensorMode():
        params = [torch.empty(s, device="cuda") for s in (*SHAPES, (2, 6, 10))]
        for options in ({}, {"lr": torch.tensor(0.1)}, {"row_normalize": True, "normuon": True, "dampened": False}):
            optimizer = Muon(params, **options)
            for param in params:
                param.grad = torch.empty_like(param)
            # a fake tensor has no value, so reading one would raise
            optimizer.step()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3,), {}, r"params\[0\]: expected a matrix or a bank of matrices, found shape \(3,\)"),
        ((2, 2, 2, 2), {}, r"expected a matrix or a bank"),
        ((2, 2), {"lr": -1.0}, "lr: expected a number >= 0, found -1.0"),
        ((2, 2), {"lr": torch.tensor(-0.5)}, "lr: expected a number >= 0, found -0.5"),
        ((2, 2), {"lr": torch.tensor(float("nan"))}, "lr: expected a number >= 0, found nan"),
        ((2, 2), {"momentum": torch.tensor(-0.5)}, "momentum: expected a number >= 0, found -0.5"),
        ((2, 2), {"weight_decay": torch.tensor([float("nan")])}, "weight_decay: expected a number >= 0, found nan"),
        ((2, 2), {"compute_dtype": torch.int32}, "compute_dtype: expected a floating dtype, found torch.int32"),
        ((2, 2), {"lr": torch.zeros(2)}, "lr: expected a float or a tensor of one element"),
        ((2, 2), {"momentum": -0.1}, "momentum: expected"),
        ((2, 2), {"momentum": torch.zeros(2)}, "momentum: expected a float or a tensor of one element"),
        ((2, 2), {"weight_decay": float("nan")}, "weight_decay: expected"),
        ((2, 2), {"normuon_beta2": 1.0}, "normuon_beta2: expected"),
        ((2, 2), {"adjust_lr_fn": "adam"}, "adjust_lr_fn: expected None or one of original, match_rms_adamw"),
        ((2, 2), {"coefficients": "quintik"}, "coefficients: expected one of"),
        ((2, 2), {"coefficients": "aol", "ns_steps": 5}, "exactly 4 iterations"),
        ((2, 2), {"coefficients": "cubic", "ns_coefficients": (1.0, 2.0, 3.0)}, "expected one of them, found both"),
        ((2, 2), {"ns_coefficients": (1.0, 2.0)}, "ns_coefficients: expected three numbers"),
    ],
)
def test_bad_options_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        Muon([torch.nn.Parameter(torch.zeros(shape))], **options)


def test_parameters_that_no_step_can_take_are_refused_at_once():
    with pytest.raises(ValueError, match=r"params\[0\]: expected a floating dtype, found torch\.complex64"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])


def test_parameters_without_data_are_refused_before_the_state_changes():
    param = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    param.grad = torch.empty_like(param)
    optimizer = Muon([param])
    with pytest.raises(RuntimeError, match=r"found the device meta; call to_empty\(\)"):
        optimizer.step()
    assert not optimizer.state


def test_a_refused_group_leaves_no_trace_and_sparse_gradients_are_refused():
    params = parameters()
    optimizer = Muon(params)
    with pytest.raises(ValueError, match="expected a matrix"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    params[0].grad = torch.zeros(6, 10).double().to_sparse()
    with pytest.raises(RuntimeError, match="expected real dense gradients"):
        optimizer.step()


def test_costs_and_ratios():
    # by hand: five iterations of full products, in GF
    figures = {(512, 512): 4.03, (256, 512): 0.84, (2048, 512): 12.08, (512, 1536): 9.40}
    for shape, figure in figures.items():
        assert 5 * newton_schulz_cost(*shape) / 1e9 == pytest.approx(figure, abs=0.006)
    assert learning_rate_ratio(None, 2048, 512) == 2.0 and learning_rate_ratio("original", 512, 2048) == 1.0
    assert learning_rate_ratio("match_rms_adamw", 512, 2048) == pytest.approx(0.2 * math.sqrt(2048))
