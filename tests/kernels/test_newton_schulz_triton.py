"""The Triton kernels of Newton-Schulz: in the interpreter without a GPU, compiled with one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from newton_schulz_truth import prescaled, random, relative_error, scalar_map, spread, triples_of, truth

from golf_kernels import dispatch
from golf_kernels.newton_schulz import COEFFICIENTS, newton_schulz

triton = pytest.importorskip("triton")
from golf_kernels import newton_schulz_triton as kernels  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the interpreter takes milliseconds for each program, so without a GPU not everything is combined with everything
FEW = [("quintic", torch.float32), ("aol", torch.float32), ("cubic", torch.float16), ("quintic", torch.bfloat16)]
FEW_DTYPES = DTYPES if GPU else DTYPES[:2]
MANY = [(name, dtype) for name in COEFFICIENTS for dtype in DTYPES]
SHIPPED = kernels.tile_of, kernels.ROWS
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}:triton.runtime.interpreter")
    for kind in ("DeprecationWarning", "RuntimeWarning")
]
# odd, single rows and columns, several tiles each way, square, banks
SHAPES = [(5, 9), (1, 70), (70, 1), (70, 150), (150, 70), (70, 70), (2, 20, 40)]


@pytest.fixture(autouse=True)
def forced(monkeypatch, poisoned_memory, true_bfloat16):
    monkeypatch.setenv("GOLF_BACKEND", "newton_schulz=triton")
    if not GPU:
        # larger programs, because there are fewer then, and smaller tiles, because there is less padding then
        monkeypatch.setattr(kernels, "tile_of", lambda dtype: 64)
        monkeypatch.setattr(kernels, "ROWS", 64)


def orthogonalize(matrices, **options):
    results = newton_schulz([matrix.to(DEVICE) for matrix in matrices], **options)
    return [result.cpu() for result in results]


def flat(name):
    return [value for triple in COEFFICIENTS[name].schedule() for value in triple]


def plain(matrices, name, dtype, eps=1e-7):
    arguments = (flat(name), eps, COEFFICIENTS[name].prescale, dtype)
    return [result.cpu() for result in dispatch.run_on("torch", "newton_schulz", matrices, *arguments)]


@pytest.mark.parametrize(("name", "dtype"), MANY if GPU else FEW, ids=str)
def test_errs_at_most_twice_as_much_as_pytorch(name, dtype):
    matrices = [random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(SHAPES)]
    results = orthogonalize(matrices, coefficients=name, compute_dtype=dtype)
    theirs = plain([matrix.to(DEVICE) for matrix in matrices], name, dtype)
    want = [truth(name, matrix.double()) for matrix in matrices]
    for matrix, result in zip(matrices, results, strict=True):
        assert result.shape == matrix.shape and result.is_contiguous() and result.dtype == torch.float32
        # a NaN would hide behind max()
        assert result.isfinite().all()
    ours, others = (max(map(relative_error, found, want)) for found in (results, theirs))
    assert ours < 2 * others


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_errs_at_most_twice_as_much_as_pytorch_in_bfloat16(name):
    matrices = [random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(SHAPES)]
    matrices.append(spread(70, 130, 1e-4, 1.0).float())
    matrices[0] *= 1e6
    results = orthogonalize(matrices, coefficients=name, compute_dtype=torch.bfloat16)
    theirs = plain([matrix.to(DEVICE) for matrix in matrices], name, torch.bfloat16)
    for matrix, ours, others in zip(matrices, results, theirs, strict=True):
        want = truth(name, matrix.double())
        assert relative_error(ours, want) < 2 * relative_error(others, want)


def test_mlp_matrices_in_the_tiles_that_ship(monkeypatch):
    monkeypatch.setattr(kernels, "tile_of", SHIPPED[0])
    monkeypatch.setattr(kernels, "ROWS", SHIPPED[1])
    matrices = [random(*shape, dtype=torch.float32) for shape in ((512, 2048), (2048, 512))]
    # five of them would take the interpreter a minute
    results = orthogonalize(matrices, steps=1, compute_dtype=torch.bfloat16)
    for matrix, result in zip(matrices, results, strict=True):
        u, sigma, vh = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
        want = u * scalar_map(triples_of("quintic", 1), sigma) @ vh
        arguments = ([matrix], flat("quintic")[:3], 1e-7, "frobenius", torch.bfloat16)
        (theirs,) = dispatch.run_on("torch", "newton_schulz", *arguments)
        assert relative_error(result, want) < 2 * relative_error(theirs, want)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_values_end_in_the_band(name):
    start, low, high = COEFFICIENTS[name].band
    matrices = [spread(*shape, 1.0, 4.0) for shape in ((60, 60), (40, 100), (100, 40))]
    for matrix in matrices:
        assert torch.linalg.svdvals(prescaled(name, matrix)).min() * COEFFICIENTS[name].safety > start
    for dtype in FEW_DTYPES:
        slack = 1e-5 if dtype == torch.float32 else 0.03
        for result in orthogonalize([m.float() for m in matrices], coefficients=name, compute_dtype=dtype):
            after = torch.linalg.svdvals(result)
            assert after.min() > low - slack and after.max() < high + slack


@pytest.mark.parametrize(("name", "dtype"), MANY if GPU else FEW, ids=str)
def test_zero_empty_rank_deficient_and_nan(name, dtype):
    rank_one = random(60, 1, seed=1) @ random(1, 90, seed=2)
    zero_row = random(40, 60, seed=3)
    zero_row[2] = 0
    broken = [random(3, 40, 50, seed=4), random(40, 50, seed=5)]
    broken[0][1, 2, 3], broken[1][7, 7] = float("nan"), float("inf")
    matrices = [torch.zeros(40, 40), torch.zeros(0, 4), torch.zeros(2, 0, 3), rank_one, zero_row, *broken]
    results = orthogonalize([m.float() for m in matrices], coefficients=name, compute_dtype=dtype)
    assert all(torch.equal(result, matrix) for result, matrix in zip(results[:3], matrices[:3], strict=True))
    sigma, theirs = (torch.linalg.svdvals(r) for r in (results[3], plain([rank_one.float()], name, dtype)[0]))
    # rounding makes a small matrix of full rank of the rest, which the iteration lifts
    assert sigma[0] > 0.5 and sigma[1:].max() < 2 * theirs[1:].max()
    assert torch.equal(results[4][2], torch.zeros(60)) and results[4].isfinite().all()
    assert results[5][1].isnan().all() and results[5][::2].isfinite().all() and results[6].isnan().all()
    assert orthogonalize([torch.zeros(0, 3)])[0].shape == (0, 3) and newton_schulz([]) == []


@pytest.mark.parametrize(("name", "dtype"), MANY if GPU else FEW, ids=str)
def test_scale_does_not_matter_above_eps_and_shrinks_below(name, dtype):
    matrix = random(80, 120, dtype=torch.float32)
    scaled = [matrix, matrix * 2.0**120, matrix * 2.0**-20, matrix * 2.0**50]
    results = orthogonalize(scaled, coefficients=name, compute_dtype=dtype)
    assert all(torch.equal(result, results[0]) for result in results[1:])
    half = (matrix * 2000).half()
    result = orthogonalize([half], coefficients=name, compute_dtype=dtype)[0]
    assert result.dtype == torch.float16 and relative_error(result, truth(name, half.double())) < 0.02
    if name == "quintic":
        tiny = random(8, 12) * 1e-9
        for eps in (1e-7, 1e-12):
            result = orthogonalize([tiny.float()], eps=eps, compute_dtype=dtype)[0]
            assert relative_error(result, truth("quintic", tiny, eps=eps)) < (1e-4 if dtype == torch.float32 else 0.02)


def test_a_mixed_list_gives_the_same_bits_again_and_what_its_matrices_give_alone():
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    matrices = [random(*shape, seed=i, dtype=dtypes[i % 3]) for i, shape in enumerate(SHAPES)]
    matrices += [random(2, 60, 40).mT.float(), random(50, 120)[:, ::3].float()]
    copies = [matrix.clone() for matrix in matrices]
    first, second = (orthogonalize(matrices, compute_dtype=torch.float32) for _ in range(2))
    for matrix, copy, one, other in zip(matrices, copies, first, second, strict=True):
        assert torch.equal(matrix, copy) and torch.equal(one, other)
        assert one.dtype == matrix.dtype and one.is_contiguous()
    for index in (0, 4, -1):
        assert torch.equal(first[index], orthogonalize([matrices[index]], compute_dtype=torch.float32)[0])
    assert len({result.untyped_storage().data_ptr() for result in first}) == len(first)


@pytest.mark.parametrize("shape", [(60, 1020), (1020, 60)])
def test_long_sums_are_split_and_whoever_comes_last_changes_nothing(shape, monkeypatch):
    matrix = random(*shape, dtype=torch.float32, seed=3).to(DEVICE)
    plans = [kernels.make_plan((shape,), 64, matrix.device, processors) for processors in (1, 1000)]
    assert plans[0].partials == plans[0].counters == 0
    # parts of eight steps
    assert plans[1].partials == len(plans[1].gram_tiles) == 2 and plans[1].counters == 1
    results = []
    for plan in (*plans, plans[1]._replace(gram_tiles=plans[1].gram_tiles.flip(0))):
        monkeypatch.setattr(kernels, "make_plan", lambda *_, plan=plan: plan)
        results.append(orthogonalize([matrix], steps=2, compute_dtype=torch.float32)[0])
    assert torch.equal(results[1], results[2])
    u, sigma, vh = torch.linalg.svd(matrix.cpu().double() / matrix.cpu().double().norm(), full_matrices=False)
    want = u * scalar_map(triples_of("quintic", 2), sigma) @ vh
    assert relative_error(results[0], want) < 1e-5 and relative_error(results[1], want) < 1e-5


def test_tiles_cover_the_lower_triangle_once_and_parts_cover_the_sum(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 16)
    shapes = ((512, 512),) * 3 + ((256, 512),) * 3 + ((2048, 512), (512, 2048), (2048, 512))
    plan = kernels.make_plan(shapes, 128, torch.device("cpu"), 132)
    tiles = plan.gram_tiles.tolist()
    # by hand: 10 of 16 tiles for a side of 512, 3 of 4 for 256; the sum over 2048 is split in 4 of 512
    assert len({(t[0], t[6]) for t in tiles}) == 6 * 10 + 3 * 3 and len(tiles) == 3 * 10 + 3 * 3 + 3 * 10 * 4
    for matrix, (rows, columns) in enumerate(shapes):
        own = [t for t in tiles if t[0] == matrix]
        steps = {}
        for t in own:
            steps[t[6]] = steps.get(t[6], 0) + t[5]
        assert set(steps.values()) == {max(rows, columns) // 64}
        assert sum(t[6] == t[7] for t in own if t[11] == 0) == min(rows, columns) // 128
    assert len(plan.product_tiles) == 3 * 16 + 3 * 8 + 3 * 64 and len(plan.square_tiles) == 6 * 10 + 3 * 3
    parts = [t for t in tiles if t[9] > 1]
    assert sorted(t[10] + t[11] for t in parts) == list(range(plan.partials))
    # balanced enough that all eight shares of the model keep 132 processors busy for one round of parts
    assert max(t[5] for t in tiles) == 8


def test_offsets_beyond_32_bits(tmp_path):
    far = 2**31
    matrix = random(40, 70, dtype=torch.float32).half()
    shape = (tuple(matrix.shape),)
    plan = kernels.make_plan(shape, kernels.tile_of(torch.float16), matrix.device, 132)
    near = orthogonalize([matrix], compute_dtype=torch.float16)[0]
    layout, grams, products = (t.clone() for t in (plan.layout, plan.gram_tiles, plan.product_tiles))
    layout[:, 3] += far
    grams[:, 2:4] += far
    products[:, 3] += far
    products[:, 7] += far
    moved = plan._replace(
        layout=layout,
        gram_tiles=grams,
        product_tiles=products,
        x_size=plan.x_size + far,
        places=((far, plan.places[0][1]),),
    )
    # a file full of holes: only what is touched takes room
    size = 2 * (moved.x_size + moved.gram_size)
    work = torch.from_file(str(tmp_path / "work"), shared=True, size=size, dtype=torch.float16)
    workspace = kernels.Workspace(plan, torch.float16)
    workspace.plan, workspace.work = moved, work.to(DEVICE) if GPU else work
    table = kernels.upload(((matrix.to(DEVICE).data_ptr(), 2),), workspace.stats.device)
    for scaled in (False, True):
        kernels.pack_kernel[(len(plan.blocks),)](
            table, layout, plan.blocks, workspace.work, workspace.stats, workspace.scales, 1,
            SCALED=scaled, ALIGNED=False, ROWS=kernels.ROWS, CHUNK=kernels.CHUNK,
        )  # fmt: skip
        workspace.norms(1e-7) if not scaled else None
    start = workspace.iterate(flat("quintic"), 1e-7, "frobenius", scaled=True)
    assert start > far and torch.equal(workspace.views(start)[0].cpu(), near)


SCRIPT = """
import sys
import torch

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("golf_kernels", "train", "benchmarks"):
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
{source}
device = "cuda" if torch.cuda.is_available() else "cpu"
g = torch.randn(70, 130, generator=torch.Generator().manual_seed(1))
matrices = [g.to(device), torch.stack([g.T, 3 * g.T]).to(device)]
results = newton_schulz(matrices, (3.4445, -4.7750, 2.0315) * 5, compute_dtype=torch.float32)
u, sigma, vh = torch.linalg.svd(g.double() / g.double().norm(), full_matrices=False)
for _ in range(5):
    sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
want = u * sigma @ vh
for got in (results[0], results[1][0].T, results[1][1].T):
    assert float((got.cpu().double() - want).norm() / want.norm()) < 1e-5
print("as one file")
"""


def test_runs_pasted_into_a_single_file_script(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text(SCRIPT.format(source=Path(kernels.__file__).read_text()))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "as one file\n", result.stderr


def test_it_is_chosen_only_when_forced_and_says_what_it_cannot_take(monkeypatch):
    matrix = random(6, 9).to(DEVICE)
    with pytest.raises(dispatch.BackendError, match=r"float32, bfloat16 or float16, found torch\.float64"):
        newton_schulz([matrix])
    with pytest.raises(dispatch.BackendError, match=r"found torch\.float64"):
        newton_schulz([matrix.float()], compute_dtype=torch.float64)
    with pytest.raises(ValueError, match="expected shape"):
        newton_schulz([torch.zeros(3, device=DEVICE)])
    monkeypatch.delenv("GOLF_BACKEND")
    choice = dispatch.choose("newton_schulz", device="cuda")
    assert choice == ("torch", "triton: not chosen: python -m golf_kernels tune")


def test_opcheck():
    matrices = [random(5, 8, dtype=torch.float32), random(2, 8, 5, dtype=torch.float32).mT, torch.zeros(0, 3)]
    arguments = ([m.to(DEVICE) for m in matrices], flat("quintic")[:3], 1e-7, "aol", torch.float32)
    torch.library.opcheck(torch.ops.golf.newton_schulz.default, arguments)


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_whole_model():
    shapes = ((512, 512),) * 22 + ((256, 512),) * 22 + ((2048, 512), (512, 2048)) * 11
    matrices = [random(*shape, seed=i, dtype=torch.float32).cuda() for i, shape in enumerate(shapes)]
    want = newton_schulz(matrices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = newton_schulz(matrices)
    for matrix in matrices:
        matrix.mul_(-1)
    graph.replay()
    assert all(torch.equal(result, -other) for result, other in zip(results, want, strict=True))
    for matrix, result in zip(matrices[::13], results[::13], strict=True):
        exact = truth("quintic", matrix.double().cpu())
        theirs = plain([matrix], "quintic", torch.bfloat16)[0]
        assert relative_error(result.cpu(), exact) < 2 * relative_error(theirs, exact)
    with (
        pytest.raises(RuntimeError, match="run once with the same tensors before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        newton_schulz([matrices[0].clone()])


@pytest.mark.gpu
def test_another_stream_waits_for_a_table_that_was_sent_before():
    matrices = [random(256, 512, seed=i, dtype=torch.float32).cuda() for i in range(8)]
    want = newton_schulz(matrices)
    torch.cuda.synchronize()
    kernels._send.cache_clear()
    # the first stream is busy, so that its table arrives late
    torch.cuda._sleep(100_000_000)
    newton_schulz(matrices)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert all(torch.equal(a, b) for a, b in zip(newton_schulz(matrices), want, strict=True))
