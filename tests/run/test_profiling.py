"""Profiles of steps: whose time a kernel's is, what is written, and which steps."""

import errno
import gzip
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from train.common.distributed import Ranks
from train.common.values import ConfigError, parse_steps
from train.config import Config
from train.run.clocks import WallClock
from train.run.logger import RunLogger
from train.run.profiling import (
    NO_KERNELS,
    StepProfiler,
    breakdown,
    busy_ms,
    kernel_family,
    kernel_times,
    part_of_any_layer,
    part_times,
    write_breakdowns,
    write_trace,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "elementwise and norms"),
        ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "optimizer and average"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_tem_fused_mm_7", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("aten::tanh", "elementwise and norms"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>", "elementwise and norms"),
        ("golf::leaky_relu2_mlp_backward", "mlp kernels"),
        ("golf::qk_norm_rope_backward", "attention"),
        ("golf::mix_rms_norm_backward", "elementwise and norms"),
        ("golf::xsa_backward", "attention"),
        ("golf::int6_fake_quantize", "elementwise and norms"),
        (
            "void golf::fake_quantize_kernel<float>(float const*, float const*, float*, long, long)",
            "elementwise and norms",
        ),
        ("cudaLaunchKernel", "other"),
    ],
)
def test_kernels_are_told_apart(kernel: str, family: str) -> None:
    assert kernel_family(kernel) == family


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("newton_schulz_triton", "muon kernels"), ("muon_triton", "muon kernels"), ("leaky_relu2_mlp_triton", "mlp kernels"),
        ("softcapped_cross_entropy_triton", "head and loss kernels"), ("qk_norm_rope_triton", "attention"),
        ("mix_rms_norm_triton", "elementwise and norms"),
        ("xsa_triton", "attention"),
    ],
)  # fmt: skip
def test_every_triton_kernel_is_counted_where_it_belongs(module: str, family: str) -> None:
    source = (Path(__file__).resolve().parents[2] / "golf_kernels" / f"{module}.py").read_text()
    kernels = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    assert kernels and {kernel: kernel_family(kernel) for kernel in kernels} == dict.fromkeys(kernels, family)


def test_breakdown_is_milliseconds_per_step_from_the_largest_on() -> None:
    events = [("aten::mm", 3000.0), ("unheard_of", 500.0), ("aten::bmm", 1000.0)]
    assert breakdown(events, steps=2) == {"matrix products": 2.0, "other": 0.25}


@pytest.mark.parametrize("text", ["3", "3:3", "4:2", "a:b", "1:2:3", "-1:2"])
def test_malformed_steps_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"profile_steps: expected FIRST:END"):
        Config(profile_steps=text)


def test_steps_behind_the_last_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="profile_steps 30:33 starts after the last of 30 iterations"):
        Config(profile_steps="30:33", iterations=30)
    assert Config(profile_steps="29:33", iterations=30)


def test_steps_are_read() -> None:
    assert parse_steps("") == range(0) and parse_steps("30:33") == range(30, 33)


class CountingClock(WallClock):
    """A clock of one process whose seconds are the pauses and steps it was told of."""

    def __init__(self) -> None:
        self.ticks, self.running, self.paused_at = 0, True, []
        super().__init__(0.0, now=lambda: float(self.ticks))
        self.resume()

    def pause(self) -> float:
        self.paused_at.append(self.ticks)
        return super().pause()


def profiled_run(folder: Path, steps: range, total: int, events: dict[int, str] | None = None, switch: int = 99) -> str:
    """The log of a small training loop; `events` end a profile before a step."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    clock = CountingClock()
    with RunLogger(folder, 1, echo=False) as log:
        profiler = StepProfiler(steps, folder, Ranks(), log, clock, model)
        for step in range(total):
            if step in (events or {}):
                clock.pause()
                profiler.end(step, (events or {})[step])
                clock.resume()
            profiler.before(step, recurrence=step >= switch)
            model(torch.randn(4, 8)).sum().backward()
            clock.ticks += 1
            clock.tick()
            profiler.after(step + 1)
        clock.pause()
        profiler.finish(total)
    # a pause takes no training time
    assert clock.elapsed_seconds == total
    return (folder / "train_seed1.log").read_text()


def test_chosen_steps_leave_a_trace_with_the_models_parts(tmp_path: Path) -> None:
    log = profiled_run(tmp_path, range(1, 3), 4)
    folder = tmp_path / "profile"
    assert f"profile:{folder} steps:1-2 (profiling" in log
    assert sorted(path.name for path in folder.iterdir()) == [
        "breakdown.json", "breakdown.png", "parts.json", "parts.png", "trace_rank0.json.gz",
    ]  # fmt: skip
    trace = json.loads(gzip.decompress((folder / "trace_rank0.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("1.0") == 2 and names.count("1") == 2
    families = json.loads((folder / "breakdown.json").read_text())
    assert families["matrix products"] > 0
    parts = json.loads((folder / "parts.json").read_text())
    assert min(parts[name + way] for name in ("0", "1.0", "1.1") for way in ("", " backward")) > 0
    assert parts.keys() - {"1"} == {"0", "1.0", "1.1", "0 backward", "1.0 backward", "1.1 backward", "elsewhere"}
    assert sum(parts.values()) == pytest.approx(sum(families.values()))


@pytest.mark.parametrize(
    ("total", "events", "switch", "said"),
    [
        (3, {}, 99, "steps:1-2 of 1-4, training ends"),
        (9, {3: "validation follows"}, 99, "steps:1-2 of 1-4, validation follows"),
        (9, {1: "a checkpoint follows"}, 99, "steps:1-4 ("),
        (9, {}, 4, "steps:1-3 of 1-4, recurrence begins"),
        (1, {}, 99, "profile:none, this process did not reach step 1"),
    ],
)
def test_a_profile_holds_steps_of_one_kind_and_nothing_else(
    total: int, events: dict[int, str], switch: int, said: str, tmp_path: Path
) -> None:
    log = profiled_run(tmp_path, range(1, 5), total, events, switch)
    assert log.count("profile:") == 1 and said in log
    assert (tmp_path / "profile" / "breakdown.json").exists() == (total > 1)


def test_a_profile_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        log = profiled_run(tmp_path, range(1, 3), 4)
    assert "profile:not all written ([Errno 28] No space left on device: " in log and "trace_rank0" in log
    assert list((tmp_path / "profile").iterdir()) == []


def test_a_trace_that_the_profiler_could_not_write_is_named(tmp_path: Path) -> None:
    silent = SimpleNamespace(export_chrome_trace=lambda path: Path(f"{path}.tmp").touch())
    with pytest.raises(OSError, match=r"could not write its trace.*trace_rank0"):
        write_trace(tmp_path / "trace_rank0.json.gz", silent)
    assert list(tmp_path.iterdir()) == []


def test_a_gpus_profile_without_kernels_is_no_profile_of_the_cpu(tmp_path: Path) -> None:
    events = [made_event("aten::mm", 0, 9000, gpu=False)]
    trace = made_trace(events)
    assert kernel_times(trace) == [] and busy_ms(trace, 1) is None
    for event in events:
        event.kernels, event.cpu_parent, event.sequence_nr, event.fwd_thread = [], None, -1, 0
    assert write_breakdowns(tmp_path, "", trace, 1, "title") == NO_KERNELS
    assert list(tmp_path.iterdir()) == []


def made_event(name: str, start: float, end: float, *, gpu: bool = True, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, device_type=DeviceType.CUDA if gpu else DeviceType.CPU, is_user_annotation=annotation,
        time_range=SimpleNamespace(start=start, end=end), self_device_time_total=end - start, self_cpu_time_total=end - start,
    )  # fmt: skip


def made_trace(events: list[SimpleNamespace], activity: ProfilerActivity = ProfilerActivity.CUDA) -> SimpleNamespace:
    return SimpleNamespace(activities={activity}, events=lambda: events)


def test_ranges_and_overlaps_are_no_time_of_the_gpu() -> None:
    events = [
        made_event("forward", 0, 9000, annotation=True), made_event("aten::mm", 0, 9000, gpu=False),
        made_event("gemm", 1000, 4000), made_event("ncclDevKernel", 2000, 3000), made_event("flash", 3500, 5000),
        made_event("gemm", 7000, 8000),
    ]  # fmt: skip
    trace = made_trace(events)
    assert kernel_times(trace) == [("gemm", 3000), ("ncclDevKernel", 1000), ("flash", 1500), ("gemm", 1000)]
    # 1,000 to 5,000 and 7,000 to 8,000 microseconds, in two steps
    assert busy_ms(trace, 2) == 2.5
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    assert busy_ms(made_trace(on_cpu, ProfilerActivity.CPU), 2) is None


def launched(
    name: str,
    microseconds: list[float],
    parent: object = None,
    *,
    annotation: bool = False,
    node: int = -1,
    of_thread: int = 0,
) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, device_type=DeviceType.CPU, is_user_annotation=annotation, cpu_parent=parent,
        kernels=[SimpleNamespace(duration=us) for us in microseconds], self_cpu_time_total=1e6, self_device_time_total=0,
        thread=2 if of_thread else 1, sequence_nr=node, fwd_thread=of_thread,
    )  # fmt: skip


def test_a_kernels_time_is_that_of_the_innermost_range_it_was_started_in() -> None:
    forward = launched("forward", [], annotation=True)
    graph = launched("## Call CompiledFxGraph fabc ##", [], forward, annotation=True)
    part = launched("blocks.3.mlp", [], graph, annotation=True)
    events = [
        forward, graph, part, launched("aten::mm", [30.0, 5.0], part), launched("triton_poi_fused", [7.0], part),
        launched("aten::mul", [2.0], graph), launched("aten::add", [1.0]),
        *(made_event("gemm", 0, us) for us in (30, 5, 7, 2, 1, 10)),
    ]  # fmt: skip
    trace = made_trace(events)
    found = part_times(trace)
    # of 55 microseconds on the GPU, 1 was started in no range and 10 by no operator
    assert found == [("blocks.3.mlp", 35), ("blocks.3.mlp", 7), ("forward", 2), ("elsewhere", 11)]
    assert breakdown(found, 1, part_of_any_layer) == {"blocks.mlp": 0.042, "elsewhere": 0.011, "forward": 0.002}


def test_a_derivatives_time_is_that_of_the_part_it_is_the_derivative_of() -> None:
    forward, backward = (launched(name, [], annotation=True) for name in ("forward", "backward"))
    first, second = (launched(name, [], forward, annotation=True) for name in ("blocks.0.mlp", "blocks.1.mlp"))
    nodes = [launched(f"node {node}", [], backward, node=node, of_thread=1) for node in (9, 8, 7)]
    other = launched("CompiledFunctionBackward", [], node=8, of_thread=3)
    compiled = launched("blocks.7.mlp backward", [], nodes[0], annotation=True)
    events = [
        forward, first, launched("aten::mm", [1.0], first, node=7),
        # makes no node, so the next one bears the same number
        launched("aten::detach", [2.0], first, node=8),
        second, launched("aten::mm", [4.0], second, node=8), launched("aten::sum", [8.0], forward, node=9),
        backward, *nodes, *(launched("aten::mm", [us], node) for us, node in zip((16.0, 32.0, 64.0), nodes, strict=True)),
        launched("aten::mul", [128.0], compiled), launched("aten::mm", [256.0], other),
        *(made_event("gemm", 0, 2**power) for power in range(9)),
    ]  # fmt: skip
    assert breakdown(part_times(made_trace(events)), 1, str) == {
        "elsewhere": 0.256, "blocks.7.mlp backward": 0.128, "blocks.0.mlp backward": 0.064, "blocks.1.mlp backward": 0.032,
        "backward": 0.016, "forward": 0.008, "blocks.1.mlp": 0.004, "blocks.0.mlp": 0.003,
    }  # fmt: skip


def test_steps_done_before_this_process_are_said_to_be_at_once(tmp_path: Path) -> None:
    with RunLogger(tmp_path, 1, echo=False) as log:
        profiler = StepProfiler(range(30, 33), tmp_path, Ranks(), log, CountingClock())
        profiler.before(31, recurrence=False)
        said = log.path.read_text()
        profiler.before(32, recurrence=False)
        profiler.finish(33)
    assert said.startswith(
        "profile:none, an earlier process did step 30, this process began with step 31: choose later"
    )
    # and once
    assert log.path.read_text() == said and not (tmp_path / "profile").exists()
