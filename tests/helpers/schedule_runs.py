"""Tests of the computed time of a step, on a CUDA device whose tensors have no data.

`test_schedule.py` runs this file in a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from bench_chains import BENCHES
from fake_cuda import CUDA, empty, gpu_config
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bench_leaky_relu2_mlp
from benchmarks.computed import step_schedule as schedule
from benchmarks.computed.fake_cuda import tensors_without_data
from benchmarks.computed.inductor_plan import PROPERTIES, Scheduled, planning_for_an_absent_gpu
from benchmarks.computed.recorder import Recorder, operator_kernels
from benchmarks.measure.chains import Chain
from benchmarks.measure.devices import Kernel
from benchmarks.measure.step_variants import all_kernels
from golf_kernels import dispatch, native, operators
from golf_kernels.qk_norm_rope import written_out
from golf_kernels.sharding import assign
from train.common.distributed import MICRO_BATCHES
from train.config import Config
from train.describe import describe
from train.model.gpt import GPT
from train.model.order import virtual_order
from train.optimize.groups import split_parameters

WIDTH, LENGTH = 64, 16
# the compiler takes seconds for each layer; these have all features
LAYERS = {"num_layers": 3, "recur_layers": (1,), "parallel_start_layer": 2, "ve_layers": (2,), "xsa_last_n": 3}


def narrow(**changes: Any) -> Config:
    batch = {"train_seq_len": LENGTH, "train_batch_tokens": MICRO_BATCHES * 2 * LENGTH}
    # Inductor pads odd widths if that is faster, which it cannot measure without a GPU
    return gpu_config("sp8192", compile="on", vocab_size=264, ve_dim=16, **LAYERS | batch | changes)


@pytest.fixture(scope="module", params=["published", "golf"])
def step(request: pytest.FixtureRequest) -> schedule.Step:
    return schedule.step_kernels(narrow(), request.param, True)


def test_the_products_are_those_that_the_recipe_describes(step: schedule.Step) -> None:
    config = narrow()
    tokens, runs = 2 * LENGTH, len(virtual_order(config, recurrence=True))
    described = 1e6 * tokens * describe(config, {})["mflop_per_token"]["after_recurrence"]
    # attention's backward pass computes the scores once more, which `describe` leaves out
    wanted = described + runs * LENGTH * WIDTH * tokens
    found = sum(kernel.flops for kernel in (*step.forward, *step.backward))
    assert found == pytest.approx(wanted, rel=1e-9)


def test_every_buffer_is_written_once_and_read_when_it_was(step: schedule.Step) -> None:
    for graph in step.graphs:
        written: set[str] = set()
        for kernel in graph:
            assert {name for name in kernel.reads if name.startswith("buf")} <= written
            assert not written & set(kernel.writes)
            written |= set(kernel.writes)
        assert len(written) > 50


def test_a_variant_has_its_own_kernels_and_only_the_published_one_waits(step: schedule.Step) -> None:
    names = {kernel.name for kernel in step.kernels}
    ours = {"up_kernel", "dx_kernel", "unmix_kernel", "rotate_kernel", "xsa_backward_kernel", "symmetric_kernel"}
    assert names >= ours if step.variant == "golf" else not names & ours
    assert {"fa3::attention", "fa3::attention_backward"} <= names
    assert step.waits == (step.variant == "published")
    assert all(kernel.bytes + kernel.cached > 0 or kernel.name == "norm_kernel" for kernel in step.kernels)


def test_a_graph_copies_the_gradients_once_and_has_its_rates_from_the_device() -> None:
    # what the passes compute is no matter here
    config = narrow(num_layers=2, recur_layers=(), parallel_start_layer=1, ve_layers=(1,), xsa_last_n=0)
    graph, eager = (
        schedule.step_kernels(config, f"golf-muon_step-newton_schulz+optimizer_graph={form}", False).rest
        for form in ("on", "off")
    )
    with tensors_without_data():
        kinds = split_parameters(GPT(config), config)
    matrices = list(kinds["matrix"].values())
    owners = assign(tuple(tuple(matrix.shape) for matrix in matrices), MICRO_BATCHES)
    own = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == 0]
    moved = [*own, *kinds["embedding"].values(), *kinds["scalar"].values()]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in moved)
    copies = [kernel.bytes for kernel in graph if kernel.name == "aten::_foreach_copy_" and kernel not in eager]
    assert copies == [2 * gradients]
    # these operations set two numbers of Muon, and one for each group of AdamW
    assert [sum(kernel.name == "aten::fill_" for kernel in kernels) for kernels in (graph, eager)] == [4, 0]


def test_small_chunks_of_the_head_stay_in_the_cache() -> None:
    found = {}
    for backend in ("triton", "triton/32MiB"):
        with tensors_without_data(), dispatch.forced(f"softcapped_cross_entropy={backend}"):
            hidden, weight = empty(98304, 512), empty(8192, 512)
            targets = empty(98304, dtype=torch.int64)
            with mock.patch.object(dispatch, "triton_problem", return_value=None):
                found[backend] = operator_kernels(
                    torch.ops.golf.softcapped_cross_entropy,
                    (hidden, weight, targets, 30.0, True, -100, 0.0, True, True),
                )
    passes = {name: [k for k in kernels if k.name == "loss_and_gradient_kernel"] for name, kernels in found.items()}
    # 12 chunks of 134 MB are read and written in memory; 48 of 34 MB in the cache
    for (name, kernels), count, logits in zip(
        passes.items(), (12, 48), (8192 * 8192 * 2, 2048 * 8192 * 2), strict=True
    ):
        assert len(kernels) == count
        moved, cached = {kernel.bytes for kernel in kernels}, {kernel.cached for kernel in kernels}
        assert all(
            at_least == pytest.approx(2 * logits, rel=1e-2) for at_least in (moved if name == "triton" else cached)
        )
        assert max(cached if name == "triton" else moved) < 1e-2 * logits
    assert len({sum(kernel.flops for kernel in kernels) for kernels in found.values()}) == 1


def planned(function: Callable[..., Any], *inputs: Tensor) -> list[list[Scheduled]]:
    graphs: list[list[Scheduled]] = []

    def plan(graph: list[Scheduled]) -> Callable[[], None]:
        graphs.append(graph)
        return lambda: None

    torch._dynamo.reset()
    with planning_for_an_absent_gpu(plan):
        found = torch.compile(function, dynamic=False, fullgraph=True)(*inputs)
        if found.requires_grad:
            found.backward()
    return graphs


def test_bytes_and_arithmetic_of_a_small_graph() -> None:
    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(x @ weight + bias).float().square().sum(1).mean()

    with tensors_without_data():
        x, weight, bias = empty(64, 32), empty(32, 16).requires_grad_(), empty(16)
        forward, backward = planned(loss, x, weight, bias)
    product, rows, mean = (kernel for scheduled in forward for kernel in scheduled.kernels)
    assert product == Kernel("aten::mm", 2 * 64 * 32 * 16, 2 * (64 * 32 + 32 * 16 + 64 * 16))
    # one kernel reads the product and the bias and writes a number per row; the next sums these numbers
    assert (rows.flops, rows.bytes) == (0, 2 * (64 * 16 + 16) + 4 * 64)
    assert mean.bytes == 4 * 64 + 4
    gradient, product = (kernel for scheduled in backward for kernel in scheduled.kernels)
    # from the product, the bias and the loss's gradient the compiler computes the activation again
    assert gradient.bytes == 2 * (64 * 16 + 16) + 4 + 2 * 64 * 16
    assert product == Kernel("aten::mm", 2 * 32 * 64 * 16, 2 * (64 * 32 + 64 * 16 + 32 * 16))


def test_a_slice_counts_what_is_read_of_it_and_a_repeated_row_once() -> None:
    with tensors_without_data():
        x, row = empty(64, 32), empty(1, 8)
        ((scheduled,),) = planned(lambda x, row: x[:, 8:16] + row.expand(64, 8), x, row)
    assert sorted(scheduled.reads.values()) == [2 * 8, 2 * 64 * 8]
    assert list(scheduled.writes.values()) == [2 * 64 * 8]


def test_a_look_up_counts_as_often_as_it_is_done_and_never_more_than_the_table() -> None:
    def look_up(table: Tensor, ids: Tensor) -> Tensor:
        return table[ids] + 1

    for rows, read in ((1000, 2 * 5 * 8), (3, 2 * 3 * 8)):
        with tensors_without_data():
            table, ids = empty(rows, 8), empty(5, dtype=torch.int64)
            ((scheduled,),) = planned(look_up, table, ids)
        assert sorted(scheduled.reads.values()) == sorted([read, 8 * 5])


def test_norm_and_rotation_pass_once_over_queries_and_keys_in_each_direction() -> None:
    def rotated(x: Tensor, gain: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        queries, keys = written_out(x[:, :, :8], x[:, :, 8:], cosine, sine, gain, eps=1e-6)
        return queries.sum() + keys.sum()

    with tensors_without_data():
        tables = (empty(256, 1, 8), empty(256, 1, 8))
        graphs = planned(rotated, empty(4, 256, 12, 64).requires_grad_(), empty(8).requires_grad_(), *tables)
    queries = 2 * 4 * 256 * 8 * 64
    for graph in graphs:
        large = [name for kernel in graph for name, size in kernel.writes.items() if size >= queries / 2]
        # each pass writes its two results; the backward pass may also write the gradient of the tensor that holds
        # queries and keys
        assert len(large) <= 3, graph


@torch.no_grad()
def test_an_operation_counts_what_it_reads_and_writes() -> None:
    with tensors_without_data(), Recorder() as recorder:
        x, y = empty(8, 4, dtype=torch.float32), empty(8, 4)
        x.add_(1.0)
        x.copy_(y)
        x[:, :2].zero_()
        torch._foreach_mul_([x, x.clone()], x.sum())
        x.view(4, 8).t()
        y @ y.T
    bytes_of = [(kernel.name.removeprefix("aten::"), kernel.bytes) for kernel in recorder.kernels]
    assert bytes_of == [
        ("add_", 256),
        ("copy_", 192),
        ("zero_", 64),
        ("clone", 256),
        ("sum", 132),
        ("_foreach_mul_", 516),
        ("mm", 2 * (8 * 4 + 8 * 8)),
    ]
    assert recorder.kernels[-1].flops == 2 * 8 * 8 * 4


@contextlib.contextmanager
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setenv("GOLF_BACKEND", "triton,muon_step=torch")
    monkeypatch.setattr(dispatch, "triton_problem", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    with tensors_without_data(), CUDA, torch.no_grad(), Recorder() as recorder:
        yield recorder


def total(kernels: list[Kernel]) -> float:
    return sum(kernel.bytes for kernel in kernels)


@pytest.mark.parametrize("op", BENCHES)
def test_an_operator_moves_what_its_benchmark_counts(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain: Chain = BENCHES[op].CHAIN
    with on_kernels(monkeypatch) as recorder, torch.enable_grad():
        inputs = chain.operator.inputs(empty, **chain.shapes[0]._asdict())
        upstream = operators.upstream_gradients(chain.operator.function, inputs, empty)
        recorder.kernels.clear()
        results = chain.operator.function(**inputs)
        first = len(recorder.kernels)
        leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
        torch.autograd.grad(results, leaves, upstream)
    found = [total(recorder.kernels[:first]), total(recorder.kernels[first:])]
    # the tolerance is for tables and for sums of blocks, which the benchmark does not count
    assert found == pytest.approx(list(chain.traffic(chain.shapes[0])["triton"].values()), rel=0.03)
    assert not any(kernel.flops for kernel in recorder.kernels)


def test_a_kernel_of_the_host_is_not_run_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_kernels(monkeypatch) as recorder:
        # as in the variant golf; only the native module has an int6 kernel
        monkeypatch.setenv("GOLF_BACKEND", all_kernels())
        torch.ops.golf.int6_fake_quantize(empty(5, 7, dtype=torch.float32), empty(5, dtype=torch.float32))
    assert {kernel.name.partition("::")[0] for kernel in recorder.kernels} == {"aten"}


def test_a_cuda_kernel_is_listed_where_a_gpu_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "problem", lambda part: None)
    with on_kernels(monkeypatch) as recorder:
        monkeypatch.setenv("GOLF_BACKEND", all_kernels())
        torch.ops.golf.int6_fake_quantize(empty(5, 7, dtype=torch.float32), empty(5, dtype=torch.float32))
    assert recorder.kernels == [Kernel("fake_quantize_kernel", 0.0, 4 * (5 * 7 + 5 + 5 * 7))]


def test_the_block_of_the_mlp_launches_what_its_benchmark_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = bench_leaky_relu2_mlp.Shape(98_304, 512, 2048)
    counted = bench_leaky_relu2_mlp.kernels(shape)
    with on_kernels(monkeypatch) as recorder:
        x, up, down = empty(shape.rows, shape.d), empty(shape.hidden, shape.d), empty(shape.d, shape.hidden)
        y, *saved = torch.ops.golf.leaky_relu2_mlp(x, up, down, None, None, 0.5, 1e-6, 1.0, True, True)
        torch.ops.golf.leaky_relu2_mlp_backward(y, x, up, down, None, *saved, 0.5, True, 1.0, True)
    found = {kernel.name: kernel for kernel in recorder.kernels}
    for name in ("up", "down", "dpre", "dx"):
        wanted = next(kernel for part in counted.values() for kernel in part if kernel.name == name)
        assert found[f"{name}_kernel"].flops == wanted.flops
        assert found[f"{name}_kernel"].bytes == pytest.approx(wanted.bytes, rel=0.01)
    assert [kernel.flops for kernel in recorder.kernels if kernel.name == "aten::mm"] == [
        counted["backward"][2].flops
    ] * 2
