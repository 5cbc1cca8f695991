"""The clock of training against a hand-driven one, and the seconds before the first step, part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from train.run import clocks
from train.run.clocks import StartUp, WallClock


@dataclass
class Hand:
    """A clock whose hand the test moves."""

    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_one_process_stops_with_the_first_step_that_reaches_the_cap() -> None:
    hand = Hand()
    clock = WallClock(1.0, now=hand)
    clock.resume()
    elapsed = []
    stop = False
    while not stop:
        hand.seconds += 0.3
        stop = clock.tick()
        elapsed.append(clock.elapsed_seconds)
    assert clock.steps == 4
    assert elapsed == pytest.approx([0.3, 0.6, 0.9, 1.2])


def test_validation_does_not_count() -> None:
    hand = Hand()
    clock = WallClock(2.0, now=hand)
    hand.seconds += 50
    clock.resume()
    hand.seconds += 0.75
    assert not clock.tick()
    hand.seconds += 0.25
    assert clock.pause() == pytest.approx(1.0)
    hand.seconds += 1000
    assert clock.elapsed_seconds == pytest.approx(1.0)
    clock.resume()
    hand.seconds += 0.75
    assert not clock.tick()
    assert clock.elapsed_seconds == pytest.approx(1.75)
    hand.seconds += 0.25
    assert clock.tick()
    assert clock.pause() == pytest.approx(2.0)


def test_a_clock_that_jumps_back_does_not_keep_training_from_ending() -> None:
    hand = Hand()
    clock = WallClock(1.0, now=hand)
    hand.seconds = 1e6
    clock.resume()
    stops = []
    for _ in range(5):
        hand.seconds += 0.3
        stops.append(clock.tick())
        # 0.3 s are lost, a day is not waited for
        hand.seconds -= 86_400 * (len(stops) == 2)
    assert stops == [False, False, False, False, True]
    assert clock.pause() == pytest.approx(1.2)


def test_no_cap_never_stops_and_a_checkpoint_goes_on() -> None:
    hand = Hand()
    clock = WallClock(0.0, now=hand)
    clock.resume()
    hand.seconds += 1e9
    assert not clock.tick()
    resumed = WallClock(10.0, elapsed_seconds=9.5, steps=19, now=hand)
    assert resumed.elapsed_seconds == 9.5
    resumed.resume()
    hand.seconds += 0.5
    assert resumed.tick()
    assert (resumed.steps, resumed.elapsed_seconds) == (20, pytest.approx(10.0))


def test_calls_in_the_wrong_order_are_refused() -> None:
    clock = WallClock(1.0)
    for call in (clock.tick, clock.pause):
        with pytest.raises(RuntimeError, match="is paused"):
            call()
    clock.resume()
    with pytest.raises(RuntimeError, match="is running"):
        clock.resume()


@dataclass
class Reductions:
    """Stands in for the process group: every all-reduce yields what the slower rank measured, and counts its wait."""

    hand: Hand
    slower_by: float
    waits: list[int] = field(default_factory=list)
    started: int = 0

    def all_reduce(
        self, tensor: torch.Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM, group: object = None, async_op: bool = False
    ) -> object:
        if not async_op:
            # the other rank is still busy with something that is not training
            self.hand.seconds += 7.0
            return None
        assert op == dist.ReduceOp.MAX
        self.started += 1
        number, reductions = self.started, self

        class Work:
            def wait(self) -> None:
                tensor.add_(reductions.slower_by)
                reductions.waits.append(number)

        return Work()


def test_ranks_wait_only_for_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand()
    reductions = Reductions(hand, slower_by=0.05)
    monkeypatch.setattr("torch.distributed.all_reduce", reductions.all_reduce)
    clock = WallClock(1.0, group=object(), now=hand)
    clock.resume()
    for step in range(1, 100):
        hand.seconds += 0.25
        stop = clock.tick()
        # the reduction of this step is under way, and only the one before has been waited for
        assert (reductions.started, len(reductions.waits)) == (step, step - 1)
        if step == 1:
            assert clock.elapsed_seconds == 0.0
        else:
            known = (step - 1) * 0.25 + 0.05
            assert clock.elapsed_seconds == pytest.approx(known * step / (step - 1))
        if stop:
            break
    # at the end of step 4 the slower rank is at 1.05 s; carried forward from step 3 that is 1.067
    assert step == 4 and math.isclose(clock.elapsed_seconds, 0.8 * 4 / 3)
    assert clock.pause() == pytest.approx(1.05)
    assert reductions.waits == [1, 2, 3, 4, 5]


def test_on_a_gpu_the_host_waits_only_for_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # a stand-in for the device: each step takes 0.25 s there, while the host queues them at once
    device = {"seconds": 10.0, "waited": [], "synchronized": 0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.seconds = device["seconds"]

        def synchronize(self) -> None:
            device["waited"].append(self.seconds - 10.0)

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.seconds - self.seconds)

    def synchronize(device_: object) -> None:
        device["synchronized"] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    clock = WallClock(1.0, device="cuda")
    clock.resume()
    stop = False
    while not stop:
        device["seconds"] += 0.25
        stop = clock.tick()
        steps = clock.steps
        assert device["waited"] == pytest.approx([0.25 * step for step in range(1, steps)])
        assert clock.elapsed_seconds == pytest.approx(0.25 * steps if steps > 1 else 0.0)
    assert (clock.steps, device["synchronized"]) == (4, 0)
    assert clock.pause() == pytest.approx(1.0)
    assert device["synchronized"] == 1


def test_phases_before_the_first_step_follow_each_other_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_IMPORTED", 100.0)
    start = StartUp(torch.device("cpu"), iter([108.0, 111.5, 160.0]).__next__)
    start.end("data and model")
    start.end("compilation and warm-up")
    assert start.phases == {"start": 8.0, "data and model": 3.5, "compilation and warm-up": 48.5}
    assert (
        str(start) == "time before the first step: 60.0 s (start 8.0, data and model 3.5, compilation and warm-up 48.5)"
    )
