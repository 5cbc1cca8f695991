"""Text that a model writes itself, to calibrate on without training data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.progress import Progress
from train.config import Config
from train.model.decoder import Decoder
from train.model.gpt import GPT

# keys and values of the texts that are written side by side stay below 2 GiB
_CACHE_BYTES = 1 << 31
# of the text that a model writes to be calibrated on, as published by #1392
TEMPERATURE = 0.8
# sequences per forward pass over generated text, as published
_GENERATED_BATCH = 8


def generated_batches(config: Config, model: GPT, ranks: Ranks, *, recurrence: bool) -> Sequence[Tensor]:
    """This rank's texts to calibrate on, as batches `(B, train_seq_len)`.

    Raises:
        UserError: there are fewer texts than ranks.
    """
    if config.gptq_calib_batches < ranks.world_size:
        raise UserError(
            f"gptq_calib_batches: {config.gptq_calib_batches} sequences leave some of {ranks.world_size} ranks without any: "
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
    """Let a model write texts: the first token uniform over the vocabulary, each next one from softmax(logits / temperature).

    Text i takes its random numbers from (seed, i) alone, so that it does not matter which rank writes it, nor how many
    are written side by side, beyond the rounding of the logits.

    Args:
        model: not compiled; it runs in evaluation mode and is left in the mode it was in.
        numbers: which texts.
        length: tokens of each.
        temperature: above 0.
        seed: at least 0.
        recurrence: whether the repeated layers run twice.
        progress: show it.

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
                for place in range(1, length):
                    some[:, place] = sample(decoder.step(some[:, place - 1]), given[:, place], temperature)
                    bar.advance(len(some))
    finally:
        model.train(was_training)
    return texts


def sample(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Draw tokens by inversion: the first one at which the cumulative softmax(logits / temperature) exceeds the draw.

    Args:
        logits: `(B, V)`.
        draws: `(B,)` float64, uniform in [0, 1).
        temperature: above 0.

    Returns:
        `(B,)` int64.
    """
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # the last sum is one up to rounding, and no draw may fall on it or behind it
    total = cumulative[:, -1]
    places = torch.minimum(draws * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, places[:, None], right=True).squeeze(1)


def _side_by_side(model: GPT, length: int) -> int:
    config = model.config
    runs = max(len(model.plan), len(model.recurrent_plan))
    text_bytes = 2 * runs * length * config.kv_dim * model.compute_dtype.itemsize
    return max(_CACHE_BYTES // text_bytes, 1)
