"""The evaluation's benchmark runs, its arithmetic is the published model's, and both evaluations agree."""

import os
import re

import pytest
import torch

from benchmarks import bench_evaluation
from benchmarks.measure import common
from benchmarks.measure.models import NARROW, random_model, window_flops
from train.config import Config
from train.model.gpt import GPT
from train.recipes import load_recipe


def test_both_variants_are_measured_and_compared(capsys):
    arguments = [
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--warmup-ms",
        "1",
        "--tiny",
        "--tokens",
        "300",
    ]
    assert bench_evaluation.main([*arguments, "--recipes", "sp8192_sdclip"]) == 0
    printed = capsys.readouterr().out
    found = re.findall(
        r"^(.*): [\d,]+ tokens/s, \d+\.\d\d x published, \d+% of the matrix rate(, \d+\.\d\d x plain loop \(goal: 3 x\))?$",
        printed,
        re.MULTILINE,
    )
    ours = ["golf", "golf, layer 0 per window"]
    with_goal = [name for name, goal in found if goal]
    assert [name for name, _ in found if name not in with_goal] == ["published", "plain loop", "published again"]
    cores = len(os.sched_getaffinity(0))
    assert with_goal == (ours if cores == 1 else [*ours, f"golf, {cores} processes"])


def test_processes_share_the_windows_of_a_text():
    settings = load_recipe("sp8192_sdclip").settings | NARROW
    config = Config(**settings | {"device": "cpu", "recipe": "sp8192_sdclip", "eval_rule": "once"})
    text = bench_evaluation.make_text(config.vocab_size, 200, seed=3)
    alone = bench_evaluation.golf_run(random_model(config, torch.device("cpu")), config, True)(text)
    processes = bench_evaluation.Processes(config, 2)
    try:
        nats, size = processes(text)
    finally:
        processes.close()
    assert torch.equal(size, alone[1])
    assert torch.allclose(nats, alone[0], rtol=1e-6, atol=0)


def test_seconds_of_the_validation_text_by_hand():
    rows = [{"impl": "published", "p50": 8000.0, "tflops": 100.0}, {"impl": "golf", "p50": 2000.0, "tflops": 400.0}]
    lines = bench_evaluation.describe_rows(rows, 400_000, common.Ceilings(800.0, 4000.0), 40_000_000, on_gpu=True)
    # 50,000 and 200,000 tokens per second, on eight devices
    assert lines == [
        "published: 50,000 tokens/s, 1.00 x published, 12% of the matrix rate; "
        "computed: 100.0 s for the validation text on 8 such devices",
        "golf: 200,000 tokens/s, 4.00 x published, 50% of the matrix rate (goals: 2 x, 45 %); "
        "computed: 25.0 s for the validation text on 8 such devices",
    ]


@pytest.mark.parametrize(
    ("vocab_size", "mlp_mult", "mflop", "saved"),
    [(4096, 4.0, 90.7, 12.3), (8192, 4.0, 94.9, 16.0), (1024, 3.0, 76.0, 9.2)],
)
def test_arithmetic_of_a_window(vocab_size, mlp_mult, mflop, saved):
    # eleven layers without repeats and tables: 2 · 63.4 M or 51.9 M weights, 23.1 MF attention, and the head
    config = Config(vocab_size=vocab_size, num_layers=11, mlp_mult=mlp_mult, train_seq_len=2048, eval_seq_len=2048)
    whole = window_flops(config, 2048)
    assert whole / 2048 / 1e6 == pytest.approx(mflop, abs=0.05)
    # of the last layer and the head only 64 rows
    pruned = window_flops(config, 64)
    assert 100 * (1 - pruned / whole) == pytest.approx(saved, abs=0.15)


@pytest.mark.parametrize(("system", "saved"), [("sp8192_sdclip", 1.04), ("sp1024_smear_bigram", 0.0)])
def test_layer_0_counts_once_per_token_where_windows_may_share_it(system, saved):
    config = load_recipe(system).config(device="cpu", eval_rule="once")
    # 1.11 of a token's 103.4 MFLOP in 31 of 32 windows; the gate of the other system reads a predecessor that a window's
    # first token does not have
    with torch.device("meta"):
        model = GPT(config)
    targets = 2048 + 64 * 9_999
    alone = 10_000 * window_flops(config, 64)
    shared = bench_evaluation.text_flops(model, config, targets)
    assert 100 * (1 - shared / alone) == pytest.approx(saved, abs=0.01)
    assert alone - shared == (2 * (10_000 * 2048 - targets) * (512 * 1024 + 128 * 256) if saved else 0)


def test_a_variant_with_a_wrong_result_has_no_time():
    config = Config(**(load_recipe("sp8192_sdclip").settings | NARROW | {"device": "cpu", "eval_rule": "once"}))
    config = config.replace(logits_rounding="none", recipe="sp8192_sdclip")
    model = random_model(config, torch.device("cpu"))
    case = bench_evaluation.make_case(model, config, 280)
    right = bench_evaluation.golf_run(model, config, share_layer0=True)

    def wrong(text):
        nats, size = right(text)
        return [nats, size + 1]

    clock = common.Clock(torch.device("cpu"), 1.0, 1)
    with pytest.raises(common.CheckFailed, match="evaluation, wrong"):
        common.measure(case, [common.Variant("wrong", wrong)], clock, common.Ceilings(1.0, 1.0))
