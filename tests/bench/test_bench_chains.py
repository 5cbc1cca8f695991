"""The benchmarks of chains run, check results before they time anything, and predict what was computed by hand."""

import re

import pytest
import torch
from bench_chains import BENCHES

from benchmarks.measure import common
from golf_kernels import dispatch

CPU = torch.device("cpu")
KERNELS = dispatch.triton_problem() is None


@pytest.mark.parametrize("op", BENCHES)
def test_every_variant_is_checked_and_compared(op, capsys):
    assert BENCHES[op].main(["--device", "cpu", "--rounds", "2", "--warmup-ms", "1", "--tiny"]) == 0
    printed = capsys.readouterr().out
    assert f"{op}, {BENCHES[op].CHAIN.tiny}, float16, on cpu" in printed and "not stored" in printed
    for name in ("torch", "compile", *(["triton"] if KERNELS else [])):
        assert len(re.findall(rf"^{name} +eager ", printed, re.MULTILINE)) == 1, name
    if KERNELS:
        assert re.search(r"^triton is \d+\.\d+ times as fast as 'compile'", printed, re.MULTILINE)
        assert re.search(r"^triton keeps \d", printed, re.MULTILINE)


# by hand, U being 98,304 x 512 bfloat16 numbers, 100.66 MB:
# xsa 2.5 U forward and 4 U backward, with as many values 3 U and 5 U; mix 4 U and 6 U, compiled 9 U;
# QK-norm 3 U and 4.5 U, and 4.7 MB of rstd in each
@pytest.mark.parametrize(
    ("op", "name", "expected"),
    [
        ("xsa", "H100", [(0.0751, 0.1202), (0.0901, 0.1502)]),
        ("xsa", "H200", [(0.0585, 0.0936), (0.0702, 0.1170)]),
        ("mix_rms_norm", "H100", [(0.1202, 0.1803), (0.1202, 0.2704)]),
        ("mix_rms_norm", "H200", [(0.0936, 0.1405), (0.0936, 0.2107)]),
        ("qk_norm_rope", "H100", [(0.0916, 0.1366)] * 2),
        ("qk_norm_rope", "H200", [(0.0713, 0.1064)] * 2),
    ],
)
def test_predictions(op, name, expected):
    chain = BENCHES[op].CHAIN
    lines = [line for shape in chain.shapes for line in chain.predict(shape).split("\n") if name in line]
    found = [tuple(map(float, re.search(r"forward ([\d.]+), backward ([\d.]+)$", line).groups())) for line in lines]
    assert found == [pytest.approx([1e3 * ms for ms in pair], abs=0.6) for pair in expected]
    # of the tiny shape too, on the fastest device
    assert not re.search(r" 0(\.0+)?(,|$)", chain.predict(chain.tiny), re.MULTILINE)


@pytest.mark.parametrize("op", BENCHES)
def test_a_wrong_result_or_gradient_has_no_time(op):
    chain = BENCHES[op].CHAIN
    clock, limits = common.Clock(CPU, 1.0, 1), common.Ceilings(1.0, 1.0)
    count = len(chain.run(chain.plain, chain.inputs(chain.tiny, CPU, 0)))
    assert count > 2
    for index in range(count):

        def wrong(inputs, index=index):
            results = chain.run(chain.plain, inputs)
            results[index] = 1.02 * results[index]
            return results

        with pytest.raises(common.CheckFailed, match=f"{op}, wrong"):
            common.measure(chain.case(chain.tiny, CPU), [common.Variant("wrong", wrong)], clock, limits)


@pytest.mark.skipif(not KERNELS, reason=f"{dispatch.triton_problem()}")
@pytest.mark.parametrize(
    ("op", "kept"),
    [
        ("xsa", 2 * 2 * 9 * (4 + 2) * 16),
        ("mix_rms_norm", 2 * 2 * (2 * 67 * 48) + 4 * 2 * 48),
        # results, rstd, tables and gains
        ("qk_norm_rope", 2 * 16 * 108 + 4 * 108 + 2 * 2 * 9 * 4 + 4 * 4),
    ],
)
def test_what_the_operator_keeps(op, kept):
    chain = BENCHES[op].CHAIN
    inputs = chain.inputs(chain.tiny, CPU, 0)
    assert chain.kept_bytes(chain.operator.function, inputs) == kept < chain.kept_bytes(chain.plain, inputs)


@pytest.mark.parametrize("op", BENCHES)
def test_variants_leave_the_environment_alone(op, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "torch")
    chain = BENCHES[op].CHAIN
    for variant in chain.variants(CPU):
        variant.run(chain.inputs(chain.tiny, CPU, 0))
    assert dispatch.choose(op, device="cpu") == ("torch", "forced by GOLF_BACKEND")
