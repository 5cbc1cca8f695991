"""Bits per byte of a text: flat, or with a sliding window under one of the three published rules.

val_loss = Σ nll / tokens in nats per token; val_bpb = (Σ nll / ln 2) / Σ bytes. Sums are float64, counts are integers. The
head and the loss are computed for scored positions only; windows are index arrays, so no Python runs per window.
"""

from __future__ import annotations

import math
import time
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from golf_kernels import window_nll
from train.config import Config
from train.data.shards import check_tokens
from train.errors import UserError
from train.progress import Progress
from train.scores import EvalResult
from train.windows import WindowPlan, plan_windows

NOTE_INTERVAL_SECONDS = 0.5


class Scorable(Protocol):
    """What a model needs to be scored."""

    @property
    def head_weight(self) -> Tensor: ...

    def hidden(self, ids: Tensor, *, recurrence: bool) -> Tensor: ...


class ByteCounter(Protocol):
    """Bytes that targets stand for, given the tokens before them."""

    def count(self, previous: Tensor, target: Tensor) -> Tensor: ...


@torch.no_grad()
def evaluate_model(
    model: Scorable,
    tokens: np.ndarray,
    tables: ByteCounter,
    config: Config,
    *,
    stride: int | None = None,
    seq_len: int | None = None,
    rule: str | None = None,
    batch_seqs: int | None = None,
    max_tokens: int | None = None,
    recurrence: bool = True,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    description: str = "evaluate",
) -> EvalResult:
    """Score a text with a model.

    Args:
        model: has `hidden(ids (B, T) int64, recurrence=…) -> (B, T, d)` and `head_weight (V, d)`.
        tokens: `(T + 1,)` uint16, the first input and the T targets.
        tables: `count(previous, target)` int64 bytes.
        config: settings; the arguments below replace what it says.
        stride: new tokens per window; 0: flat.
        seq_len: window length; shorter windows are padded to it with zeros behind their end.
        rule: see `plan_windows`.
        batch_seqs: windows per forward pass.
        max_tokens: score only the text's first so many targets; 0: all.
        recurrence: passed on to the model.
        rank, world_size: this process's share of the windows; sums are reduced over `torch.distributed`.
        progress: show progress with the running bpb (of this rank's windows).
        description: what the progress calls this evaluation.

    Returns:
        The score, the same on every rank but for `seconds`.

    Raises:
        UserError: nothing to score, a token beyond the model's vocabulary, or targets that stand for no bytes.
    """
    started = time.perf_counter()
    stride = config.eval_stride if stride is None else stride
    seq_len = seq_len or config.window
    limit = config.eval_max_tokens if max_tokens is None else max_tokens
    total = len(tokens) - 1 if limit == 0 else min(len(tokens) - 1, limit)
    plan = plan_windows(total, seq_len, stride, rule or config.eval_rule)
    head = model.head_weight
    device = head.device
    stream = _resident(tokens[: total + 1], head.shape[0], device)
    windows = len(plan.start)
    first, last = windows * rank // world_size, windows * (rank + 1) // world_size
    share = WindowPlan(*(part[first:last] for part in plan))
    # equal batches: one static shape, and the last one wastes little
    batches = -(-(last - first) // (batch_seqs or config.eval_batch_seqs))
    batch = -(-(last - first) // max(batches, 1))
    padding = batches * batch - (last - first)
    starts, lengths, froms = (torch.from_numpy(np.pad(part, (0, padding))).to(device) for part in share)
    rows_before = np.concatenate([[0], np.cumsum(np.pad(share.length - share.score_from, (0, padding)))])
    columns = torch.arange(seq_len, device=device)
    nll_sum = torch.zeros((), dtype=torch.float64, device=device)
    byte_sum = torch.zeros((), dtype=torch.int64, device=device)
    training = bool(getattr(model, "training", False))
    if training:
        model.eval()  # type: ignore[attr-defined]
    try:
        with Progress(share.scored, description, "tokens", enabled=progress and rank == 0) as bar:
            shown, noted = 0, time.monotonic()
            for low in range(0, batches * batch, max(batch, 1)):
                start, length, score_from = (part[low : low + batch] for part in (starts, lengths, froms))
                scored = int(rows_before[low + batch] - rows_before[low])
                ids, window, position, at = _gather(stream, start, length, score_from, columns, scored)
                hidden = model.hidden(ids, recurrence=recurrence)[window, position]
                previous, target = stream[at].long(), stream[at + 1].long()
                nll = window_nll(
                    hidden, head, target, softcap=config.logit_softcap, logits_rounding=config.logits_rounding
                )
                nll_sum += nll.sum(dtype=torch.float64)
                byte_sum += tables.count(previous, target).sum()
                done = int(rows_before[low + batch])
                if time.monotonic() - noted >= NOTE_INTERVAL_SECONDS or low + batch == batches * batch:
                    bits = float(nll_sum) / math.log(2)
                    bar.advance(done - shown, f"bpb {bits / max(int(byte_sum), 1):.4f}")
                    shown, noted = done, time.monotonic()
    finally:
        if training:
            model.train()  # type: ignore[attr-defined]
    nll_total, token_total, byte_total = _reduce(nll_sum, share.scored, byte_sum, world_size)
    if byte_total == 0:
        raise UserError(
            f"the {token_total} scored tokens stand for no bytes: bits per byte needs text; give a longer one"
        )
    return EvalResult(
        val_loss=nll_total / token_total,
        val_bpb=nll_total / math.log(2) / byte_total,
        tokens=token_total,
        bytes=byte_total,
        windows=windows,
        seconds=time.perf_counter() - started,
    )


def _gather(
    stream: Tensor, start: Tensor, length: Tensor, score_from: Tensor, columns: Tensor, scored: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a batch of windows, and window, position and place in the stream of each of its scored rows."""
    inside = columns < length[:, None]
    places = (start[:, None] + columns).clamp(max=len(stream) - 2)
    ids = (stream[places] * inside).long()
    count = length - score_from
    numbers = torch.arange(len(start), device=stream.device)
    # the known size spares a wait for the device
    window = torch.repeat_interleave(numbers, count, output_size=scored)
    before = count.cumsum(0) - count
    position = torch.arange(scored, device=stream.device) - before[window] + score_from[window]
    return ids, window, position, start[window] + position


def _resident(tokens: np.ndarray, vocab_size: int, device: torch.device) -> Tensor:
    check_tokens(tokens, vocab_size, "the text to score")
    return torch.from_numpy(tokens.astype(np.int32)).to(device)


def _reduce(nll_sum: Tensor, tokens: int, byte_sum: Tensor, world_size: int) -> tuple[float, int, int]:
    """Sums over all ranks, as (nats, tokens, bytes)."""
    counts = torch.stack([byte_sum.new_tensor(tokens), byte_sum])
    if world_size > 1:
        if not dist.is_initialized():
            raise RuntimeError(f"world_size {world_size} needs torch.distributed: call init_process_group first")
        dist.all_reduce(nll_sum)
        dist.all_reduce(counts)
    return float(nll_sum), int(counts[0]), int(counts[1])


def flat_evaluation(
    model: Scorable,
    tokens: np.ndarray,
    tables: ByteCounter,
    config: Config,
    *,
    recurrence: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> EvalResult:
    """The validation inside training: rows of train_seq_len side by side, the first val_max_tokens of the text."""
    return evaluate_model(
        model,
        tokens,
        tables,
        config,
        stride=0,
        seq_len=config.train_seq_len,
        batch_seqs=max(config.val_batch_size // (world_size * config.train_seq_len), 1),
        max_tokens=config.val_max_tokens,
        recurrence=recurrence,
        rank=rank,
        world_size=world_size,
    )
