"""What is measured next and which kernels run, from made findings."""

from typing import Any

from benchmarks.decide import Candidate, attention_decisions, decisions, failed, next_measurements

FAST, SLOW_IN_STEP, WRONG, LOSER = (
    Candidate(name, "triton", in_step=True, has_bench=True) for name in ("fast", "slow_in_step", "wrong", "loser")
)
NATIVE = Candidate("native", "cuda", in_step=False, has_bench=True)
ALL = [FAST, SLOW_IN_STEP, WRONG, LOSER, NATIVE]


def times(**medians: float) -> dict[str, Any]:
    return {"verdict": "ok", "times": {name: [0.99 * ms, ms, 1.01 * ms] for name, ms in medians.items()}}


def names(findings: dict[str, Any]) -> list[str]:
    return [one.name for one in next_measurements(ALL, findings)]


CHECKS = {f"check {c.op} {c.backend}": {"verdict": "error 3.0e-01, at most 5e-02" if c is WRONG else "ok"} for c in ALL}
CALLS = {
    "call fast": times(torch=3.0, compile=2.0, triton=1.0),
    "call slow_in_step": times(torch=3.0, compile=2.0, triton=1.0),
    "call loser": times(torch=3.0, compile=2.0, triton=2.0),
    "call native": times(torch=4.0, cuda=1.0),
}
STEPS = {"step fast": times(torch=100.0, fast=90.0), "step slow_in_step": times(torch=100.0, slow_in_step=104.0)}


ATTENTION = {
    f"attention {batch}": {"verdict": "ok", "shape": batch, "times": {}} for batch in ("training", "evaluation")
}


def test_checks_come_first_then_calls_then_steps_of_what_won() -> None:
    assert names({}) == [f"check {c.op} {c.backend}" for c in ALL]
    assert names(CHECKS) == ["call fast", "call slow_in_step", "call loser", "call native"]
    # a kernel whose check failed is not measured, and one that lost as a call is not tried in the step
    assert names(CHECKS | CALLS) == [*ATTENTION]
    assert names(CHECKS | CALLS | ATTENTION) == ["step fast", "step slow_in_step"]
    assert names(CHECKS | CALLS | ATTENTION | STEPS) == []
    # what was interrupted comes again
    assert names(CHECKS | {name: CALLS[name] for name in CALLS if name != "call loser"}) == ["call loser"]


def test_each_decision_has_its_reason() -> None:
    found = decisions(ALL, CHECKS | CALLS | STEPS)
    assert found["fast"] == {
        "call": {"backend": "triton", "reason": "2.00 x torch.compile"},
        "step": {"backend": "triton", "reason": "1.11 x in the step"},
    }
    assert found["slow_in_step"] == {
        "call": {"backend": "triton", "reason": "2.00 x torch.compile"},
        "step": {"backend": "torch", "reason": "triton is 0.96 x in the step"},
    }
    refused = {"backend": "torch", "reason": "triton's check failed: error 3.0e-01, at most 5e-02"}
    assert found["wrong"] == {"call": refused, "step": refused}
    assert found["loser"]["call"] == {"backend": "torch", "reason": "triton is 1.00 x torch.compile"}
    assert found["loser"]["step"]["backend"] == "torch"
    # it is no part of the step, so the run takes what calls take
    assert found["native"]["step"] == found["native"]["call"] == {"backend": "cuda", "reason": "4.00 x torch"}
    assert [c.op for c in ALL if failed(c, CHECKS)] == ["wrong"]


def test_the_fastest_variant_of_a_kernel_goes_on() -> None:
    call = {"call fast": times(torch=3.0, compile=2.0, triton=2.5)}
    call["call fast"]["times"] |= {"triton/big": [0.9, 1.0, 1.1], "triton/small": [1.1, 1.2, 1.3]}
    (step, *_) = next_measurements([FAST], CHECKS | ATTENTION | call)
    assert step.name == "step fast" and step.candidate == FAST._replace(backend="triton/big")
    decided = decisions([FAST], CHECKS | call | STEPS)["fast"]
    assert decided == {
        "call": {"backend": "triton/big", "reason": "2.00 x torch.compile"},
        "step": {"backend": "triton/big", "reason": "1.11 x in the step"},
    }


def test_nothing_is_decided_that_was_not_measured() -> None:
    assert decisions(ALL, {}) == {}
    assert set(decisions(ALL, CHECKS)) == {"wrong"}
    assert "step" not in decisions(ALL, CHECKS | CALLS)["fast"]


def test_attention_is_the_fastest_backend_of_each_batch() -> None:
    findings = {
        "attention training": times(cudnn=1.25, sdpa=2.0) | {"shape": "48x2048 bfloat16"},
        "attention evaluation": {"verdict": "stopped after 120 s"},
    }
    reason = "fastest, ms forward + backward: cudnn 1.250, sdpa 2.000"
    assert attention_decisions(findings) == {"48x2048 bfloat16": {"backend": "cudnn", "reason": reason}}


def test_a_measurement_that_crashed_or_hung_leaves_pytorch() -> None:
    findings = CHECKS | CALLS | {"call native": {"verdict": "killed by SIGSEGV: no output"}}
    assert decisions(ALL, findings)["native"]["call"] == {
        "backend": "torch",
        "reason": "cuda was not measured: killed by SIGSEGV: no output",
    }
    steps = STEPS | {"step fast": {"verdict": "stopped after 240 s"}}
    assert decisions(ALL, CHECKS | CALLS | steps)["fast"]["step"] == {
        "backend": "torch",
        "reason": "the step with triton failed: stopped after 240 s",
    }


def test_a_difference_within_the_spread_is_no_win() -> None:
    close = {"verdict": "ok", "times": {"torch": [99.0, 100.0, 101.0], "fast": [98.0, 99.0, 99.5]}}
    assert decisions(ALL, CHECKS | CALLS | STEPS | {"step fast": close})["fast"]["step"]["backend"] == "torch"


def test_winners_are_measured_together_and_one_that_does_not_pay_is_dropped() -> None:
    steps = STEPS | {"step slow_in_step": times(torch=100.0, slow_in_step=95.0)}
    found = CHECKS | CALLS | ATTENTION | steps
    (together,) = next_measurements(ALL, found)
    assert together.name == "step all" and together.kernels == ("fast", "slow_in_step")
    found |= {"step all": times(torch=100.0, all=91.0)}
    # the one that gained least alone comes first
    (doubted,) = next_measurements(ALL, found)
    assert (doubted.name, doubted.kernels, doubted.without) == (
        "step all without slow_in_step",
        ("fast", "slow_in_step"),
        "slow_in_step",
    )
    found |= {"step all without slow_in_step": times(all=91.0, without=90.0)}
    (last,) = next_measurements(ALL, found)
    assert last.name == "step all without fast" and last.kernels == ("fast",)
    found |= {"step all without fast": times(all=90.0, without=100.0)}
    assert next_measurements(ALL, found) == []
    decided = decisions(ALL, found)
    assert decided["fast"]["step"] == {"backend": "triton", "reason": "1.11 x in the step"}
    assert decided["slow_in_step"]["step"] == {
        "backend": "torch",
        "reason": "triton is 1.05 x in the step alone, 0.99 x beside the others",
    }


def test_where_the_winners_fail_together_the_best_runs_alone() -> None:
    steps = STEPS | {"step slow_in_step": times(torch=100.0, slow_in_step=95.0)}
    decided = decisions(ALL, CHECKS | CALLS | steps | {"step all": {"verdict": "exit code 1: out of memory"}})
    assert decided["fast"]["step"]["backend"] == "triton"
    assert decided["slow_in_step"]["step"]["reason"] == "the step with all winners failed: exit code 1: out of memory"
