"""Which positions each rule scores: the published counts, and the published table read literally."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_evaluation import plain_windows

from train.common.errors import UserError
from train.evaluate.windows import group_windows, plan_windows


@pytest.mark.parametrize(
    ("targets", "seq_len", "overlap_tail", "once"),
    [(62_021_632, 2048, 969_088, 969_057), (45_508_608, 2048, 711_072, 711_041), (40_540_160, 2048, 633_440, 633_409)],
)
def test_published_window_counts(targets: int, seq_len: int, overlap_tail: int, once: int) -> None:
    old, new = plan_windows(targets, seq_len, 64, "overlap_tail"), plan_windows(targets, seq_len, 64, "once")
    assert (len(old.start), old.scored) == (overlap_tail, targets + 1_984)
    assert (len(new.start), new.scored) == (once, targets)
    assert old.start.dtype == new.length.dtype == new.score_from.dtype == np.int64


def test_published_counts_of_the_rule_with_full_windows() -> None:
    plan = plan_windows(50_905_088, 4096, 64, "full_windows")
    assert (len(plan.start), plan.scored) == (795_329, 50_901_056)
    assert int(plan.score_from[0]) == 4_032 and 50_905_088 - plan.scored == 4_032


def test_flat_rows_of_the_published_validation_set() -> None:
    plan = plan_windows(62_021_632, 2048, 0)
    assert (len(plan.start), plan.scored) == (30_284, 62_021_632)


@pytest.mark.parametrize(("targets", "chunks"), [(62_021_632, 1_893), (45_508_608, 1_389), (40_540_160, 1_238)])
def test_published_chunks_of_32768(targets: int, chunks: int) -> None:
    plan = plan_windows(targets, 32_768, 0)
    assert (len(plan.start), plan.scored) == (chunks, targets)


@given(total=st.integers(1, 60), seq_len=st.integers(1, 20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_rule_scores_the_targets_it_promises(total: int, seq_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(0, seq_len))
    for rule in ("once", "overlap_tail", "full_windows"):
        if rule == "full_windows" and stride and total < seq_len:
            with pytest.raises(UserError, match="no window of"):
                plan_windows(total, seq_len, stride, rule)
            continue
        plan = plan_windows(total, seq_len, stride, rule)
        found = [
            (start, list(range(start + score_from, start + length)))
            for start, length, score_from in zip(*plan, strict=True)
        ]
        assert found == list(plain_windows(total, seq_len, stride, rule))
        times = np.bincount([target for _, targets in found for target in targets], minlength=total)
        if rule == "once" or stride == 0:
            assert times.tolist() == [1] * total
        elif rule == "overlap_tail":
            assert times.min() == 1


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((0, 8, 2, "once"), "nothing to score"),
        ((10, 8, 9, "once"), "stride: expected 0"),
        ((10, 8, -1, "once"), "stride: expected 0"),
        ((10, 8, 2, "twice"), "rule: expected one of once, overlap_tail, full_windows"),
    ],
)
def test_bad_plans_are_refused(arguments: tuple[int, int, int, str], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        plan_windows(*arguments)


@given(total=st.integers(1, 60), seq_len=st.integers(1, 20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_groups_hold_every_window_once_and_cut_off_nothing_scored(
    total: int, seq_len: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(0, seq_len))
    rule = data.draw(st.sampled_from(["once", "overlap_tail"]))
    plan = plan_windows(total, seq_len, stride, rule)
    groups = group_windows(plan, seq_len, stride)
    assert 1 <= len(groups) <= 2 and all(len(group.windows.start) for group in groups)
    together = sorted(row for group in groups for row in zip(*group.windows, strict=True))
    assert together == list(zip(*plan, strict=True))
    assert all((group.windows.score_from >= group.rows_from).all() for group in groups)


@pytest.mark.parametrize(("rule", "whole"), [("once", 1), ("overlap_tail", 32), ("full_windows", 0)])
def test_nearly_all_windows_of_a_published_evaluation_need_their_last_rows_alone(rule: str, whole: int) -> None:
    plan = plan_windows(45_508_608, 2048, 64, rule)
    sizes = {group.rows_from: len(group.windows.start) for group in group_windows(plan, 2048, 64)}
    # the first window, and under overlap_tail the partial ones at the end
    assert sizes == ({0: whole} if whole else {}) | {1984: len(plan.start) - whole}
