"""int6 against an independent bit-by-bit oracle in numpy, on every backend that this machine has."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import golf_kernels
from golf_kernels import dispatch

COUNTS = [*range(35), 63, 64, 65, 2047, 2048, 2049, 4095, 4096, 4097, 12289]
SCALE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=dispatch.available_backends("int6_pack"), autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("GOLF_BACKEND", f"int6={request.param}")
    return request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend == "cuda" else "cpu"


def value_dtypes(backend):
    return (
        [torch.float32, torch.bfloat16] + [torch.float16] * (backend != "cpp") + [torch.float64] * (backend == "torch")
    )


def pack_bits(codes):
    bits = np.unpackbits(codes.reshape(-1, 1).view(np.uint8), axis=1, bitorder="little")[:, :6]
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack_bits(packed, count):
    bits = np.unpackbits(packed, bitorder="little")[: 6 * count].reshape(count, 6).astype(np.int64)
    return (bits @ np.array([1, 2, 4, 8, 16, -32])).astype(np.int8)


def random_codes(*shape, seed=0):
    return np.random.default_rng(seed).integers(-32, 32, shape).astype(np.int8)


def on(device, array):
    return torch.from_numpy(array).to(device)


def equal_bits(got, want):
    """Equal, with NaN equal to NaN and zero different from minus zero."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    got, want = got.nan_to_num(nan=0.0, posinf=None), want.nan_to_num(nan=0.0, posinf=None)
    assert torch.equal(torch.signbit(got), torch.signbit(want))
    assert torch.equal(got, want)


def test_layout_is_the_documented_one(device):
    packed = golf_kernels.int6_pack(torch.tensor([1, 2, 3, 4, -1, -32], dtype=torch.int8, device=device))
    assert packed.tolist() == [0x81, 0x30, 0x10, 0b00111111, 0b00001000]


@pytest.mark.parametrize("count", COUNTS)
def test_packs_and_unpacks_as_the_oracle(device, count):
    codes = random_codes(count, seed=count)
    packed = golf_kernels.int6_pack(on(device, codes))
    assert packed.dtype == torch.uint8 and packed.device.type == device
    np.testing.assert_array_equal(packed.cpu().numpy(), pack_bits(codes))
    np.testing.assert_array_equal(golf_kernels.int6_unpack(packed, count).cpu().numpy(), codes)


def streams():
    """Counts with streams of the right length, whose unused last bits may be anything."""
    return st.integers(0, 400).flatmap(
        lambda count: st.tuples(st.just(count), st.binary(min_size=(6 * count + 7) // 8, max_size=(6 * count + 7) // 8))
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=streams())
def test_any_stream_unpacks_as_the_oracle_and_packs_back(device, case):
    count, stream = case
    packed = np.frombuffer(stream, dtype=np.uint8).copy()
    codes = golf_kernels.int6_unpack(on(device, packed), count)
    np.testing.assert_array_equal(codes.cpu().numpy(), unpack_bits(packed, count))
    np.testing.assert_array_equal(golf_kernels.int6_pack(codes).cpu().numpy(), pack_bits(unpack_bits(packed, count)))


def test_strided_and_offset_inputs(device):
    codes = on(device, random_codes(50, 70))
    for view in (codes.T, codes[:, ::3], codes[3:, 1:], codes[:1].expand(9, 70), codes.reshape(-1)[1:]):
        packed = golf_kernels.int6_pack(view)
        np.testing.assert_array_equal(packed.cpu().numpy(), pack_bits(np.ascontiguousarray(view.cpu().numpy())))
        shifted = torch.cat([packed.new_zeros(1), packed])[1:]
        spread = torch.stack([packed, packed + 1], dim=1)[:, 0]
        for stream in (shifted, spread):
            assert torch.equal(golf_kernels.int6_unpack(stream, view.numel()), view.reshape(-1))


@pytest.mark.parametrize("value", [32, -33, 127, -128, 64])
@pytest.mark.parametrize("place", [0, 7, 31, 32, 64, 98])
def test_a_code_out_of_range_is_named(device, value, place):
    codes = random_codes(9, 11)
    # the first one is named, and not the one after it
    codes.reshape(-1)[place : place + 2] = 99
    codes.reshape(-1)[place] = value
    with pytest.raises(
        ValueError, match=rf"expected -32\.\.31, found {value} at flat index {place} of shape \(9, 11\)"
    ):
        golf_kernels.int6_pack(on(device, codes))


def test_wrong_arguments_are_named(device):
    packed, scales = torch.zeros(9, dtype=torch.uint8, device=device), torch.ones(3, device=device)
    weight = torch.ones(3, 4, device=device)
    for call, message in (
        (lambda: golf_kernels.int6_pack(weight), r"codes: expected int8, found torch\.float32"),
        (lambda: golf_kernels.int6_unpack(packed, 13), "expected length 10 for count 13, found 9"),
        (lambda: golf_kernels.int6_unpack(packed, -1), "count: expected a number >= 0, found -1"),
        (lambda: golf_kernels.int6_unpack(packed.char(), 12), r"uint8 vector, found torch\.int8"),
        (lambda: golf_kernels.int6_unpack(packed.reshape(3, 3), 12), r"uint8 vector.*\(3, 3\)"),
        (lambda: golf_kernels.int6_dequantize(packed, scales, 5), "expected length 12 for 3 x 5 codes, found 9"),
        (lambda: golf_kernels.int6_dequantize(packed, scales, -4), "columns: expected a number >= 0, found -4"),
        (lambda: golf_kernels.int6_dequantize(packed, scales.int(), 4), "scales: expected a floating vector"),
        (lambda: golf_kernels.int6_dequantize(packed, weight, 4), r"scales: expected a floating vector.*\(3, 4\)"),
        (lambda: golf_kernels.int6_dequantize(packed, scales, 4, dtype=torch.int8), "dtype: expected one of"),
        (lambda: golf_kernels.int6_dequantize(packed, scales.to("meta"), 4), "one device"),
        (
            lambda: golf_kernels.int6_dequantize_many([packed], [scales] * 2, [4]),
            "expected lists of one length, found 1, 2 and 1",
        ),
        (
            lambda: golf_kernels.int6_dequantize_many([packed], [], [4]),
            "expected lists of one length, found 1, 0 and 1",
        ),
        (lambda: golf_kernels.int6_dequantize_many([packed] * 2, [scales, scales.half()], [4, 4]), "one dtype"),
        (lambda: golf_kernels.int6_fake_quantize(weight.int(), scales), "expected floating dtypes"),
        (lambda: golf_kernels.int6_fake_quantize(weight, scales[:2]), r"weight \(3, 4\) and scales \(2,\)"),
        (lambda: golf_kernels.int6_fake_quantize(scales, scales[0]), r"weight \(3,\) and scales \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# rows of 5 and 7 codes start within a byte; 700 x 7 spans several blocks
@pytest.mark.parametrize("shape", [(3, 8), (5, 5), (1, 1), (9, 7), (700, 7), (3, 2049), (2, 4100), (0, 5), (4, 0)])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_dequantizes_to_the_rounded_product(backend, device, shape, scale_dtype):
    codes = random_codes(*shape, seed=shape[1])
    scales = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).add(0.01).to(scale_dtype)
    packed = on(device, pack_bits(codes))
    # a product of a 6-bit code and a float32 is exact in float64
    exact = torch.from_numpy(codes).double() * scales.double().unsqueeze(1)
    for dtype in value_dtypes(backend):
        want = exact if dtype == torch.float64 else exact.float().to(dtype)
        got = golf_kernels.int6_dequantize(packed, scales.to(device), shape[1], dtype=dtype)
        equal_bits(got.cpu(), want)


# long rows may be looked up in a table of their 64 values
@pytest.mark.parametrize("columns", [64, 192])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_dequantizes_extreme_scales(backend, device, scale_dtype, columns):
    tiny = torch.finfo(scale_dtype).smallest_normal / 4
    extremes = [
        0.0,
        -0.0,
        tiny,
        3 * tiny,
        -1.5,
        torch.finfo(scale_dtype).max,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    scales = torch.tensor(extremes, dtype=scale_dtype)
    codes = np.tile(np.arange(-32, 32, dtype=np.int8), (len(scales), columns // 64))
    for dtype in value_dtypes(backend)[:2]:
        want = (torch.from_numpy(codes).double() * scales.double().unsqueeze(1)).float().to(dtype)
        got = golf_kernels.int6_dequantize(on(device, pack_bits(codes)), scales.to(device), columns, dtype=dtype)
        equal_bits(got.cpu(), want)


def test_dequantizes_a_whole_model_at_once(device):
    shapes = [(1 + 7 * i % 13, 1 + 11 * i % 37) for i in range(170)]
    shapes[5] = shapes[100] = (0, 3)
    codes = [random_codes(*shape, seed=i) for i, shape in enumerate(shapes)]
    scales = [torch.rand(rows, dtype=torch.float64).half() for rows, _ in shapes]
    values = golf_kernels.int6_dequantize_many(
        [on(device, pack_bits(one)) for one in codes], [s.to(device) for s in scales], [c for _, c in shapes]
    )
    for got, one, steps in zip(values, codes, scales, strict=True):
        equal_bits(got.cpu(), (torch.from_numpy(one).double() * steps.double().unsqueeze(1)).float())
    assert golf_kernels.int6_dequantize_many([], [], []) == []


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 33), (1, 1), (5, 4099), (0, 4), (3, 0)])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_fake_quantize_is_the_formula_in_float64(device, shape, scale_dtype):
    generator = torch.Generator().manual_seed(shape[-1])
    weight = torch.randn(shape, generator=generator) * 2
    scales = torch.rand(shape[:-1], generator=generator).add(0.02).to(scale_dtype)
    got = golf_kernels.int6_fake_quantize(weight.to(device), scales.to(device)).cpu()
    ratio = weight.double() / scales.double().unsqueeze(-1)
    want = np.rint(ratio.clamp(-31, 31).numpy()) * scales.double().unsqueeze(-1).numpy()
    # a float32 quotient within its rounding error of a half may go either way
    decided = ((ratio - ratio.floor() - 0.5).abs() > 1e-4).numpy()
    assert got.shape == weight.shape and got.dtype == weight.dtype
    assert decided.sum() >= 0.99 * weight.numel() - 1
    np.testing.assert_allclose(got.numpy()[decided], want[decided], rtol=2**-23)


def test_fake_quantize_rounds_halves_to_even_and_keeps_what_is_no_number(device):
    weight = torch.tensor([[-2.5, -1.5, -0.5, -0.2, -0.0, 0.2, 0.5, 1.5, 2.5, 40.0, -40.0, 30.5, 31.4]])
    want = torch.tensor([[-2.0, -2.0, -0.0, -0.0, -0.0, 0.0, 0.0, 2.0, 2.0, 31.0, -31.0, 30.0, 31.0]])
    unusual = torch.tensor([[float("nan"), float("inf"), -float("inf")]])
    unusual_want = torch.tensor([[float("nan"), 31.0, -31.0]])
    weight, want = torch.cat([weight, unusual], 1), torch.cat([want, unusual_want], 1)
    for step in (1.0, 0.25):
        got = golf_kernels.int6_fake_quantize(weight.to(device) * step, torch.tensor([step], device=device))
        equal_bits(got.cpu(), want * step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fake_quantize_in_other_dtypes(backend, device, monkeypatch, dtype):
    if backend == "cpp" or (backend == "cuda" and dtype == torch.float64):
        monkeypatch.delenv("GOLF_BACKEND")
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(3)).to(dtype)
    scales = torch.full((7,), 0.0625)
    got = golf_kernels.int6_fake_quantize(weight.to(device), scales.to(device)).cpu()
    # a power of two divides and multiplies exactly
    equal_bits(got, (weight.double() / 0.0625).clamp(-31, 31).round().mul(0.0625).to(dtype))


def test_fake_quantize_strided_weight(device):
    weight = torch.randn(33, 6, generator=torch.Generator().manual_seed(4)).to(device)
    scales = torch.rand(12, generator=torch.Generator().manual_seed(5)).to(device)[::2] + 0.1
    got = golf_kernels.int6_fake_quantize(weight.T, scales)
    assert got.is_contiguous()
    equal_bits(got, golf_kernels.int6_fake_quantize(weight.T.contiguous(), scales.contiguous()))


def test_fake_quantize_passes_the_gradient_straight_through(device):
    weight = torch.randn(5, 9, device=device, requires_grad=True)
    scales = torch.full((5,), 0.05, device=device, requires_grad=True)
    upstream = torch.randn(5, 9, device=device)
    golf_kernels.int6_fake_quantize(weight, scales).backward(upstream)
    assert torch.equal(weight.grad, upstream)
    assert scales.grad is None


def test_dequantize_has_a_gradient_in_the_scales(device):
    codes = [random_codes(4, 7), random_codes(3, 5, seed=1)]
    scales = [torch.rand(4, device=device, requires_grad=True), torch.rand(3, device=device, requires_grad=True)]
    values = golf_kernels.int6_dequantize_many([on(device, pack_bits(c)) for c in codes], scales, [7, 5])
    upstream = [torch.randn(4, 7), torch.randn(3, 5)]
    torch.autograd.backward(values, [one.to(device) for one in upstream])
    for one, step, gradient in zip(codes, scales, upstream, strict=True):
        want = (gradient.double() * torch.from_numpy(one)).sum(1)
        torch.testing.assert_close(step.grad.cpu().double(), want, rtol=1e-5, atol=1e-5)
    only_first = golf_kernels.int6_dequantize_many([on(device, pack_bits(c)) for c in codes], scales, [7, 5])[0]
    (gradient,) = torch.autograd.grad(only_first.sum(), scales[0])
    torch.testing.assert_close(gradient.cpu(), torch.from_numpy(codes[0]).sum(1).float())


def test_contracts_of_the_operators(device):
    codes = on(device, random_codes(6, 7))
    packed = golf_kernels.int6_pack(codes)
    scales = torch.rand(6, device=device)
    ops = torch.ops.golf
    torch.library.opcheck(ops.int6_pack.default, (codes,))
    torch.library.opcheck(ops.int6_unpack.default, (packed, 42))
    for steps in (scales, scales.clone().requires_grad_()):
        torch.library.opcheck(ops.int6_dequantize.default, ([packed, packed], [steps, steps], [7, 7], torch.bfloat16))
    weight = torch.randn(6, 7, device=device)
    for one in (weight, weight.T.contiguous().T, weight.clone().requires_grad_()):
        torch.library.opcheck(ops.int6_fake_quantize.default, (one, scales))


def test_compiles_as_one_graph(device):
    def walk(weight, scales, codes):
        fake = golf_kernels.int6_fake_quantize(weight * 2, scales)
        packed = golf_kernels.int6_pack(codes)
        unpacked = golf_kernels.int6_unpack(packed, codes.numel()).reshape(codes.shape)
        return fake + golf_kernels.int6_dequantize(packed, scales, codes.shape[1]) + unpacked

    compiled = torch.compile(walk, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, columns in ((4, 6), (9, 5)):
        codes = on(device, random_codes(rows, columns))
        weight = torch.randn(rows, columns, device=device, requires_grad=True)
        scales = torch.rand(rows, device=device) + 0.1
        got = compiled(weight, scales, codes)
        assert torch.equal(got, walk(weight, scales, codes))
        (gradient,) = torch.autograd.grad(got.sum(), weight)
        assert torch.equal(gradient, torch.full_like(weight, 2.0))


def test_fake_tensors_on_a_gpu():
    with FakeTensorMode():
        codes = torch.empty(5, 7, dtype=torch.int8, device="cuda")
        packed = golf_kernels.int6_pack(codes)
        scales = torch.empty(5, dtype=torch.float16, device="cuda")
        values = golf_kernels.int6_dequantize(packed, scales, 7, dtype=torch.bfloat16)
        fake = golf_kernels.int6_fake_quantize(values, scales)
        unpacked = golf_kernels.int6_unpack(packed, 35)
    found = [(one.device.type, tuple(one.shape), one.dtype) for one in (packed, values, fake, unpacked)]
    assert found == [
        ("cuda", (27,), torch.uint8),
        ("cuda", (5, 7), torch.bfloat16),
        ("cuda", (5, 7), torch.bfloat16),
        ("cuda", (35,), torch.int8),
    ]


@pytest.mark.skipif("cpp" not in dispatch.available_backends("int6_pack"), reason="the C++ backend is not built")
def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setenv("GOLF_BACKEND", "int6=cpp")
    packed, scales = golf_kernels.int6_pack(torch.zeros(2, 4, dtype=torch.int8)), torch.ones(2)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(dispatch.BackendError, match=f"results of {dtype}, which only PyTorch computes"):
            golf_kernels.int6_dequantize(packed, scales, 4, dtype=dtype)
    with pytest.raises(dispatch.BackendError, match=r"scales of torch\.float64, which only PyTorch computes"):
        golf_kernels.int6_dequantize(packed, scales.double(), 4)
    with pytest.raises(dispatch.BackendError, match=r"weights of torch\.bfloat16, which only PyTorch computes"):
        golf_kernels.int6_fake_quantize(torch.ones(2, 4, dtype=torch.bfloat16), scales)
