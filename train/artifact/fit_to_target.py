"""Searches row clips with which artifact and code take almost `target_bytes`, but not more.

Each tensor group has its own k: SDClip clips a row at k standard deviations. In each round,
`train.quantize.clip_curves` chooses the values of k that should meet the target with the least loss. Then the model is
quantized and encoded with these values, and the measured bytes of each group correct the prediction for the next round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.artifact.pruning import count_ones, prune_ones, prunes_needed, warn_of_large_part
from train.artifact.storage import EncodedArtifact, encode_artifact
from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.progress import Progress
from train.config import Config
from train.data.dataset import Dataset
from train.model.gpt import GPT
from train.quantize.clip_curves import Curves, choose_sigmas, group_curves, loss_factors
from train.quantize.tensors import StoredTensors
from train.run.logger import RunLogger

# the loss is measured on at least this many training tokens per rank
FIT_TOKENS = 1 << 15
# largest number of rounds
ROUNDS = 8
# the search stops when the result fits and leaves at most this fraction of the target unused
TOLERANCE = 0.002


def fit_to_target(
    config: Config,
    model: GPT,
    hessians: Mapping[str, Tensor],
    quantize: Callable[[Mapping[str, float]], StoredTensors],
    data: Dataset,
    ranks: Ranks,
    log: RunLogger,
    *,
    counted_bytes: int,
) -> tuple[StoredTensors, EncodedArtifact]:
    """Search row clips so that artifact and code take at most `target_bytes`. If none is found, set codes ±1 to 0.

    Every rank must call this.

    Args:
        config: the settings. To measure the loss, rows are clipped at a multiple of the settings' k.
        model: its parameters change while the loss is measured; then they are restored.
        hessians: parameter name → Hessian; only the row clip `hessian_sdclip` reads them.
        quantize: function that takes parameter name → k, and returns the quantized model.
        data: the dataset, whose training batches serve to measure the loss.
        ranks: the ranks of the run.
        log: receives one line per round and the results.
        counted_bytes: bytes of code and paid prefix, which also count.

    Returns:
        The tensors and their artifact, the same on every rank. If even pruning does not suffice, they exceed the
        target.
    """

    def encode(tensors: StoredTensors) -> EncodedArtifact:
        return encode_artifact(tensors, config)

    left = config.target_bytes - counted_bytes
    if left <= 0:
        raise UserError(
            f"target_bytes: {config.target_bytes:,} leaves no byte for the model, because the code takes {counted_bytes:,}: raise it"
        )
    log.line(f"fit:a search for {config.target_bytes} bytes begins, in at most {ROUNDS} rounds")
    curves = group_curves(model, config, hessians)
    factors = measure_factors(config, model, curves, hessians, data, ranks, log)
    tensors, encoded = search_clips(
        model,
        curves,
        factors,
        config.target_bytes,
        counted_bytes=counted_bytes,
        quantize=quantize,
        encode=lambda tensors: ranks.on_main(lambda: encode(tensors)),
        note=log.line,
    )
    if len(encoded.data) <= left:
        return tensors, encoded
    count, encoded = ranks.on_main(lambda: prunes_needed(tensors, left, encode, encoded, log.line))
    log.line(f"prune:{count} of {count_ones(tensors)} codes ±1, because no row clip fits")
    warn_of_large_part(tensors, count, log.line)
    return prune_ones(tensors, count), encoded


def measure_factors(
    config: Config,
    model: GPT,
    curves: Sequence[Curves],
    hessians: Mapping[str, Tensor],
    data: Dataset,
    ranks: Ranks,
    log: RunLogger,
) -> list[float]:
    """Call `loss_factors` with the mean loss of all ranks on training batches, with recurrence as in the evaluation."""
    started = time.perf_counter()
    loader = data.loader(ranks)
    batches: list[tuple[Tensor, Tensor]] = []
    while sum(inputs.numel() for inputs, _ in batches) < FIT_TOKENS:
        batches += loader.next_batch()
    recurrence = bool(config.recur_layers)
    # `loss_factors` measures the model as it is, and with each group rounded
    bar = Progress((1 + len(curves)) * len(batches), "fit", "batches", enabled=ranks.is_main)

    def batch_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        measured = model.loss(inputs, targets, recurrence=recurrence)
        bar.advance()
        return measured

    def loss() -> float:
        mean = torch.stack([batch_loss(*batch) for batch in batches]).double().mean()
        return float(ranks.sum(mean)) / ranks.world_size

    training = model.training
    model.eval()
    with bar:
        factors = loss_factors(model, config, curves, hessians, loss)
    model.train(training)
    tokens = ranks.world_size * sum(inputs.numel() for inputs, _ in batches)
    # log the duration, because reading training data counts as training time
    log.line(f"fit:measured on {tokens} training tokens in {time.perf_counter() - started:.1f}s")
    return factors


@dataclass(frozen=True)
class Round:
    """One round of the search."""

    chosen: list[int]  # each group's index in its grid of k
    tensors: StoredTensors
    encoded: EncodedArtifact
    total_bytes: int  # artifact, code and paid prefix
    expected_loss: float  # expected rise of the loss

    def rank(self, target_bytes: int) -> tuple[bool, float]:
        """Return a sort key: first rounds that fit, sorted by expected loss, then the others, sorted by size."""
        over = self.total_bytes > target_bytes
        return over, self.total_bytes if over else self.expected_loss


def search_clips(
    model: nn.Module,
    curves: Sequence[Curves],
    factors: Sequence[float],
    target_bytes: int,
    *,
    counted_bytes: int,
    quantize: Callable[[Mapping[str, float]], StoredTensors],
    encode: Callable[[StoredTensors], EncodedArtifact],
    note: Callable[[str], None],
) -> tuple[StoredTensors, EncodedArtifact]:
    """Search the values of k with the least expected loss such that artifact and code take at most `target_bytes`.

    Args:
        model: the model, whose tensors outside `curves` are counted before the first round.
        curves: result of `group_curves`.
        factors: result of `loss_factors`.
        target_bytes: the target.
        counted_bytes: bytes of code and paid prefix, which also count.
        quantize: function that takes parameter name → k, and returns the quantized model.
        encode: function that encodes a quantized model.
        note: function that receives each log line.

    Returns:
        The tensors and the artifact of the best round that fits, or of the smallest round if no round fits.
    """
    correction: dict[str, float] = {}
    # all bytes except those of the searched codes. The first round assumes that these bytes are not compressed.
    other = float(_uncoded_bytes(model, curves) + counted_bytes)
    best: Round | None = None
    chosen: list[int] = []
    for _ in range(ROUNDS):
        before, chosen = chosen, choose_sigmas(curves, factors, correction, target_bytes * (1 - TOLERANCE / 2) - other)
        if chosen == before:
            break
        started = time.perf_counter()
        tensors = quantize(
            {name: float(group.sigmas[p]) for group, p in zip(curves, chosen, strict=True) for name in group.tensors}
        )
        quantized = time.perf_counter()
        encoded = encode(tensors)
        took = f"quantized in {quantized - started:.1f}s, encoded in {time.perf_counter() - quantized:.1f}s"
        total = counted_bytes + len(encoded.data)
        expected = sum(f * float(g.error[p]) for f, g, p in zip(factors, curves, chosen, strict=True))
        note(f"fit:{total} of {target_bytes} bytes, expected loss +{expected:.5f}, {took}")
        found = Round(chosen, tensors, encoded, total, expected)
        best = found if best is None else min(best, found, key=lambda one: one.rank(target_bytes))
        if target_bytes * (1 - TOLERANCE) <= total <= target_bytes:
            break
        taken = _group_bytes(encoded)
        other = total - sum(taken[group.name] for group in curves)
        for group, index in zip(curves, chosen, strict=True):
            correction[group.name] = (taken[group.name] - float(group.size[index])) / group.elements
    assert best is not None
    taken = _group_bytes(best.encoded)
    for group, index in zip(curves, best.chosen, strict=True):
        note(
            f"fit:{group.name} int{group.bits} k {group.start:g} -> {float(group.sigmas[index]):.3f}: {taken[group.name]} bytes, "
            f"{8 * taken[group.name] / group.elements:.3f} bits per weight"
        )
    return best.tensors, best.encoded


def _group_bytes(encoded: EncodedArtifact) -> dict[str, int]:
    """Return tensor group → bytes of the group's codes in the artifact."""
    return {part.group: part.packed_bytes for part in encoded.info.sections if part.type.startswith("int")}


def _uncoded_bytes(model: nn.Module, curves: Sequence[Curves]) -> int:
    """Return the bytes of tensors outside `curves`, in float16, and of the row scales of tensors in `curves`."""
    coded = {name for group in curves for name in group.tensors}
    return sum(2 * (len(weight) if name in coded else weight.numel()) for name, weight in model.named_parameters())
