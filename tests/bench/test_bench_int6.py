"""The int6 benchmark runs, checks its results first and names every operation's share of a copy's bandwidth."""

import re

import pytest
import torch

from benchmarks import bench_int6
from benchmarks.measure import common


def test_every_operation_is_checked_and_compared_with_a_copy(capsys):
    arguments = ["--device", "cpu", "--rounds", "2", "--warmup-ms", "1", "--tiny"]
    assert bench_int6.main(arguments) == 0
    shares = re.findall(r"^(\w+) (\w+) torch: \d+% of a copy's bandwidth$", capsys.readouterr().out, re.MULTILINE)
    assert shares == [
        ("int6_dequantize", "float32"),
        ("int6_dequantize", "bfloat16"),
        ("int6_pack", "uint8"),
        ("int6_unpack", "int8"),
        ("int6_fake_quantize", "float32"),
    ]


def test_a_wrong_result_has_no_time():
    cpu = torch.device("cpu")
    for operation in bench_int6.OPERATIONS:
        wrong = common.Variant("wrong", lambda model, of=operation: [of.reference(one) + 1 for one in model])
        case = bench_int6.make_case(operation, bench_int6.TINY, cpu)
        with pytest.raises(common.CheckFailed, match=f"{operation.op}, wrong"):
            common.measure(case, [wrong], common.Clock(cpu, 1.0, 2), common.Ceilings(1.0, 1.0))
