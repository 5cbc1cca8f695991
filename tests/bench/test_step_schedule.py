"""The command that computes a step's kernels without a GPU; what needs a CUDA device runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.computed import fake_cuda
from benchmarks.computed import step_schedule as schedule
from benchmarks.measure import devices
from benchmarks.measure.devices import DEVICES, Kernel
from benchmarks.measure.step_variants import step_config
from train.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
H100 = next(device for device in DEVICES if device.name == "H100")


def environment(folder: Path) -> dict[str, str]:
    try:
        return {**fake_cuda.environment(folder), "GOLF_BACKEND": ""}
    except fake_cuda.NoDevice as reason:
        pytest.skip(str(reason))


def test_steps_are_counted_without_a_gpu(tmp_path: Path) -> None:
    arguments = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:logging", str(HELPERS / "schedule_runs.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env=environment(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout


def test_a_kernel_takes_what_its_slower_half_takes_and_never_less_than_a_launch() -> None:
    reached = devices.REACHED["H100"]
    product, copy = Kernel("aten::mm", 790e9, 1.0), Kernel("aten::copy_", 0.0, 3.01e9)
    # at the slow rates: 583 TFLOP/s and 2,700 GB/s, and 1 µs to the next kernel
    assert product.reached_ms(reached) == pytest.approx((1.0, 790 / 583 + 0.001))
    assert copy.reached_ms(reached) == pytest.approx((1.0, 3010 / 2700 + 0.001))
    assert Kernel("up_kernel", 643e9, 1.0, "triton").reached_ms(reached) == pytest.approx((1.0, 643 / 564 + 0.001))
    assert Kernel("norm_kernel", 0.0, 3.01e9, "triton").reached_ms(reached) == pytest.approx((1.0, 1.001))
    assert Kernel("aten::add", 1.0, 8.0).reached_ms(reached) == pytest.approx((0.0035, 0.0045))
    assert product.floor_ms(H100) == pytest.approx(790 / H100.tflops) and copy.floor_ms(H100) == pytest.approx(
        3.01 / 3.35
    )


def test_every_rate_has_a_source_and_its_slow_end_first() -> None:
    for reached in devices.REACHED.values():
        for rate in (*reached.tflops.values(), *reached.gbps.values()):
            assert 0 < rate.slow <= rate.fast and rate.source
        assert reached.gap_us.slow >= reached.gap_us.fast == 0 and reached.gap_us.source
    assert "  583–790  cublas, TFLOP/s: slow: 65,536 x 1,024 x 1,024" in schedule.rates(H100)


def test_a_published_run_is_a_range_beside_its_variant() -> None:
    steps = [
        schedule.Step(name, [Kernel("aten::mm", 790e11, 1e6)], [], [], 0, [], 0.8) for name in ("published", "torch")
    ]
    config = step_config("sp8192_sdclip", torch.device("cuda", 0), tiny=False)
    for recurrence, run in ((False, "101.9–102.3"), (True, "118.8–150.3")):
        rows = {
            line[:28].strip(): line.split() for line in schedule.table(config, steps, recurrence, H100).splitlines()
        }
        assert rows["published run, from its log"][-2:] == [run, "–"]
        assert rows["communication"][-2:] == ["0.00–0.80"] * 2
        # 100 ms at the fast rate; 135.51 at the slow one, a gap and the collectives
        assert rows["ms per step"][-2:] == ["100.00–136.31"] * 2


def test_equal_kernels_stand_together_and_families_add_up() -> None:
    forward = [Kernel("aten::mm", 790e9, 1e6)] * 2 + [Kernel("triton_poi_fused_add", 0.0, 3.01e8)]
    step = schedule.Step(
        "torch", forward, [Kernel("fa3::attention_backward", 352e9, 1.0, "attention backward")], [], 0, [], 0.0
    )
    families = schedule.family_ms(step.kernels, H100)
    assert {family: ms.fast for family, ms in families.items()} == pytest.approx(
        {"matrix products": 2.0, "elementwise and norms": 0.1, "attention": 1.0}
    )
    assert families["attention"] == pytest.approx((1.0, 1.001))
    assert step.ms(H100).fast == pytest.approx(3.1)
    assert step.ms(H100).slow == pytest.approx(sum(ms.slow for ms in families.values()))
    lines = schedule.largest(step, H100, 2).splitlines()
    assert lines[1].split() == ["2.000", "ms", "2", "x", "1.0", "MB", "forward", "aten::mm"]
    assert lines[2].endswith("backward  fa3::attention_backward") and len(lines) == 3


@pytest.mark.parametrize(
    ("recipe", "recurrence", "title"),
    [
        ("baseline", False, "baseline, 65,536 tokens, H100: "),
        ("sp8192_sdclip", False, "sp8192_sdclip, 98,304 tokens, before recurrence, H100: "),
        ("sp8192_sdclip", True, "sp8192_sdclip, 98,304 tokens, after recurrence, H100: "),
    ],
)
def test_a_table_names_the_phase_where_there_are_two(recipe: str, recurrence: bool, title: str) -> None:
    step = schedule.Step("torch", [Kernel("aten::mm", 790e9, 1e6)], [], [], 0, [], 0.0)
    config = step_config(recipe, torch.device("cuda", 0), tiny=False)
    assert schedule.table(config, [step], recurrence, H100).startswith(title + "computed, not measured\n")


def test_a_variant_of_any_name_has_a_column_of_its_own() -> None:
    variants = [
        "torch",
        "torch+optimizer_graph=on",
        "softcapped_cross_entropy=triton",
        "golf-leaky_relu2_mlp-qk_norm_rope",
    ]
    steps = [schedule.Step(variant, [Kernel("aten::mm", 790e9, 1e6)], [], [], 0, [], 0.0) for variant in variants]
    config = step_config("baseline", torch.device("cuda", 0), tiny=False)
    _, head, *rows = schedule.table(config, steps, False, H100).splitlines()
    assert head.split() == variants and rows[2].split()[-len(variants) :] == ["1.00–1.36"] * len(variants)
    assert {len(row) for row in rows} == {len(head)}


def test_a_family_that_a_variant_has_no_kernel_of_takes_no_time() -> None:
    kernels = {"torch": [Kernel("aten::mm", 790e9, 1e6)], "golf": [Kernel("up_kernel", 643e9, 1.0, "triton")]}
    steps = [schedule.Step(variant, launched, [], [], 0, [], 0.0) for variant, launched in kernels.items()]
    config = step_config("baseline", torch.device("cuda", 0), tiny=False)
    _, _, products, own, *_ = (
        line.rsplit(maxsplit=2) for line in schedule.table(config, steps, False, H100).splitlines()
    )
    assert (products, own) == (["matrix products", "1.00–1.36", "–"], ["mlp kernels", "–", "1.00–1.14"])


def test_a_schedule_without_all_products_is_refused() -> None:
    step = schedule.Step("torch+x", [Kernel("aten::mm", 2e12, 1.0)], [Kernel("aten::mm", 3e12, 1.0)], [], 0, [], 0.0)
    schedule.check_complete(step, 5e12)
    with pytest.raises(UserError, match=r"torch\+x: its schedule has 5.00 TFLOP of the 5.10 described"):
        schedule.check_complete(step, 5.1e12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--variants", "torch,foo"], "--variants: 'foo': expected published, torch, golf"),
        (
            ["--variants", "torch+max_autotune=True"],
            "--variants: 'torch+max_autotune=True': expected published, torch, golf",
        ),
        (["--phase", "after", "--recipe", "baseline"], "baseline repeats no layers"),
        (["--largest", "0"], "expected a whole number, at least 1"),
        (["--device", "a100"], "invalid choice: 'a100'"),
    ],
)
def test_what_cannot_be_computed_is_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, UserError)) as ended:
        schedule.main(given)
    assert message in f"{ended.value}{capsys.readouterr().err}"


def test_the_command_runs_in_a_process_with_the_stand_in(tmp_path: Path) -> None:
    environment(tmp_path)
    command = [sys.executable, "-m", "benchmarks", "schedule", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "usage: python -m benchmarks schedule" in result.stdout, result.stderr


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path) -> None:
    if fake_cuda.torch.version.cuda is not None:
        pytest.skip("a torch for CUDA compiles nothing")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "schedule", "--tiny"],
        env={**os.environ, "CXX": str(tmp_path / "none")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "no C++ compiler for the fake GPU" in result.stderr
