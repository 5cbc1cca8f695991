"""Scores a text in bits per byte, with windows that do not overlap or with a sliding window.

val_loss = Σ nll / tokens in nats per token; val_bpb = (Σ nll / ln 2) / Σ bytes. Sums are float64, counts are integers.

To save time:
- The text and the index arrays of the windows are on the device, so no Python code runs per window.
- The last layer (except its keys and values), the head and the loss skip the positions before the first scored one.
- If the model allows it, layer 0's queries, keys and values are computed once per token of a batch, not per window.
- All batches have the same shape, so the compiled model is captured once as a CUDA graph, which every batch replays.
  With `COMPILE=off` nothing is compiled or captured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from golf_kernels import window_nll
from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.progress import Progress
from train.config import Config
from train.data.dataset import Dataset
from train.data.shards import check_tokens
from train.evaluate.scores import EvalResult, evaluation_entry, rounding_of
from train.evaluate.windows import WindowPlan, group_windows, plan_windows
from train.model.compile import compiles, without_kernel, write_out

NOTE_INTERVAL_SECONDS = 0.5
# number of windows per forward pass
BATCH_SEQS = 32


class Scorable(Protocol):
    """A model that can be scored, such as `GPT`."""

    @property
    def head_weight(self) -> Tensor: ...

    def hidden(self, ids: Tensor, *, recurrence: bool, rows_from: int) -> Tensor: ...

    @property
    def overlap_problem(self) -> str | None: ...

    def overlapping_hidden(
        self, text: Tensor, *, windows: int, stride: int, recurrence: bool, rows_from: int
    ) -> Tensor: ...


@torch.no_grad()
def evaluate_model(
    model: Scorable,
    tokens: np.ndarray,
    target_bytes: np.ndarray,
    config: Config,
    *,
    stride: int | None = None,
    seq_len: int | None = None,
    rule: str | None = None,
    batch_seqs: int = BATCH_SEQS,
    max_tokens: int = 0,
    share_layer0: bool = True,
    known: np.ndarray | None = None,
    recurrence: bool = True,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    description: str = "evaluate",
) -> EvalResult:
    """Score a text with a model.

    Args:
        model: the model. Its `overlapping_hidden` is called only if its `overlap_problem` is None.
        tokens: `(T + 1,)` uint16, the first input and the T targets.
        target_bytes: `(T,)` uint16, number of bytes of text of each target.
        config: the settings. The arguments `stride`, `seq_len` and `rule`, if given, replace values of `config`.
        stride: new tokens per window; 0: windows do not overlap.
        seq_len: window length in tokens. Shorter windows at the end of the text are zero-padded.
        rule: name of the rule that says which positions of a window are scored, see `plan_windows`.
        batch_seqs: number of windows per forward pass.
        max_tokens: score only the first `max_tokens` targets; 0: all.
        share_layer0: compute embeddings and layer 0's queries, keys and values once per token of a batch, if possible.
        known: `(T,)` bool, true for targets of a paid prefix, which add bytes but no nats; None: no paid prefix.
        rank, world_size: this rank's number, and the number of ranks. The ranks divide the windows and add their sums.
        progress: whether to show the progress and this rank's bits per byte so far.
        description: label of the progress bar.

    Returns:
        The score. Only its `seconds` differ between ranks.

    Raises:
        UserError: there are no targets, a token is outside the vocabulary, or the scored targets have no bytes.
    """
    started = time.perf_counter()
    stride = config.eval_stride if stride is None else stride
    seq_len = seq_len or config.window
    total = min(len(tokens) - 1, max_tokens or len(tokens))
    plan = plan_windows(total, seq_len, stride, rule or config.eval_rule)
    windows = len(plan.start)
    own = WindowPlan(*(column[windows * rank // world_size : windows * (rank + 1) // world_size] for column in plan))
    problem = _sharing_problem(model, share_layer0, stride, seq_len)
    with _evaluating(model), Progress(own.scored, description, "tokens", enabled=progress and rank == 0) as bar:
        settings = config.replace(logits_rounding=rounding_of(config, stride))
        scorer = _Scorer(
            model, tokens[: total + 1], target_bytes[:total], settings, seq_len, recurrence, problem is None, known
        )
        shown, done, noted = 0, 0, time.monotonic()
        for windows_of_shape, rows_from in group_windows(own, seq_len, stride):
            for scored in scorer.score(windows_of_shape, rows_from, batch_seqs):
                done += scored
                if time.monotonic() - noted >= NOTE_INTERVAL_SECONDS or done == own.scored:
                    bits = float(scorer.nll_sum) / math.log(2)
                    bar.advance(done - shown, f"bpb {bits / max(int(scorer.byte_sum), 1):.4f}")
                    shown, noted = done, time.monotonic()
    nll_total, token_total, byte_total = _reduce(scorer.nll_sum, own.scored, scorer.byte_sum, world_size)
    if byte_total == 0:
        raise UserError(
            f"the {token_total} scored tokens have no bytes, so bits per byte is undefined: give a longer text"
        )
    return EvalResult(
        val_loss=nll_total / token_total,
        val_bpb=nll_total / math.log(2) / byte_total,
        tokens=token_total,
        bytes=byte_total,
        windows=windows,
        seconds=time.perf_counter() - started,
        layer0="on" if problem is None else f"off ({problem})",
    )


def _sharing_problem(model: Scorable, share_layer0: bool, stride: int, seq_len: int) -> str | None:
    """Return the reason why windows do not share layer 0's queries, keys and values, or None if they share them."""
    if stride in (0, seq_len):
        return "windows do not overlap"
    return model.overlap_problem if share_layer0 else "share_layer0 is off"


class _Scorer:
    """Sums nats and bytes over windows of one text, batch by batch, on the model's device."""

    def __init__(
        self,
        model: Scorable,
        tokens: np.ndarray,
        target_bytes: np.ndarray,
        config: Config,
        seq_len: int,
        recurrence: bool,
        share_layer0: bool,
        known: np.ndarray | None,
    ) -> None:
        self.head = model.head_weight
        device = self.head.device
        self.text = _resident(tokens, self.head.shape[0], device)
        self.unknown = None if known is None else torch.from_numpy(~known).to(device)
        # torch has little arithmetic for uint16
        self.target_bytes = torch.from_numpy(target_bytes.astype(np.int32)).to(device)
        self.config, self.recurrence = config, recurrence
        self.columns = torch.arange(seq_len, device=device)
        self.nll_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.byte_sum = torch.zeros((), dtype=torch.int64, device=device)
        compiled = compiles(config, device)
        self.hidden, self.overlapping_hidden = model.hidden, model.overlapping_hidden
        if compiled:
            if isinstance(model, nn.Module):
                write_out(model, without_kernel(device))
            self.hidden = torch.compile(self.hidden, dynamic=False, fullgraph=True)
            self.overlapping_hidden = torch.compile(self.overlapping_hidden, dynamic=False, fullgraph=True)
        self.share_layer0 = share_layer0
        self.graphs = compiled and device.type == "cuda"

    def score(self, windows: WindowPlan, rows_from: int, batch_seqs: int) -> Iterator[int]:
        """Score windows in batches. Yield the number of scored positions of each batch."""
        # choose the batch size so that all batches have one shape and the last batch needs little padding
        batches = -(-len(windows.start) // batch_seqs)
        batch = -(-len(windows.start) // batches)
        # pad with windows of length 0, which score no position
        padded = np.pad(np.stack(windows), ((0, 0), (0, batches * batch - len(windows.start))))
        counts = (padded[1] - padded[2]).reshape(batches, batch).sum(1).tolist()
        parts = torch.from_numpy(padded).to(self.text.device).split(batch, dim=1)
        add: Callable[[Tensor, int], None] = self._add_batch
        for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
            # the first batch compiles the model; capture a graph only if at least two batches follow
            if index == 1 and batches > 2 and self.graphs:
                add = self._capture(part, rows_from)
            add(part, rows_from)
            yield count

    def _add_batch(self, windows: Tensor, rows_from: int) -> None:
        """Score a batch of B windows. `windows` `(3, B)` has the starts, lengths and first scored positions."""
        start, length, score_from = windows[..., None]
        last = len(self.text) - 2
        hidden = self._rows(start, length, rows_from).flatten(0, 1)
        positions = self.columns[rows_from:]
        scored = ((positions >= score_from) & (positions < length)).flatten()
        at = (start + positions).clamp(max=last).flatten()
        target = self.text[at + 1].long()
        nll = window_nll(
            hidden,
            self.head,
            target,
            softcap=self.config.logit_softcap,
            logits_rounding=self.config.logits_rounding,
        )
        charged = scored if self.unknown is None else scored & self.unknown[at]
        self.nll_sum += torch.where(charged, nll, 0.0).sum(dtype=torch.float64)
        self.byte_sum += torch.where(scored, self.target_bytes[at], 0).sum()

    def _rows(self, start: Tensor, length: Tensor, rows_from: int) -> Tensor:
        """Return the head's input at the positions from `rows_from` on, `(B, T - rows_from, d)`."""
        last = len(self.text) - 2
        if self.share_layer0 and rows_from:
            # windows that score only their last positions start one stride after each other
            windows, stride = len(start), len(self.columns) - rows_from
            positions = start[0] + torch.arange((windows - 1) * stride + len(self.columns), device=start.device)
            covered = self.text[positions.clamp(max=last)].long()
            return self.overlapping_hidden(
                covered, windows=windows, stride=stride, recurrence=self.recurrence, rows_from=rows_from
            )
        inside = self.columns < length
        ids = self.text[(start + self.columns).clamp(max=last)] * inside
        return self.hidden(ids.long(), recurrence=self.recurrence, rows_from=rows_from)

    def _capture(self, windows: Tensor, rows_from: int) -> Callable[[Tensor, int], None]:
        """Capture `_add_batch` as a CUDA graph. Return a function that replays it for windows of the same shape."""
        held, graph = windows.clone(), torch.cuda.CUDAGraph()
        # thread_local, because another thread may copy training batches during the capture
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._add_batch(held, rows_from)

        def replay(windows: Tensor, rows_from: int) -> None:
            held.copy_(windows)
            graph.replay()

        return replay


@contextmanager
def _evaluating(model: Scorable) -> Iterator[None]:
    """Put the model into evaluation mode inside the context, and restore the former mode afterwards."""
    trained = model if isinstance(model, nn.Module) and model.training else None
    if trained is not None:
        trained.eval()
    try:
        yield
    finally:
        if trained is not None:
            trained.train()


def _resident(tokens: np.ndarray, vocab_size: int, device: torch.device) -> Tensor:
    check_tokens(tokens, vocab_size, "the text to score")
    return torch.from_numpy(tokens.astype(np.int32)).to(device)


def _reduce(nll_sum: Tensor, tokens: int, byte_sum: Tensor, world_size: int) -> tuple[float, int, int]:
    """Return nats, tokens and bytes, each summed over all ranks."""
    counts = torch.stack([byte_sum.new_tensor(tokens), byte_sum])
    if world_size > 1:
        if not dist.is_initialized():
            raise RuntimeError(f"world_size {world_size} needs torch.distributed: call init_process_group first")
        dist.all_reduce(nll_sum)
        dist.all_reduce(counts)
    return float(nll_sum), int(counts[0]), int(counts[1])


def score(
    model: Scorable,
    data: Dataset,
    config: Config,
    ranks: Ranks,
    *,
    weights: str,
    batch_seqs: int = BATCH_SEQS,
    max_tokens: int = 0,
    progress: bool = True,
    description: str = "evaluate",
) -> tuple[EvalResult, dict[str, Any]]:
    """Score the validation text of `data`. Return the score and the entry for evaluation.json.

    Every rank must call this function. `weights` says which weights `model` has: "artifact", or "master" for the
    weights before quantization. For the other arguments see `evaluate_model`.
    """
    result = evaluate_model(
        model,
        data.validation.tokens,
        data.validation.target_bytes,
        config,
        batch_seqs=batch_seqs,
        max_tokens=max_tokens,
        known=data.known_targets,
        rank=ranks.rank,
        world_size=ranks.world_size,
        progress=progress,
        description=description,
    )
    if not (math.isfinite(result.val_loss) and math.isfinite(result.val_bpb)):
        raise UserError(f"{weights}: the loss on the validation text is {result.val_loss}: train again at lower rates")
    entry = evaluation_entry(
        result, config, weights=weights, max_tokens=max_tokens, world_size=ranks.world_size, device=str(ranks.device)
    )
    return result, entry


def flat_evaluation(
    model: Scorable,
    tokens: np.ndarray,
    target_bytes: np.ndarray,
    config: Config,
    *,
    recurrence: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> EvalResult:
    """Compute the validation score during training, with windows of train_seq_len tokens that do not overlap."""
    return evaluate_model(
        model,
        tokens,
        target_bytes,
        config,
        stride=0,
        seq_len=config.train_seq_len,
        recurrence=recurrence,
        rank=rank,
        world_size=world_size,
        progress=True,
        description="validation",
    )
