"""The GPTQ benchmark runs, and times nothing whose bits differ."""

import pytest
import torch

from benchmarks import bench_gptq
from benchmarks.measure import common


def test_every_backend_is_reported(capsys):
    assert bench_gptq.main(["--device", "cpu", "--rounds", "2", "--warmup-ms", "1", "--tiny"]) == 0
    assert "gptq_block, 2x9x21, float32, on cpu" in capsys.readouterr().out


def test_a_single_other_bit_has_no_time():
    cpu = torch.device("cpu")

    def nearly(block):
        codes, errors = bench_gptq.run("torch", block)
        errors[0, 0, 0] = errors[0, 0, 0].nextafter(torch.tensor(9.0))
        return codes, errors

    case = bench_gptq.make_case((2, 9, 21), cpu)
    with pytest.raises(common.CheckFailed, match="gptq_block, nearly"):
        common.measure(case, [common.Variant("nearly", nearly)], common.Clock(cpu, 1.0, 2), common.Ceilings(1.0, 1.0))
