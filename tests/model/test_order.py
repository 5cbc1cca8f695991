from __future__ import annotations

import pytest
from model_systems import SYSTEMS

from train.config import Config
from train.model.order import halves, make_plan, skip_count, virtual_order

SP4096, SP8192 = Config(**SYSTEMS["sp4096"]), Config(**SYSTEMS["sp8192"])


def taken(config: Config, *, recurrence: bool) -> list[tuple[int, int, int]]:
    """(row of the weights, layer that put the skip out, layer that takes it)."""
    plan = make_plan(config, recurrence=recurrence)
    return [(step.skip[0], plan[step.skip[1]].layer, step.layer) for step in plan if step.skip is not None]


def test_unrolled_order_is_the_published_one() -> None:
    assert halves(SP8192, recurrence=False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert halves(SP8192, recurrence=True) == ([0, 1, 2, 3, 4, 5, 3], [4, 5, 6, 7, 8, 9, 10])
    assert virtual_order(SP8192, recurrence=True) == (0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)


def test_unrolled_skips_shift_at_activation_and_end_where_lanes_begin() -> None:
    assert taken(SP8192, recurrence=False) == [(0, 4, 5), (1, 3, 6), (2, 2, 7)]
    assert taken(SP8192, recurrence=True) == [(0, 3, 4), (1, 5, 5), (2, 4, 6), (3, 3, 7)]
    # the first of the four comes from the second run of layer 3
    assert make_plan(SP8192, recurrence=True)[7].skip == (0, 6)


def test_lanes_begin_at_the_first_decoder_layer_and_never_end() -> None:
    for recurrence in (False, True):
        forms = [step.form for step in make_plan(SP8192, recurrence=recurrence)]
        assert forms == ["serial"] * (len(forms) - 4) + ["lanes"] * 4
    # a repeat from below the first parallel layer stays in the lanes
    across = Config(num_layers=11, parallel_start_layer=7, parallel_form="lanes", recur_layers=(6, 7))
    assert virtual_order(across, recurrence=True)[6:9] == (6, 7, 6)
    assert [step.form for step in make_plan(across, recurrence=True)][6:] == ["serial"] + ["lanes"] * 6
    early = Config(num_layers=6, parallel_start_layer=1, parallel_form="lanes", recur_layers=(3, 4))
    assert [step.form for step in make_plan(early, recurrence=False)] == ["serial"] * 3 + ["lanes"] * 3
    assert [step.form for step in make_plan(early, recurrence=True)] == ["serial"] * 4 + ["lanes"] * 4


def test_blend_repeats_encoder_layers_alone_and_keeps_every_skip() -> None:
    assert virtual_order(SP4096, recurrence=True) == (0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10)
    expected = [(0, 4, 5), (1, 3, 6), (2, 2, 7), (3, 1, 8), (4, 0, 9)]
    assert taken(SP4096, recurrence=False) == taken(SP4096, recurrence=True) == expected
    plan = make_plan(SP4096, recurrence=True)
    # the skip is what the layer put out before its repeat
    assert plan[6].skip == (0, 4) and plan[4].blend is None and plan[5].blend == 0
    assert [step.form for step in plan] == ["serial"] * 8 + ["gptj"] * 4


def test_only_outputs_that_are_taken_up_are_saved() -> None:
    for config in (SP4096, SP8192, Config(num_layers=9), Config(num_layers=8)):
        for recurrence in (False, True):
            plan = make_plan(config, recurrence=recurrence)
            sources = {step.skip[1] for step in plan if step.skip is not None}
            assert {index for index, step in enumerate(plan) if step.saves} == sources


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, []), (2, [(0, 0, 1)]), (8, [(0, 3, 4), (1, 2, 5), (2, 1, 6), (3, 0, 7)]), (9, [(0, 3, 4), (1, 2, 5), (2, 1, 6), (3, 0, 7)])],
)  # fmt: skip
def test_plain_skips_pair_the_halves_from_the_inside(layers: int, expected: list[tuple[int, int, int]]) -> None:
    config = Config(num_layers=layers)
    assert skip_count(config) == layers // 2
    assert taken(config, recurrence=False) == taken(config, recurrence=True) == expected


def test_three_passes_and_eight_skips_are_those_of_1493() -> None:
    config = SP8192.replace(num_loops=2, skip_rows=8, parallel_start_layer=-1)
    assert halves(config, recurrence=False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert halves(config, recurrence=True) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    # before the loops rows 5 to 7 serve no layer, then the last layer takes none
    assert taken(config, recurrence=False) == [(0, 4, 5), (1, 3, 6), (2, 2, 7), (3, 1, 8), (4, 0, 9)]
    pairs = [(4, 5), (3, 3), (5, 4), (4, 5), (3, 6), (2, 7), (1, 8), (0, 9)]
    assert taken(config, recurrence=True) == [(row, *pair) for row, pair in enumerate(pairs)]
    # two rows alone
    assert taken(config.replace(skip_rows=2), recurrence=False) == [(0, 4, 5), (1, 3, 6)]
    # #1394: the loop 4, 5 twice more
    looped = halves(Config(num_layers=11, recur_layers=(4, 5), num_loops=2), recurrence=True)
    assert looped == ([0, 1, 2, 3, 4, 5, 4], [5, 4, 5, 6, 7, 8, 9, 10])


def test_routed_lanes_take_skips() -> None:
    config = SP8192.replace(num_loops=2, skip_rows=8, parallel_start_layer=8, parallel_form="routed")
    assert taken(config, recurrence=False)[-2:] == [(3, 1, 8), (4, 0, 9)]
    assert taken(config, recurrence=True)[-2:] == [(6, 1, 8), (7, 0, 9)]
    assert [step.form for step in make_plan(config, recurrence=True)] == ["serial"] * 14 + ["routed"] * 3


@pytest.mark.parametrize(("recur", "order"), [((4, 5), "0 1 2 3 4 5 4 5 6 7 8 9 10"), ((0,), "0 0 1 2 3 4 5 6 7 8 9 10"), ((10,), "0 1 2 3 4 5 6 7 8 9 10 10")])  # fmt: skip
def test_any_run_of_layers_is_repeated_behind_itself(recur: tuple[int, ...], order: str) -> None:
    config = Config(num_layers=11, recur_layers=recur)
    assert virtual_order(config, recurrence=True) == tuple(map(int, order.split()))
    assert virtual_order(config, recurrence=False) == tuple(range(11))
