"""The CUDA sources, unchanged, with their threads run on the CPU: the bits of PyTorch, and not a byte outside the results."""

import ctypes
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from golf_kernels import dispatch
from golf_kernels.int6 import packed_bytes

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
CSRC = ROOT / "csrc"
LAUNCH = re.compile(r"(\w+(?:<\w+>)?)<<<(.+?), (\w+(?:<\w+>)?), 0, .+?>>>\((.*?)\);", re.DOTALL)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# bytes around every result, which nobody may write
MARGIN, POISON = 64, 0xA5

pytestmark = pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("g++")), reason="no nvcc")


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/*.cu as a library for the CPU."""
    folder = tmp_path_factory.mktemp("host")
    report = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    include = shlex.split(re.search(r'^#\$ INCLUDES="(.+)"', report, re.MULTILINE)[1])
    sources = []
    for source in sorted(CSRC.glob("*.cu")):
        text, count = LAUNCH.subn(r"host_launch(\2, \3, [&] { \1(\4); });", source.read_text())
        assert count > 0 and "<<<" not in text
        sources.append(folder / f"{source.stem}.cpp")
        sources[-1].write_text(text)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread", f"-I{CSRC}", *include]
    library = folder / "host.so"
    subprocess.run(["g++", *flags, "-include", HELPERS / "host_cuda.h", *sources, "-o", library], check=True)
    return ctypes.CDLL(str(library))


class Room:
    """An empty result with poisoned bytes before and behind it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.size = torch.Size(shape).numel() * dtype.itemsize
        self.bytes = torch.full((2 * MARGIN + self.size,), POISON, dtype=torch.uint8)
        self.tensor = self.bytes[MARGIN : MARGIN + self.size].view(dtype).view(shape)
        assert self.tensor.data_ptr() % 16 == 0

    def checked(self) -> Tensor:
        """What was written, and nothing else."""
        assert bool((self.bytes[:MARGIN] == POISON).all() and (self.bytes[MARGIN + self.size :] == POISON).all())
        return self.tensor


def call(function: ctypes._CFuncPtr, *arguments: Tensor | int | None) -> None:
    pointers = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    # an address, a size, or an int in the lower half of its register
    assert function(*map(ctypes.c_void_p, pointers)) == 0


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


# one thread's, one block's and a chunk's ends, and a little more or less than each
COUNTS = [0, 1, 2, 3, 4, 15, 16, 17, 4095, 4096, 4097, 2 * 4096 + 21]


@pytest.mark.parametrize("count", COUNTS)
def test_codes_are_packed_and_unpacked(cuda: ctypes.CDLL, count: int) -> None:
    codes = torch.randint(-32, 32, (count,), dtype=torch.int8, generator=torch.Generator().manual_seed(count))
    packed, first_bad = Room((packed_bytes(count),), torch.uint8), torch.tensor(2**63 - 1)
    call(cuda.golf_int6_pack_cuda, codes, packed.tensor, count, first_bad, None)
    assert int(first_bad) == 2**63 - 1
    assert same_bits(packed.checked(), dispatch.run_on("torch", "int6_pack", codes))
    unpacked = Room((count,), torch.int8)
    call(cuda.golf_int6_unpack_cuda, packed.tensor, unpacked.tensor, count, None)
    assert same_bits(unpacked.checked(), codes)


@pytest.mark.parametrize("places", [[0], [4096], [4100, 17], [8212], [31, 33, 30]])
def test_the_first_code_out_of_range_is_found(cuda: ctypes.CDLL, places: list[int]) -> None:
    codes = torch.zeros(COUNTS[-1], dtype=torch.int8)
    codes[places] = torch.tensor([32, -33, 127][: len(places)], dtype=torch.int8)
    packed, first_bad = Room((packed_bytes(len(codes)),), torch.uint8), torch.tensor(2**63 - 1)
    call(cuda.golf_int6_pack_cuda, codes, packed.tensor, len(codes), first_bad, None)
    assert int(first_bad) == min(places) and packed.checked() is not None


@pytest.mark.parametrize("value", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_is_dequantized_over_its_table(cuda: ctypes.CDLL, value: torch.dtype, scale: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    # rows shorter than a thread's share, empty matrices in every place, several chunks, and more than one launch takes
    shapes = [(0, 5), (1, 1), (7, 3), (5, 0), (3, 17), (2, 4096), (9, 1000), (0, 0), *[(2, 5)] * 80, (1, 0)]
    matrices, rooms, packed, scales = [], [], [], []
    for rows, columns in shapes:
        codes = torch.randint(-32, 32, (rows, columns), dtype=torch.int8, generator=generator)
        packed.append(dispatch.run_on("torch", "int6_pack", codes))
        scales.append(torch.rand(rows, generator=generator).add(0.01).to(scale))
        rooms.append(Room((rows, columns), value))
        matrices += [packed[-1].data_ptr(), scales[-1].data_ptr(), rooms[-1].tensor.data_ptr(), rows, columns]
    call(cuda.golf_int6_dequantize_cuda, torch.tensor(matrices), len(shapes), DTYPES[scale], DTYPES[value], None)
    want = dispatch.run_on("torch", "int6_dequantize", packed, scales, [columns for _, columns in shapes], value)
    assert all(same_bits(room.checked(), one) for room, one in zip(rooms, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 3), (3, 4097), (900, 9), (4, 0)])
def test_weights_are_fake_quantized(cuda: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=generator).to(dtype)
    scales = torch.rand(shape[0], generator=generator) * 0.1 + 0.001
    result = Room(shape, dtype)
    call(cuda.golf_int6_fake_quantize_cuda, weight, scales, result.tensor, *shape, DTYPES[dtype], None)
    assert same_bits(result.checked(), dispatch.run_on("torch", "int6_fake_quantize", weight, scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# a row, a block's rows and one more of both dtypes, and the columns of a whole block
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 7, 33), (3, 16, 65), (1, 128, 64), (2, 128, 70), (0, 4, 4), (2, 3, 0)]
)
@pytest.mark.parametrize("limit", [31, 3])
def test_columns_are_rounded_with_feedback(
    cuda: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int, int], limit: int
) -> None:
    batch, columns, rows = shape
    generator = torch.Generator().manual_seed(7)
    work = torch.randn(shape, generator=generator, dtype=dtype) * 0.1
    factor = torch.randn(batch, columns, columns, generator=generator, dtype=dtype).triu() / columns + torch.eye(
        columns
    )
    scales = torch.rand(batch, rows, generator=generator, dtype=dtype) * 0.01 + 0.002
    codes, errors = Room(shape, torch.int8), Room(shape, dtype)
    lower = factor.mT.contiguous()
    call(
        cuda.golf_gptq_block_cuda, work, lower, scales, codes.tensor, errors.tensor, *shape, limit, DTYPES[dtype], None
    )
    want = dispatch.run_on("torch", "gptq_block", work, factor, scales, limit)
    assert same_bits(codes.checked(), want[0]) and same_bits(errors.checked(), want[1])


def test_what_a_launcher_does_not_take_is_an_error(cuda: ctypes.CDLL) -> None:
    none = ctypes.c_void_p(None)
    sizes = [ctypes.c_int64(size) for size in (1, 129, 1)]
    assert cuda.golf_gptq_block_cuda(*[none] * 5, *sizes, 31, 0, none) == 1
    assert cuda.golf_gptq_block_cuda(*[none] * 5, *(ctypes.c_int64(size) for size in (65536, 1, 1)), 31, 0, none) == 1
    assert cuda.golf_gptq_block_cuda(*[none] * 5, *(ctypes.c_int64(1) for _ in range(3)), 31, 1, none) == 1
    assert cuda.golf_int6_fake_quantize_cuda(*[none] * 3, ctypes.c_int64(1), ctypes.c_int64(2**31), 0, none) == 1
    assert cuda.golf_int6_fake_quantize_cuda(*[none] * 3, ctypes.c_int64(1), ctypes.c_int64(1), 3, none) == 1
