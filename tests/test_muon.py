"""Muon against torch.optim.Muon and against its formulas written down in float64."""

import copy
import datetime
import gc
import io
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# before there is a process group, as in train.distributed: it would keep one alive beyond the interpreter's end
import torch.distributed.nn
import torch.multiprocessing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import _muon
from torch.utils._python_dispatch import TorchDispatchMode

from golf_kernels import COEFFICIENTS, Muon
from golf_kernels.muon import learning_rate_ratio
from golf_kernels.sharding import assign, newton_schulz_cost

SHAPES = ((6, 10), (10, 6), (8, 8), (6, 10))
QUINTIC = COEFFICIENTS["quintic"].triples[0]


def parameters(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def train(optimizer, steps=4, start=0, change=lambda group, step: None):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(start, start + steps):
        set_gradients(params, step)
        for group in optimizer.param_groups:
            change(group, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


def orthogonalized(matrix, triples=(QUINTIC,) * 5, eps=1e-7):
    """Newton-Schulz through the singular value decomposition."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / matrix.norm().clamp_min(eps)
    for a, b, c in triples:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return u * sigma @ vh


def reference(*, lr, weight_decay=0.1, dampened=True, nesterov=True, row_eps=None, beta2=None, momenta=(0.95,) * 4):
    """Four steps written down straight, one matrix at a time."""
    params = parameters()
    weights = [param.detach().clone() for param in params]
    momentum = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros(w.shape[0], 1).double() for w in weights]
    for step, beta in enumerate(momenta):
        set_gradients(params, step)
        for i, (w, g) in enumerate(zip(weights, (param.grad for param in params), strict=True)):
            momentum[i] = beta * momentum[i] + ((1 - beta) if dampened else 1) * g
            u = momentum[i]
            if nesterov:
                u = (1 - beta) * g + beta * u if dampened else g + beta * u
            if row_eps is not None:
                u = u / torch.sqrt((u * u).sum(1, keepdim=True) + row_eps)
            o = orthogonalized(u)
            if beta2 is not None:
                norm = o.norm()
                second[i] = beta2 * second[i] + (1 - beta2) * (o * o).mean(1, keepdim=True)
                o = o / (second[i].sqrt() + 1e-10)
                o = o * norm / (o.norm() + 1e-10)
            rate = lr[step] if isinstance(lr, tuple) else lr
            w.mul_(1 - rate * weight_decay).sub_(rate * math.sqrt(max(1, w.shape[0] / w.shape[1])) * o)
    return weights


def assert_close(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


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


class Launches(TorchDispatchMode):
    """Number of matrices in every call of golf::newton_schulz."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.golf.newton_schulz.default:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


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
    here, alone = parameters(), parameters()
    # a second device that every machine has, if without numbers
    there = torch.nn.Parameter(torch.empty(6, 10, device="meta"))
    there.grad = torch.empty_like(there)
    set_gradients(here, 0)
    set_gradients(alone, 0)
    optimizer = Muon([*here[:2], there, *here[2:]], lr=torch.tensor(0.02), normuon=True)
    optimizer.step()
    Muon(alone, lr=torch.tensor(0.02), normuon=True).step()
    assert all(torch.equal(a, b) for a, b in zip(here, alone, strict=True))
    assert optimizer.state[there]["momentum_buffer"].device.type == "meta"


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


def test_a_refused_group_leaves_no_trace_and_sparse_gradients_are_refused():
    params = parameters()
    optimizer = Muon(params)
    with pytest.raises(ValueError, match="expected a matrix"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    params[0].grad = torch.zeros(6, 10).double().to_sparse()
    with pytest.raises(RuntimeError, match="expected real dense gradients"):
        optimizer.step()


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


def test_a_copy_of_a_weight_that_is_never_updated_is_refused():
    params = parameters()
    with pytest.raises(ValueError, match="param: expected a parameter of this optimizer"):
        Muon(params).copy_to(torch.nn.Parameter(params[0].detach().clone()), torch.zeros_like(params[0]))


def test_costs_and_ratios():
    # by hand: five iterations of full products, in GF
    figures = {(512, 512): 4.03, (256, 512): 0.84, (2048, 512): 12.08, (512, 1536): 9.40}
    for shape, figure in figures.items():
        assert 5 * newton_schulz_cost(*shape) / 1e9 == pytest.approx(figure, abs=0.006)
    assert learning_rate_ratio(None, 2048, 512) == 2.0 and learning_rate_ratio("original", 512, 2048) == 1.0
    assert learning_rate_ratio("match_rms_adamw", 512, 2048) == pytest.approx(0.2 * math.sqrt(2048))


def test_matrices_are_shared_out_by_cost():
    # the eleven-layer model of #1392: 22 q/o, 22 k/v, 22 MLP matrices
    shapes = ((512, 512),) * 22 + ((256, 512),) * 22 + ((2048, 512), (512, 2048)) * 11
    owners = assign(shapes, 8)
    loads = [0] * 8
    for owner, shape in zip(owners, shapes, strict=True):
        loads[owner] += newton_schulz_cost(*shape)
    assert min(loads) > 0 and max(loads) / (sum(loads) / 8) < 1.05
    # 62.9 GF per rank for padded banks, about 47 for a balanced assignment
    assert 5 * max(loads) / 1e9 < 49
    assert assign(shapes, 1) == (0,) * 66
    assert sorted(set(assign(((4, 4),) * 2, 5))) == [0, 1]


WORLD_SHAPES = (*SHAPES, (3, 6, 10))


OPTIONS_OF_RANKS = {"lr": 0.02, "row_normalize": True, "normuon": True}


class Linear(torch.nn.Module):
    """A model whose gradients are what it is given."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(weight) for weight in weights)

    def forward(self, gradients):
        return sum((weight * gradient).sum() for weight, gradient in zip(self.weights, gradients, strict=True))


def run_rank(rank, world_size, store, folder):
    # a rank that fails must not leave the other one waiting for half an hour
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
    train_rank(rank, folder)
    dist.destroy_process_group()
    # a thread of the group that lets go of a tensor while python shuts down aborts the process
    gc.collect()
    assert "gloo" not in " ".join((task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


def train_rank(rank, folder):
    start = torch.load(f"{folder}/start.pt", weights_only=True)
    model = torch.nn.parallel.DistributedDataParallel(Linear(start["weights"]))
    optimizer = Muon(model.parameters(), process_group=dist.group.WORLD, **OPTIONS_OF_RANKS)
    optimizer.load_state_dict(start["state"])
    plain = parameters(WORLD_SHAPES)
    with Launches() as launches:
        for step in range(2, 4):
            set_gradients(plain, step)
            optimizer.zero_grad()
            # the mean over ranks is the gradient of one process
            model([param.grad * (1.5 - rank) for param in plain]).backward()
            optimizer.step()
    weights = [param.detach() for param in model.parameters()]
    torch.save({"weights": weights, "state": optimizer.state_dict(), "sizes": launches.sizes}, f"{folder}/{rank}.pt")


def test_one_rank_then_two_under_ddp_then_one_are_one_rank_all_along(tmp_path):
    first = Muon(parameters(WORLD_SHAPES), **OPTIONS_OF_RANKS)
    torch.save({"weights": train(first, steps=2), "state": first.state_dict()}, tmp_path / "start.pt")
    store = str(tmp_path / "store")
    # both in processes of their own: torch numbers the groups that a process has had, and here other tests had some
    spawn = torch.multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=run_rank, args=(rank, 2, store, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    one = Muon(parameters(WORLD_SHAPES), **OPTIONS_OF_RANKS)
    alone = train(one, steps=4)
    for found in ranks:
        assert_close(found["weights"], alone, 1e-11)
    # bit for bit between the ranks, or they would drift apart
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True))
    # every rank works on its own share only: 4 matrices and a bank of 3 between them
    assert len(ranks[0]["sizes"]) == 2 and ranks[0]["sizes"][0] + ranks[1]["sizes"][0] == 7
    assert min(ranks[0]["sizes"][0], ranks[1]["sizes"][0]) >= 3
    restored = Muon([torch.nn.Parameter(w) for w in ranks[1]["weights"]], **OPTIONS_OF_RANKS)
    restored.load_state_dict(ranks[1]["state"])
    assert_close(train(restored, start=4, steps=2), train(one, start=4, steps=2), 1e-10)


def test_plain_shards_make_the_step_of_the_whole():
    whole = Muon(parameters(), **OPTIONS_OF_RANKS)
    pieces = parameters()
    shards = [Muon(pieces[rank::2], **OPTIONS_OF_RANKS) for rank in range(2)]
    for step in range(2):
        set_gradients(whole.param_groups[0]["params"], step)
        set_gradients(pieces, step)
        for optimizer in (whole, *shards):
            optimizer.step()
    assert_close([p.detach() for p in pieces], [p.detach() for p in whole.param_groups[0]["params"]], 1e-12)
