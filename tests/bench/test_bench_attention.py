"""The benchmark of attention runs on each backend, checks its results first and refuses wrong ones."""

import pytest
import torch

from benchmarks import bench_attention
from benchmarks.measure import common
from benchmarks.measure.step_variants import step_config
from train.model.attention_choice import attention_inputs

CPU = torch.device("cpu")


def test_each_backend_of_this_machine_is_measured_for_both_batches(capsys):
    assert bench_attention.main(["--device", "cpu", "--tiny", "--rounds", "2", "--warmup-ms", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("attention, 2x") == 2 and printed.count("sdpa again") == 2
    assert {line.split()[0] for line in printed.splitlines() if " eager " in line} == {"sdpa", "math"}
    assert "cudnn: left out: needs a CUDA GPU" in printed


@pytest.mark.parametrize("documents", [False, True])
def test_a_wrong_gradient_has_no_time(documents):
    config = step_config("sp8192_sdclip", CPU, tiny=True).replace(document_masking=documents)
    case = bench_attention.make_case(config, 2, CPU)
    right = bench_attention.make_variant("sdpa", config, CPU)

    def run(given):
        output, query, key, value = right.run(given)
        return [output, query, key, 1.001 * value]

    clock, limits = common.Clock(CPU, 1.0, 1), common.Ceilings(1.0, 1.0)
    assert len(common.measure(case, [right], clock, limits)) == 2
    with pytest.raises(common.CheckFailed, match="attention, wrong"):
        common.measure(case, [common.Variant("wrong", run)], clock, limits)
    assert (attention_inputs(config, 2, CPU, 0)[3] is not None) == documents
