"""A run's artifact brought below its target by pruning: `target_mb` and `prune_excess`."""

from __future__ import annotations

from train.artifact import Encoder
from train.artifact.pruning import count_ones, prune_ones, prunes_needed
from train.common.distributed import Ranks
from train.common.wording import counted
from train.config import Config
from train.model.parameters import classify
from train.quantize.tensors import StoredTensors
from train.run.logger import RunLogger


def prune(
    config: Config, tensors: StoredTensors, other_bytes: int, ranks: Ranks, log: RunLogger, encoder: Encoder
) -> StoredTensors:
    """Prune codes ±1 as `target_mb` and `prune_excess` say, beside `other_bytes` of code that count with the model.

    `target_mb` (#1392) searches the number of codes, and takes all of them where the target is out of reach; that it was
    is logged, and no error. `prune_excess` (#1471) prunes so many codes per byte over the cap, once, and of matrices alone.
    """

    def size(candidate: StoredTensors) -> int:
        return other_bytes + encoder(candidate, config)[1].model_bytes

    if config.target_mb:
        target = config.pruning_target_bytes
        if target > config.max_artifact_bytes:
            log.line(
                f"warning: target_mb {config.target_mb:g} is {target:,} bytes, beyond the cap of {config.max_artifact_bytes:,}: "
                "pruning does not keep to the cap"
            )
        tensors = _pruned(
            tensors, ranks.on_main(lambda: prunes_needed(tensors, target, size)), f"target of {target} bytes", log
        )
        reached = ranks.on_main(lambda: size(tensors))
        if reached > target:
            log.line(
                f"warning: target_mb {config.target_mb:g} is not reached: with every code ±1 pruned code and model take "
                f"{reached:,} bytes, {reached - target:,} over the target of {target:,}"
            )
    if config.prune_excess:
        excess = ranks.on_main(lambda: size(tensors)) - config.max_artifact_bytes
        if excess > 0:
            matrices = {name: tensor for name, tensor in tensors.items() if classify(name, config) == "matrix"}
            count = min(config.prune_excess * excess, count_ones(matrices))
            tensors = {**tensors, **_pruned(matrices, count, f"model {counted(excess, 'byte')} over the cap", log)}
    return tensors


def _pruned(tensors: StoredTensors, count: int, reason: str, log: RunLogger) -> StoredTensors:
    log.line(f"prune:{count} of {count_ones(tensors)} codes ±1 for a {reason}")
    # the same tensors need not be encoded again
    return prune_ones(tensors, count) if count else tensors
