"""Sets codes ±1 to 0 so that the artifact becomes smaller, for the settings `target_mb` and `prune_excess`."""

from __future__ import annotations

from train.artifact.pruning import count_ones, prune_ones, prunes_needed, warn_of_large_part
from train.artifact.storage import EncodedArtifact, encode_artifact
from train.common.distributed import Ranks
from train.common.wording import counted
from train.config import Config
from train.model.parameters import classify
from train.quantize.tensors import StoredTensors
from train.run.logger import RunLogger


def prune(
    config: Config,
    tensors: StoredTensors,
    encoded: EncodedArtifact | None,
    ranks: Ranks,
    log: RunLogger,
    *,
    counted_bytes: int,
) -> tuple[StoredTensors, EncodedArtifact | None]:
    """Set codes ±1 to 0 according to `target_mb` and `prune_excess`. Every rank must call this.

    With `target_mb` (#1392), search how many codes must be set to 0. If even all codes ±1 do not suffice, log a
    warning. With `prune_excess` (#1471), set this many codes to 0 per byte over the cap, once, and only in matrices.

    `encoded` is the artifact of `tensors`, or None. `counted_bytes` is the size of code and paid prefix.

    Returns:
        The tensors, and their artifact if it is already encoded, otherwise None.
    """

    def encode(tensors: StoredTensors) -> EncodedArtifact:
        return encode_artifact(tensors, config)

    if config.target_mb:
        target = config.pruning_target_bytes
        if target > config.max_artifact_bytes:
            log.line(
                f"warning: target_mb {config.target_mb:g} is {target:,} bytes, above the cap of {config.max_artifact_bytes:,}: "
                "the pruned model may exceed the cap"
            )
        before, known = tensors, encoded
        count, encoded = ranks.on_main(lambda: prunes_needed(before, target - counted_bytes, encode, known, log.line))
        log.line(f"prune:{count} of {count_ones(tensors)} codes ±1 for a target of {target} bytes")
        warn_of_large_part(tensors, count, log.line)
        tensors = prune_ones(tensors, count) if count else tensors
        reached = counted_bytes + len(encoded.data)
        if reached > target:
            log.line(
                f"warning: target_mb {config.target_mb:g} is not reached: with every code ±1 pruned code and model take "
                f"{reached:,} bytes, {reached - target:,} over the target of {target:,}"
            )
    if config.prune_excess:
        unpruned = tensors
        encoded = encoded or ranks.on_main(lambda: encode(unpruned))
        excess = counted_bytes + len(encoded.data) - config.max_artifact_bytes
        if excess > 0:
            matrices = {name: tensor for name, tensor in tensors.items() if classify(name, config) == "matrix"}
            ones = count_ones(matrices)
            count = min(config.prune_excess * excess, ones)
            log.line(f"prune:{count} of {ones} codes ±1 for a model {counted(excess, 'byte')} over the cap")
            warn_of_large_part(tensors, count, log.line)
            if count:
                tensors, encoded = {**tensors, **prune_ones(matrices, count)}, None
    return tensors, encoded
