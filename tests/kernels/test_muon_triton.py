"""The fused step of Muon: in the interpreter without a GPU, compiled with one, against the formulas in float64."""

import itertools

import pytest
import torch
from muon_truth import QUINTIC, assert_close, orthogonalized, parameters, reference, set_gradients, train
from torch.optim import _muon

from golf_kernels import Muon, dispatch

triton = pytest.importorskip("triton")
from golf_kernels import newton_schulz_triton as kernels  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}:triton.runtime.interpreter")
    for kind in ("DeprecationWarning", "RuntimeWarning")
]


@pytest.fixture(autouse=True)
def forced(monkeypatch, poisoned_memory, true_bfloat16):
    monkeypatch.setenv("GOLF_BACKEND", "torch,muon_step=triton")
    if not GPU:
        # the interpreter's time goes by programs
        monkeypatch.setattr(kernels, "ROWS", 64)


def single(shapes=((6, 10), (10, 6), (8, 8), (6, 10))):
    return [torch.nn.Parameter(param.detach().float().to(DEVICE)) for param in parameters(shapes)]


def fused(steps=2, params=None, **options):
    return train(Muon(params or single(), **({"compute_dtype": torch.float32} | options)), steps=steps)


def cpu(tensors):
    return [tensor.detach().cpu().double() for tensor in tensors]


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        ({"nesterov": False, "weight_decay": 0.0}, {"nesterov": False, "weight_decay": 0.0}),
        ({"dampened": False}, {"dampened": False}),
        ({"dampened": False, "nesterov": False}, {"dampened": False, "nesterov": False}),
        ({"row_normalize": True, "row_eps": 0.5}, {"row_eps": 0.5}),
        ({"normuon": True, "normuon_beta2": 0.5}, {"beta2": 0.5}),
        (
            {"row_normalize": True, "normuon": True, "dampened": False},
            {"row_eps": 1e-7, "beta2": 0.95, "dampened": False},
        ),
    ],
)
def test_follows_its_formulas(options, formula):
    got = fused(lr=0.02, **options)
    assert_close(cpu(got), reference(lr=0.02, momenta=(0.95,) * 2, **formula), 2e-6)


def test_is_torchs_muon_to_rounding(monkeypatch):
    def exact(grad, ns_coefficients, ns_steps, eps):
        return orthogonalized(grad.double(), (ns_coefficients,) * ns_steps, eps)

    # torch rounds to bfloat16 in there, and only in there
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", exact)
    for options in ({}, {"adjust_lr_fn": "match_rms_adamw", "ns_coefficients": QUINTIC}):
        theirs = train(torch.optim.Muon(parameters(), lr=0.02, **options), steps=2)
        assert_close(cpu(fused(lr=0.02, **options)), theirs, 2e-6)


@pytest.mark.parametrize("options", [{}, {"row_normalize": True, "normuon": True, "dampened": False}])
def test_errs_at_most_twice_as_much_as_the_parts_in_bfloat16(options, monkeypatch):
    options = {"lr": 1.0, "weight_decay": 0.0, "compute_dtype": torch.bfloat16} | options
    shapes = ((48, 80), (80, 48), (64, 64))
    before = cpu(single(shapes))
    ours = cpu(fused(params=single(shapes), **options))
    monkeypatch.setenv("GOLF_BACKEND", "torch")
    theirs = cpu(fused(params=single(shapes), **options))
    want = train(Muon(parameters(shapes), **(options | {"compute_dtype": torch.float64})), steps=2)
    for a, b, exact, start in zip(ours, theirs, want, before, strict=True):
        assert (a - exact).norm() < 2 * (b - exact).norm() and (a - exact).norm() < 0.03 * (exact - start).norm()


def test_lr_and_momentum_are_read_from_the_device(monkeypatch):
    rates, momenta = (0.01, 0.03), (0.85, 0.9)
    lr, momentum = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
    params = single()
    optimizer = Muon(params, lr=lr, momentum=momentum, dampened=False, compute_dtype=torch.float32)

    def change(group, step):
        lr.fill_(rates[step])
        momentum.fill_(momenta[step])

    got = train(optimizer, steps=2, change=change)
    assert_close(cpu(got), reference(lr=rates, momenta=momenta, dampened=False), 2e-6)
    # PyTorch does the same
    plain = single()
    again = Muon(plain, lr=lr, momentum=momentum, dampened=False, compute_dtype=torch.float32)
    monkeypatch.setenv("GOLF_BACKEND", "torch")
    train(again, steps=2, change=change)
    assert_close(cpu(plain), cpu(got), 2e-6)


def test_groups_banks_missing_gradients_and_the_same_bits_again(monkeypatch):
    def step():
        params = single(((70, 20), (3, 20, 30), (4, 6), (0, 5)))
        groups = [
            {"params": [params[0]], "normuon": True},
            {"params": params[1:], "row_normalize": True, "coefficients": "aol"},
        ]
        optimizer = Muon(groups, lr=0.1, compute_dtype=torch.float32)
        set_gradients(params, 0)
        params[2].grad = None
        before = params[2].detach().clone()
        optimizer.step()
        assert torch.equal(params[2], before) and params[2] not in optimizer.state
        return params, optimizer

    (params, optimizer), (others, _) = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert optimizer.state[params[0]]["second_moment"].shape == (70, 1)
    plain = single(((70, 20), (3, 20, 30)))
    set_gradients(plain, 0)
    groups = [{"params": [plain[0]], "normuon": True}, {"params": [plain[1]], "row_normalize": True}]
    groups[1]["coefficients"] = "aol"
    monkeypatch.setenv("GOLF_BACKEND", "torch")
    by_parts = Muon(groups, lr=0.1, compute_dtype=torch.float32)
    by_parts.step()
    assert_close(cpu(params[:2]), cpu(plain), 2e-6)
    for ours, theirs in zip(params[:2], plain, strict=True):
        for name, moment in by_parts.state[theirs].items():
            assert_close(cpu([optimizer.state[ours][name]]), cpu([moment]), 2e-6)


def test_zero_rows_and_huge_gradients_stay_finite(monkeypatch):
    params = single()
    optimizer = Muon(params, lr=0.1, row_normalize=True, row_eps=0.0, normuon=True, compute_dtype=torch.float32)
    set_gradients(params, 0)
    params[0].grad[2] = 0
    params[1].grad.zero_()
    optimizer.param_groups[0]["row_eps"] = 1e-7
    optimizer.step()
    assert all(param.isfinite().all() for param in params)
    # the fused step and the parts
    for backend, options in itertools.product(("triton", "torch"), ({}, {"row_normalize": True, "row_eps": 0.0})):
        monkeypatch.setenv("GOLF_BACKEND", f"torch,muon_step={backend}")
        params = single()
        set_gradients(params, 0)
        for param in params:
            param.grad.mul_(2.0**100)
        Muon(params, lr=0.02, compute_dtype=torch.float32, **options).step()
        assert_close(cpu(params), reference(lr=0.02, momenta=(0.95,), row_eps=options.get("row_eps")), 2e-6)


@pytest.mark.skipif(GPU, reason="counted in Triton's interpreter")
@pytest.mark.parametrize(("normuon", "launches"), [(False, 18), (True, 19)])
def test_a_step_is_as_many_launches_for_any_number_of_matrices(normuon, launches, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched = []
    launch = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launched.append(self.fn)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    # of 5 iterations; README has these numbers
    for shapes in ([(8, 8)], [(6, 10), (10, 6), (8, 8)]):
        launched.clear()
        fused(steps=1, params=single(shapes), row_normalize=not normuon, normuon=normuon)
        assert len(launched) == launches


def test_what_it_cannot_take_is_refused_by_name(monkeypatch):
    for options, message in (
        ({"params": parameters()}, "the Triton kernels take contiguous float32 weights, gradients and moments"),
        ({"params": single(), "compute_dtype": torch.float16}, r"bfloat16 or float32, found torch\.float16"),
    ):
        optimizer = Muon(**options)
        set_gradients(options["params"], 0)
        with pytest.raises(dispatch.BackendError, match=message):
            optimizer.step()
    params = single()
    set_gradients(params, 0)
    optimizer = Muon(params, process_group=object())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with pytest.raises(dispatch.BackendError, match="process groups are not supported"):
        optimizer.step()
    monkeypatch.delenv("GOLF_BACKEND")
    choice = dispatch.choose("muon_step", device="cuda")
    assert choice == ("torch", "triton: not chosen: python -m golf_kernels tune")


@pytest.mark.gpu
def test_a_cuda_graph_of_the_step_takes_new_rates_and_gradients():
    shapes = ((512, 512), (256, 512), (2048, 512), (512, 2048))
    results = []
    for captured in (False, True):
        lr, momentum = torch.tensor(0.02, device="cuda"), torch.tensor(0.9, device="cuda")
        params = single(shapes)
        optimizer = Muon(params, lr=lr, momentum=momentum, row_normalize=True, normuon=True)
        set_gradients(params, 0)
        gradients = [param.grad for param in params]
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in (1, 2):
            fresh = single(shapes)
            set_gradients(fresh, step)
            torch._foreach_copy_(gradients, [param.grad for param in fresh])
            lr.fill_(0.01 * step)
            momentum.fill_(0.9 + 0.02 * step)
            graph.replay() if captured else optimizer.step()
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
