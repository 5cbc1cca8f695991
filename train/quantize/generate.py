"""Generates texts with the model, so that GPTQ can calibrate without training data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.progress import Progress
from train.config import Config
from train.model.decoder import Decoder, sample
from train.model.gpt import GPT

# largest KV cache, 2 GiB, which limits how many texts are generated together
_CACHE_BYTES = 1 << 31
# sampling temperature and number of texts per calibration batch, from #1392
TEMPERATURE = 0.8
_GENERATED_BATCH = 8


def generated_batches(config: Config, model: GPT, ranks: Ranks, *, recurrence: bool) -> Sequence[Tensor]:
    """Generate this rank's texts, in batches of token ids `(B, train_seq_len)`.

    Raises:
        UserError: there are fewer texts than ranks.
    """
    if config.gptq_calib_batches < ranks.world_size:
        raise UserError(
            f"gptq_calib_batches: {config.gptq_calib_batches} sequences are fewer than {ranks.world_size} ranks: "
            f"set GPTQ_CALIB_BATCHES to {ranks.world_size} at least"
        )
    texts = generate_tokens(
        model,
        range(ranks.rank, config.gptq_calib_batches, ranks.world_size),
        config.train_seq_len,
        temperature=TEMPERATURE,
        seed=config.seed,
        recurrence=recurrence,
        progress=ranks.is_main,
    )
    batches: Sequence[Tensor] = texts.split(_GENERATED_BATCH)
    return batches


@torch.no_grad()
def generate_tokens(
    model: GPT,
    numbers: Sequence[int],
    length: int,
    *,
    temperature: float,
    seed: int,
    recurrence: bool,
    progress: bool = False,
) -> Tensor:
    """Generate texts of `length` tokens, one for each text number in `numbers`.

    The first token is drawn uniformly from the vocabulary, each later token from softmax(logits / temperature). Text i
    takes its random numbers from a generator with the seed (seed, i), so ranks and batches change only the rounding of
    the logits. The model must not be compiled. It runs in evaluation mode; then its former mode is restored.

    Returns:
        `(len(numbers), length)` int64, on the model's device.
    """
    device = model.embedding.weight.device
    draws = np.array([np.random.default_rng([seed, number]).random(length) for number in numbers])
    texts = torch.empty(len(numbers), length, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        with Progress(len(numbers) * length, "generate", "tokens", enabled=progress) as bar:
            for some, given in zip(
                texts.split(_side_by_side(model, length)),
                torch.from_numpy(draws.reshape(-1, length)).to(device).split(_side_by_side(model, length)),
                strict=True,
            ):
                decoder = Decoder(model, len(some), length, recurrence=recurrence)
                some[:, 0] = (given[:, 0] * model.config.vocab_size).long()
                bar.advance(len(some))
                for position in range(1, length):
                    some[:, position] = sample(
                        decoder.step(some[:, position - 1 : position]), given[:, position], temperature
                    )
                    bar.advance(len(some))
    finally:
        model.train(was_training)
    return texts


def _side_by_side(model: GPT, length: int) -> int:
    config = model.config
    runs = max(len(model.plan), len(model.recurrent_plan))
    text_bytes = 2 * runs * length * config.kv_dim * model.compute_dtype.itemsize
    return max(_CACHE_BYTES // text_bytes, 1)
