"""Newton-Schulz against the singular value decomposition in float64, and the published scalar maps."""

import math

import pytest
import torch
from newton_schulz_truth import prescaled, random, relative_error, scalar_map, spread, triples_of, truth
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import _muon
from torch.utils._python_dispatch import TorchDispatchMode

from golf_kernels import dispatch
from golf_kernels.newton_schulz import COEFFICIENTS, CoefficientSet, default_compute_dtype, newton_schulz

SHAPES = [(5, 9), (9, 5), (8, 8), (1, 7), (7, 1), (1, 1), (3, 6, 11), (2, 11, 6)]


# the Triton backend has no float64; its tests are in test_newton_schulz_triton.py
@pytest.fixture(autouse=True)
def backend(monkeypatch, poisoned_memory):
    monkeypatch.setenv("GOLF_BACKEND", "newton_schulz=torch")


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_maps_singular_values_and_keeps_vectors(name):
    matrices = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    for matrix, result in zip(matrices, newton_schulz(matrices, coefficients=name), strict=True):
        assert result.shape == matrix.shape and result.is_contiguous() and result.dtype == torch.float64
        assert relative_error(result, truth(name, matrix)) < 1e-10


# recipes: the scalar maps after five iterations, from these starting singular values
STARTS = (1.0, 0.5, 0.1, 0.05, 0.01, 0.001)
PUBLISHED = {
    "quintic": (0.696436, 0.765439, 0.712120, 0.758120, 0.698917, 0.470544),
    "polar_express": (0.859129, 0.910611, 1.059161, 0.908558, 1.027110, 0.858873),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scalar_maps_come_out(name):
    # the second singular value brings the Frobenius norm to 1
    matrices = [torch.diag(torch.tensor([s, math.sqrt(1 - s * s)], dtype=torch.float64)) for s in STARTS]
    results = newton_schulz(matrices, coefficients=name)
    found = [float(result[0, 0]) for result in results]
    assert found == pytest.approx(PUBLISHED[name], abs=5.1e-7)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_bands_in_the_table_are_true_and_tight(name):
    entry = COEFFICIENTS[name]
    start, low, high = entry.band
    sigma = torch.logspace(math.log10(start), 0, 400_001, dtype=torch.float64)
    mapped = scalar_map(triples_of(name), sigma / entry.safety)
    assert low <= mapped.min() < low + 1e-3
    assert high - 1e-3 < mapped.max() <= high
    # bfloat16 can lift the largest singular value of a rank-one matrix this far above 1
    assert low <= scalar_map(triples_of(name), (1 + 2**-8) / entry.safety) <= high
    assert entry.source


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_values_end_in_the_band(name, shape):
    start, low, high = COEFFICIENTS[name].band
    matrix = spread(*shape, 1.0, 4.0)
    before = torch.linalg.svdvals(prescaled(name, matrix)) * COEFFICIENTS[name].safety
    assert before.min() > start and before.max() <= 1.0
    for dtype, slack in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        after = torch.linalg.svdvals(newton_schulz([matrix.float()], coefficients=name, compute_dtype=dtype)[0])
        assert after.min() > low - slack and after.max() < high + slack


def test_bfloat16_errs_like_the_plain_chain():
    matrices = [random(64, 96, seed=1), random(96, 64, seed=2), random(48, 48, seed=3)]
    results = newton_schulz([m.float() for m in matrices], compute_dtype=torch.bfloat16)
    for matrix, result in zip(matrices, results, strict=True):
        plain = _muon._zeropower_via_newtonschulz(matrix.float(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
        want = truth("quintic", matrix)
        # the chain of torch.optim.Muon rounds the norm as well; a quarter is room for other summation orders
        assert relative_error(result, want) < 1.25 * relative_error(plain, want)


def test_float32_is_close_to_float64():
    matrices = [random(32, 80, seed=1), random(80, 32, seed=2)]
    for matrix, result in zip(matrices, newton_schulz([m.float() for m in matrices]), strict=True):
        assert relative_error(result, truth("quintic", matrix)) < 1e-5


def test_a_list_gives_what_its_matrices_give_alone():
    shapes = [(6, 10), (10, 6), (2, 6, 10), (6, 10), (4, 4), (3, 10, 6)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float32]
    matrices = [random(*s, seed=i, dtype=d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]
    copies = [matrix.clone() for matrix in matrices]
    together = newton_schulz(matrices)
    for matrix, copy, result in zip(matrices, copies, together, strict=True):
        assert torch.equal(matrix, copy)
        assert result.dtype == matrix.dtype
        assert torch.allclose(result, newton_schulz([matrix])[0], rtol=1e-2 if matrix.dtype != torch.float32 else 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(together, newton_schulz(matrices), strict=True))
    addresses = {result.untyped_storage().data_ptr() for result in together}
    assert len(addresses) == len(together)


def test_strides_do_not_matter():
    base = random(3, 20, 14)
    views = [base.mT, base[:, ::2, 1::3], base[1], base[1].T]
    for view in views:
        result = newton_schulz([view])[0]
        assert torch.equal(result, newton_schulz([view.contiguous()])[0]) and result.is_contiguous()


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_zero_empty_and_rank_deficient(name):
    rank_one = random(6, 1, seed=1) @ random(1, 9, seed=2)
    zero_row = random(4, 6, seed=3)
    zero_row[2] = 0
    matrices = [torch.zeros(4, 6), torch.zeros(0, 4), torch.zeros(2, 0, 3), torch.zeros(0, 3, 3), rank_one, zero_row]
    results = newton_schulz([matrix.float() for matrix in matrices], coefficients=name)
    assert all(torch.equal(result, matrix) for result, matrix in zip(results[:4], matrices[:4], strict=True))
    sigma = torch.linalg.svdvals(results[4])
    assert sigma[0] > 0.5 and sigma[1:].abs().max() < 1e-3
    assert torch.equal(results[5][2], torch.zeros(6)) and results[5].isfinite().all()
    assert newton_schulz([], coefficients=name) == []


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_scale_does_not_matter_above_eps(name):
    matrix = random(8, 12, dtype=torch.float32)
    plain, huge, small = newton_schulz([matrix, matrix * 2.0**120, matrix * 2.0**-20], coefficients=name)
    assert torch.equal(plain, huge) and torch.equal(plain, small)
    # in float16 the squares of such a matrix overflow
    half = (matrix * 2000).half()
    result = newton_schulz([half], coefficients=name, compute_dtype=torch.float16)[0]
    assert relative_error(result, truth(name, half.double())) < 0.02


def test_below_eps_the_matrix_shrinks_to_zero():
    matrix = random(8, 12) * 1e-9
    norm = float(matrix.norm())
    assert norm < 1e-7
    assert relative_error(newton_schulz([matrix], eps=1e-7)[0], truth("quintic", matrix, eps=1e-7)) < 1e-10
    assert relative_error(newton_schulz([matrix], eps=1e-12)[0], truth("quintic", matrix, eps=1e-12)) < 1e-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_own_matrix(bad):
    matrices = [random(2, 4, 5, seed=1, dtype=torch.float32), random(4, 5, seed=2, dtype=torch.float32)]
    clean = newton_schulz(matrices)
    matrices[0][1, 2, 3] = bad
    results = newton_schulz(matrices)
    assert results[0][1].isnan().all()
    assert torch.allclose(results[0][0], clean[0][0], rtol=1e-5) and torch.allclose(results[1], clean[1], rtol=1e-5)


def test_aol_brings_rows_of_any_length_to_one():
    matrix = torch.diag(torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64))
    for given in (matrix, torch.nn.functional.pad(matrix, (0, 2)), torch.nn.functional.pad(matrix, (0, 0, 0, 2))):
        sigma = torch.linalg.svdvals(newton_schulz([given], coefficients="aol")[0])
        assert torch.allclose(sigma, torch.full_like(sigma, scalar_map(triples_of("aol"), 1.0)), rtol=1e-9)


@pytest.mark.parametrize("prescale", ["frobenius", "aol"])
def test_products_are_on_the_short_side(prescale):
    class Squares(TorchDispatchMode):
        sides = frozenset()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
                self.sides |= {tuple(result.shape[-2:])}
            return result

    for shape in ((3, 50), (50, 3)):
        with Squares() as squares:
            dispatch.run_on("torch", "newton_schulz", [random(*shape)], [1.0, 2.0, 3.0], 1e-7, prescale, torch.float64)
        assert squares.sides == {(3, 3), shape}


def test_safety_is_a_division_before_the_map():
    matrix = random(5, 8)
    own = CoefficientSet("own", triples_of("quintic", 1), "the test", safety=1.3)
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    mapped = scalar_map(triples_of("quintic", 3), sigma / matrix.norm() / 1.3)
    assert relative_error(newton_schulz([matrix], coefficients=own, steps=3)[0], u * mapped @ vh) < 1e-12


def test_steps_and_own_coefficients():
    matrix = random(5, 8)
    own = CoefficientSet("newton", ((1.5, -0.5, 0.0),), "the classical iteration, which converges to the polar factor")
    result = newton_schulz([matrix], coefficients=own, steps=40)[0]
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert relative_error(result, u @ vh) < 1e-12
    one = newton_schulz([matrix], steps=1)[0]
    x = matrix / matrix.norm()
    assert relative_error(one, 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x) < 1e-12


@pytest.mark.parametrize(
    ("matrices", "options", "message"),
    [
        ([torch.zeros(3)], {}, r"matrices\[0\]: expected shape \(m, n\)"),
        ([torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32)], {}, r"matrices\[1\]: expected a floating dtype"),
        ([torch.zeros(2, 2), torch.zeros(2, 2, device="meta")], {}, r"matrices\[1\]: expected device cpu, found meta"),
        ([torch.zeros(2, 2)], {"coefficients": "quintik"}, "expected one of quintic, polar_express"),
        ([torch.zeros(2, 2)], {"steps": 0}, "expected at least 1, found 0"),
        ([torch.ones(2, 2)], {"eps": -1.0}, r"eps: expected a number >= 0, found -1\.0"),
        ([torch.ones(2, 2)], {"eps": float("nan")}, "eps: expected a number >= 0, found nan"),
        ([torch.zeros(2, 2)], {"coefficients": "aol", "steps": 5}, "exactly 4 iterations, found 5"),
        ([torch.zeros(2, 2)], {"compute_dtype": torch.int8}, "compute_dtype: expected a floating dtype"),
        (
            [torch.zeros(2, 2)],
            {"coefficients": CoefficientSet("x", ((1.0, 0.0, 0.0),), "", prescale="none")},
            "prescale: expected 'frobenius' or 'aol', found 'none'",
        ),
    ],
)
def test_bad_input_is_refused(matrices, options, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(matrices, **options)


def test_gradients_are_refused():
    matrix = random(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        newton_schulz([random(3, 4), matrix])
    with torch.no_grad():
        assert not newton_schulz([matrix])[0].requires_grad


def test_opcheck():
    flat = [value for triple in COEFFICIENTS["quintic"].schedule() for value in triple]
    matrices = [random(5, 8, dtype=torch.float32), random(2, 8, 5, dtype=torch.bfloat16).mT, torch.zeros(0, 3)]
    for prescale in ("frobenius", "aol"):
        torch.library.opcheck(torch.ops.golf.newton_schulz.default, (matrices, flat, 1e-7, prescale, torch.float32))


def test_compiles_as_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def scaled(matrices):
        return [2 * result for result in newton_schulz(matrices, coefficients="polar_express")]

    matrices = [random(5, 8), random(2, 8, 5)]
    want = newton_schulz(matrices, coefficients="polar_express")
    assert all(torch.equal(a, 2 * b) for a, b in zip(scaled(matrices), want, strict=True))


def test_fake_tensors_on_cuda():
    with FakeTensorMode():
        matrices = [torch.empty(5, 8, device="cuda"), torch.empty(2, 8, 5, device="cuda", dtype=torch.bfloat16).mT]
        results = newton_schulz(matrices)
        assert [(r.shape, r.dtype, r.device.type) for r in results] == [
            ((5, 8), torch.float32, "cuda"),
            ((2, 5, 8), torch.bfloat16, "cuda"),
        ]
        assert all(result.is_contiguous() for result in results)
        assert default_compute_dtype(matrices) == torch.bfloat16
        assert default_compute_dtype([matrices[0].double()]) == torch.float64
        with pytest.raises(ValueError, match=r"expected shape \(m, n\)"):
            newton_schulz([torch.empty(3, device="cuda")])
