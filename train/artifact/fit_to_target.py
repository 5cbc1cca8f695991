"""A run's artifact brought below its target by the row clips: `target_bytes`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from train.artifact import Encoder
from train.artifact.pruning import count_ones, prune_ones, prunes_needed
from train.common.distributed import Ranks
from train.config import Config
from train.data.loaders import make_loader
from train.data.paid_prefix import prefix_bytes
from train.model.gpt import GPT
from train.quantize.clip_curves import Encoded, fit
from train.quantize.tensors import StoredTensors
from train.run.logger import RunLogger
from train.single_file.code_size import counted_code_bytes

# on so many tokens per rank the loss is measured by which row clips are weighed
FIT_TOKENS = 1 << 15


def fit_target(
    config: Config,
    packed: Config,
    model: GPT,
    hessians: Mapping[str, Tensor],
    quantize: Callable[[Mapping[str, float]], StoredTensors],
    ranks: Ranks,
    log: RunLogger,
    encoder: Encoder,
) -> StoredTensors:
    """Quantize so that code and model take at most `target_bytes`: by the row clips, and if these do not do by pruning.

    The code is that of a script with the settings `packed`.
    """
    started = time.perf_counter()
    loader = make_loader(config, ranks.rank, ranks.world_size, ranks.device)
    batches: list[tuple[Tensor, Tensor]] = []
    while sum(inputs.numel() for inputs, _ in batches) < FIT_TOKENS:
        batches += loader.next_batch()
    recurrence = bool(config.recur_layers)
    # what reads training data belongs to the clock of training
    reading_seconds = time.perf_counter() - started
    counted = ranks.on_main(lambda: counted_code_bytes(packed)) + prefix_bytes(config)

    def loss() -> float:
        nonlocal reading_seconds
        begun = time.perf_counter()
        mean = torch.stack([model.loss(*batch, recurrence=recurrence) for batch in batches]).double().mean()
        result = float(ranks.sum(mean)) / ranks.world_size
        reading_seconds += time.perf_counter() - begun
        return result

    def encode(tensors: StoredTensors) -> Encoded:
        def sizes() -> Encoded:
            info = encoder(tensors, config)[1]
            codes = {part.group: part.packed_bytes for part in info.sections if part.type.startswith("int")}
            return Encoded(counted + info.model_bytes, codes)

        return ranks.on_main(sizes)

    training = model.training
    model.eval()
    tensors, encoded = fit(
        model,
        config,
        hessians,
        config.target_bytes,
        counted_bytes=counted,
        loss=loss,
        quantize=quantize,
        encode=encode,
        note=log.line,
    )
    model.train(training)
    tokens = ranks.world_size * sum(inputs.numel() for inputs, _ in batches)
    log.line(f"fit:measured on {tokens} training tokens in {reading_seconds:.1f}s")
    if encoded.total <= config.target_bytes:
        return tensors
    count = prunes_needed(tensors, config.target_bytes, lambda pruned: encode(pruned).total)
    log.line(f"prune:{count} of {count_ones(tensors)} codes ±1, because no row clip fits")
    return prune_ones(tensors, count)
