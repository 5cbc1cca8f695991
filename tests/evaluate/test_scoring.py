"""Sums and counts against a plain loop, shapes, ranks, progress and refusals."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plain_evaluation import plain_score, plain_windows
from scoring_example import CONFIG, VOCAB, StandIn, make_text
from torch import Tensor

from train.common.errors import UserError
from train.evaluate import scoring
from train.evaluate.scores import evaluation_entry
from train.evaluate.scoring import flat_evaluation

# several batches for a short text
evaluate_model = partial(scoring.evaluate_model, batch_seqs=4)


@pytest.mark.parametrize("rule", ["once", "overlap_tail", "full_windows"])
@pytest.mark.parametrize(
    ("count", "seq_len", "stride"),
    [
        (97, 16, 1),
        (97, 16, 4),
        (99, 16, 4),
        (98, 16, 16),
        (83, 16, 0),
        (201, 64, 64),
        (130, 64, 24),
        (10, 16, 4),
        (2, 16, 1),
        (17, 16, 4),
    ],
)
def test_scores_equal_the_plain_loop(rule: str, count: int, seq_len: int, stride: int) -> None:
    tokens, sizes = make_text(count, seed=count)
    model = StandIn()
    if rule == "full_windows" and stride and count - 1 < seq_len:
        with pytest.raises(UserError, match="no window of"):
            evaluate_model(model, tokens, sizes, CONFIG, seq_len=seq_len, stride=stride, rule=rule)
        return
    nats, scored, size = plain_score(model, tokens, sizes, seq_len, stride, rule, CONFIG.logit_softcap)
    result = evaluate_model(model, tokens, sizes, CONFIG, seq_len=seq_len, stride=stride, rule=rule)
    assert (result.tokens, result.bytes) == (scored, size)
    assert result.val_loss == pytest.approx(nats / scored, rel=1e-6)
    assert result.val_bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert result.windows == len(list(plain_windows(count - 1, seq_len, stride, rule)))


def test_settings_come_from_the_config_unless_given() -> None:
    tokens, sizes = make_text(90)
    model = StandIn()
    config = CONFIG.replace(eval_seq_len=16, eval_stride=4, eval_rule="overlap_tail", logit_softcap=2.0)
    result = evaluate_model(model, tokens, sizes, config, max_tokens=50)
    nats, scored, size = plain_score(model, tokens[:51], sizes, 16, 4, "overlap_tail", 2.0)
    assert (result.tokens, result.bytes) == (scored, size)
    assert result.val_loss == pytest.approx(nats / scored, rel=1e-6)
    given_zero = evaluate_model(model, tokens, sizes, config, stride=0, seq_len=8)
    assert (given_zero.tokens, given_zero.windows) == (89, 12)
    rounded = evaluate_model(model, tokens, sizes, config.replace(logits_rounding="bf16"), max_tokens=50)
    assert rounded.val_loss != result.val_loss
    assert rounded.val_loss == pytest.approx(result.val_loss, rel=1e-2)


def test_only_overlapping_windows_round_after_the_softcap() -> None:
    tokens, sizes = make_text(90)
    losses, said = {}, {}
    for rounding in ("none", "bf16", "bf16_capped", "bf16_each"):
        for stride in (0, 4):
            config = CONFIG.replace(logits_rounding=rounding, eval_seq_len=16, eval_stride=stride)
            result = evaluate_model(StandIn(), tokens, sizes, config)
            losses[rounding, stride] = result.val_loss
            said[rounding, stride] = evaluation_entry(result, config, weights="artifact")["logits_rounding"]
    assert losses["bf16", 0] == losses["bf16_capped", 0] == losses["bf16_each", 0] != losses["none", 0]
    assert len({loss for (_, stride), loss in losses.items() if stride}) == 4
    assert all(said[rounding, 4] == rounding for rounding, _ in said)
    assert [said[rounding, 0] for rounding in ("none", "bf16", "bf16_capped", "bf16_each")] == ["none", *["bf16"] * 3]


def test_shapes_are_static_and_batches_even() -> None:
    tokens, sizes = make_text(120)
    model = StandIn()
    evaluate_model(model, tokens, sizes, CONFIG, seq_len=16, stride=4, batch_seqs=26)
    # the first window scores all its positions; the 26 others go in one batch
    assert [tuple(ids.shape) for ids in model.seen] == [(1, 16), (26, 16)]
    assert model.rows_from == [0, 12]
    model = StandIn()
    evaluate_model(model, tokens, sizes, CONFIG, seq_len=16, stride=4, batch_seqs=25)
    # in two batches of 13
    assert [tuple(ids.shape) for ids in model.seen] == [(1, 16), (13, 16), (13, 16)]


def test_the_model_sees_each_window_padded_with_zeros() -> None:
    tokens, sizes = make_text(24)
    # without zeros of its own, so that every zero is padding
    tokens = (tokens % (VOCAB - 1) + 1).astype(np.uint16)
    model = StandIn()
    evaluate_model(model, tokens, sizes, CONFIG, seq_len=16, stride=4, batch_seqs=2)
    inputs = tokens[:23].tolist()
    windows = [inputs[0:16], inputs[4:20], [*inputs[8:23], 0]]
    assert torch.cat(model.seen).tolist() == windows
    model = StandIn()
    evaluate_model(
        model, np.append(tokens, tokens[:4]), np.append(sizes, sizes[:4]), CONFIG, seq_len=16, stride=4, batch_seqs=2
    )
    # a window of nothing makes the last batch as long as the others
    assert torch.cat(model.seen)[-1].tolist() == [0] * 16 and len(model.seen) == 3


def test_recurrence_flag_and_training_mode() -> None:
    tokens, sizes = make_text(40)
    model = StandIn().train()
    evaluate_model(model, tokens, sizes, CONFIG, seq_len=16, stride=4, recurrence=False)
    assert model.modes == {(False, False)} and model.training
    evaluate_model(model.eval(), tokens, sizes, CONFIG, seq_len=16, stride=4)
    assert model.modes == {(False, False), (True, False)} and not model.training


def test_flat_evaluation_takes_the_training_rows() -> None:
    tokens, sizes = make_text(100)
    model, plain = StandIn(), StandIn()
    config = CONFIG.replace(train_seq_len=16, train_batch_tokens=128, eval_stride=4)
    result = flat_evaluation(model, tokens, sizes, config)
    nats, scored, size = plain_score(plain, tokens, sizes, 16, 0, "once", config.logit_softcap)
    assert (result.tokens, result.bytes, result.windows) == (99, size, 7)
    assert result.val_loss == pytest.approx(nats / scored, rel=1e-6)
    assert model.shapes == {(7, 16)}


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("count", [100, 20])
def test_ranks_split_the_windows_by_count_and_their_sums_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, world_size: int, count: int
) -> None:
    tokens, sizes = make_text(count)
    whole = evaluate_model(StandIn().double(), tokens, sizes, CONFIG, seq_len=16, stride=4)
    sums: list[list[float]] = []

    def record(tensor: Tensor) -> None:
        sums[-1] += tensor.reshape(-1).tolist()
        # stands for what the other ranks would add
        tensor.add_(1)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", record)
    for rank in range(world_size):
        sums.append([])
        evaluate_model(
            StandIn().double(), tokens, sizes, CONFIG, seq_len=16, stride=4, rank=rank, world_size=world_size
        )
    nats, scored, size = (sum(column) for column in zip(*sums, strict=True))
    assert (scored, size) == (whole.tokens, whole.bytes)
    assert nats == pytest.approx(whole.val_loss * whole.tokens, rel=1e-12)
    # the first window scores 16 tokens, each further one 4, the last one what is left
    counts = [row[1] for row in sums]
    opening = next(rank for rank, count in enumerate(counts) if count)
    counts[opening] -= 12
    shares = [math.ceil(count / 4) for count in counts]
    assert sum(shares) == whole.windows and max(shares) - min(shares) <= 1


def test_several_ranks_without_a_process_group_are_refused() -> None:
    tokens, sizes = make_text(50)
    with pytest.raises(RuntimeError, match="init_process_group"):
        evaluate_model(StandIn(), tokens, sizes, CONFIG, seq_len=16, stride=4, world_size=2)


def test_texts_that_cannot_be_scored_are_refused() -> None:
    tokens, sizes = make_text(50)
    with pytest.raises(UserError, match="nothing to score"):
        evaluate_model(StandIn(), tokens[:1], sizes, CONFIG, seq_len=16, stride=4)
    with pytest.raises(UserError, match="nothing to score"):
        evaluate_model(StandIn(), tokens[:0], sizes, CONFIG, seq_len=16, stride=4)
    with pytest.raises(UserError, match=f"{VOCAB}"):
        evaluate_model(StandIn(), np.array([1, 2, VOCAB], np.uint16), sizes, CONFIG, seq_len=16, stride=4)
    with pytest.raises(UserError, match="no bytes"):
        evaluate_model(StandIn(), np.array([1, 1, 1], np.uint16), np.zeros(2, np.uint16), CONFIG, seq_len=16, stride=4)


def test_progress_shows_the_running_bpb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.common.progress.FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr("train.common.progress.LINE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("train.evaluate.scoring.NOTE_INTERVAL_SECONDS", 0.0)
    tokens, sizes = make_text(90)
    result = evaluate_model(StandIn(), tokens, sizes, CONFIG, seq_len=16, stride=4, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("evaluate: 89/89 tokens (100 %)")
    assert f", bpb {result.val_bpb:.4f}, " in lines[-1]
    evaluate_model(StandIn(), tokens, sizes, CONFIG, seq_len=16, stride=4)
    assert capsys.readouterr().out == ""
