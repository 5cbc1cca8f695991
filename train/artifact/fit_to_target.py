"""A run's artifact brought below its target by the row clips: `target_bytes`.

SDClip's k of every group of tensors is the lever. The model is quantized under the k that `train.quantize.clip_curves`
predicts to fit with the least loss, and really encoded; what each group took corrects the prediction, until the encoded
model is just below the target.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.artifact.pruning import count_ones, prune_ones, prunes_needed
from train.artifact.storage import EncodedArtifact, encode_artifact
from train.common.distributed import Ranks
from train.config import Config
from train.data.dataset import Dataset
from train.model.gpt import GPT
from train.quantize.clip_curves import Curves, choose_sigmas, group_curves, loss_factors
from train.quantize.tensors import StoredTensors
from train.run.logger import RunLogger

# on so many tokens per rank the loss is measured by which row clips are weighed
FIT_TOKENS = 1 << 15
# encodings at most; the prediction is corrected after each
ROUNDS = 8
# of the target, left free at most
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
    """Quantize so that artifact and code take at most `target_bytes`: by the row clips, and if none fits by pruning.

    Args:
        config: the settings; their k are where the search begins.
        model: as it was trained; its parameters change while the loss is measured, and are put back.
        hessians: by parameter name, for `hessian_sdclip`.
        quantize: makes tensors of the model under the k of each tensor that is searched, by parameter name.
        data: gives the training batches on which the loss is measured.
        ranks: this process among the others, all of which must call.
        log: is told what was found.
        counted_bytes: what counts beside the model: code, for one.

    Returns:
        The tensors, and their artifact, the same on every rank; over the target if even pruning does not reach it.
    """

    def encode(tensors: StoredTensors) -> EncodedArtifact:
        return encode_artifact(tensors, config)

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
    left = config.target_bytes - counted_bytes
    if len(encoded.data) <= left:
        return tensors, encoded
    count, encoded = ranks.on_main(lambda: prunes_needed(tensors, left, encode, encoded))
    log.line(f"prune:{count} of {count_ones(tensors)} codes ±1, because no row clip fits")
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
    """`loss_factors` on training batches, in the evaluated function, as the mean over the ranks."""
    started = time.perf_counter()
    loader = data.loader(ranks)
    batches: list[tuple[Tensor, Tensor]] = []
    while sum(inputs.numel() for inputs, _ in batches) < FIT_TOKENS:
        batches += loader.next_batch()
    recurrence = bool(config.recur_layers)

    def loss() -> float:
        mean = torch.stack([model.loss(*batch, recurrence=recurrence) for batch in batches]).double().mean()
        return float(ranks.sum(mean)) / ranks.world_size

    training = model.training
    model.eval()
    factors = loss_factors(model, config, curves, hessians, loss)
    model.train(training)
    tokens = ranks.world_size * sum(inputs.numel() for inputs, _ in batches)
    # what reads training data belongs to the clock of training
    log.line(f"fit:measured on {tokens} training tokens in {time.perf_counter() - started:.1f}s")
    return factors


@dataclass(frozen=True)
class Round:
    """A round of the search: the place of each group in its grid of k, and what became of the model."""

    places: list[int]
    tensors: StoredTensors
    encoded: EncodedArtifact
    total_bytes: int
    expected_loss: float

    def rank(self, target_bytes: int) -> tuple[bool, float]:
        """The lowest is the best: of those that fit the one with the least loss, of the others the smallest."""
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
    """Quantize a model so that, really encoded, it takes at most `target_bytes`, with the least expected loss.

    Args:
        model: its parameters are read.
        curves: of `group_curves`.
        factors: of `loss_factors`.
        target_bytes: cap on the encoded model and `counted_bytes` together.
        counted_bytes: what counts beside the model: code, for one.
        quantize: the model under the k of each tensor that is searched, by parameter name.
        encode: makes the artifact's bytes.
        note: is told what was found, a line per group and round.

    Returns:
        The tensors and the bytes of the best round that fits. If none fits, those of the smallest one.
    """
    correction: dict[str, float] = {}
    # before anything is encoded: what is not searched as it lies in memory
    other = float(_uncoded_bytes(model, curves) + counted_bytes)
    best: Round | None = None
    places: list[int] = []
    for _ in range(ROUNDS):
        chosen = choose_sigmas(curves, factors, correction, target_bytes * (1 - TOLERANCE / 2) - other)
        if chosen == places:
            break
        places = chosen
        tensors = quantize(
            {name: float(group.sigmas[p]) for group, p in zip(curves, places, strict=True) for name in group.tensors}
        )
        encoded = encode(tensors)
        total = counted_bytes + len(encoded.data)
        expected = sum(f * float(g.error[p]) for f, g, p in zip(factors, curves, places, strict=True))
        note(f"fit:{total} of {target_bytes} bytes, expected loss +{expected:.5f}")
        found = Round(places, tensors, encoded, total, expected)
        best = found if best is None else min(best, found, key=lambda one: one.rank(target_bytes))
        if target_bytes * (1 - TOLERANCE) <= total <= target_bytes:
            break
        taken = _group_bytes(encoded)
        other = total - sum(taken[group.name] for group in curves)
        for group, place in zip(curves, places, strict=True):
            correction[group.name] = (taken[group.name] - float(group.size[place])) / group.elements
    assert best is not None
    taken = _group_bytes(best.encoded)
    for group, place in zip(curves, best.places, strict=True):
        note(
            f"fit:{group.name} int{group.bits} k {group.start:g} -> {float(group.sigmas[place]):.3f}: {taken[group.name]} bytes, "
            f"{8 * taken[group.name] / group.elements:.3f} bits per weight"
        )
    return best.tensors, best.encoded


def _group_bytes(encoded: EncodedArtifact) -> dict[str, int]:
    """Bytes of each group's codes in the artifact."""
    return {part.group: part.packed_bytes for part in encoded.info.sections if part.type.startswith("int")}


def _uncoded_bytes(model: nn.Module, curves: Sequence[Curves]) -> int:
    """Bytes of the float16 tensors and of the row scales."""
    coded = {name for group in curves for name in group.tensors}
    return sum(2 * (len(weight) if name in coded else weight.numel()) for name, weight in model.named_parameters())
