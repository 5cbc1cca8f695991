"""Token by token with kept keys and values, against the whole text at once, for every system."""

import numpy as np
import pytest
import torch
from model_systems import CASES, narrow_config, random_ids, random_model

from train.model.decoder import Decoder, sample
from train.model.gpt import GPT

# beyond the length at which the narrow systems' rotary base begins to grow
LENGTH = 14


def decoded(model: GPT, ids: torch.Tensor, *, recurrence: bool) -> torch.Tensor:
    decoder = Decoder(model, len(ids), ids.shape[1], recurrence=recurrence)
    return torch.stack([decoder.step(tokens) for tokens in ids.split(1, dim=1)], dim=1)


@pytest.mark.parametrize(("system", "recurrence"), CASES)
def test_every_steps_logits_are_those_of_the_whole_text(system: str, recurrence: bool) -> None:
    config = narrow_config(system)
    model, ids = random_model(config).eval(), random_ids(config, 3, LENGTH)
    with torch.no_grad():
        whole = model.logits(ids, recurrence=recurrence)
    stepwise = decoded(model, ids, recurrence=recurrence)
    assert stepwise.dtype == torch.float64
    torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-9)
    # a text may be read in one step, or in several of any size
    decoder = Decoder(model, len(ids), LENGTH, recurrence=recurrence)
    for begin, end in ((0, 6), (6, 7), (7, 12), (12, LENGTH)):
        torch.testing.assert_close(decoder.step(ids[:, begin:end]), whole[:, end - 1], rtol=0, atol=1e-9)
    # the text matters: another first token changes the last logits
    ids[:, 0] = (ids[:, 0] + 5) % config.vocab_size
    assert (decoded(model, ids, recurrence=recurrence)[:, -1] - whole[:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"document_masking": True, "smear_gate": "document"},
        {"document_masking": True, "smear_gate": "published"},
        {"bigram_vocab_size": 41, "bigram_dim": 12, "trigram": True, "smear_gate": "published"},
        {"parallel_start_layer": 9, "recur_layers": (8, 9)},
    ],
    ids=["documents", "documents, published gate", "trigrams behind the gate", "a repeat in the decoder"],
)
def test_parts_that_no_recipe_combines(changes: dict[str, object]) -> None:
    config = narrow_config("sp8192", **changes)
    model, ids = random_model(config).eval(), random_ids(config, 3, LENGTH)
    with torch.no_grad():
        whole = model.logits(ids, recurrence=True)
    torch.testing.assert_close(decoded(model, ids, recurrence=True), whole, rtol=0, atol=1e-9)
    decoder = Decoder(model, len(ids), LENGTH, recurrence=True)
    for begin, end in ((0, 5), (5, 9), (9, LENGTH)):
        torch.testing.assert_close(decoder.step(ids[:, begin:end]), whole[:, end - 1], rtol=0, atol=1e-9)


def test_the_rotary_base_is_that_of_the_whole_length() -> None:
    config = narrow_config("sp4096")
    model, ids = random_model(config).eval(), random_ids(config, 2, LENGTH)
    half = LENGTH // 2
    with torch.no_grad():
        short = model.logits(ids[:, :half], recurrence=True)
    # below the training length the short text has the plain base, the beginning of the long one has not
    assert half < config.rope_train_seq_len < LENGTH
    assert (decoded(model, ids, recurrence=True)[:, :half] - short).abs().max() > 1e-3
    torch.testing.assert_close(decoded(model, ids[:, :half], recurrence=True), short, rtol=0, atol=1e-9)


def test_a_full_text_takes_no_more() -> None:
    config = narrow_config("baseline")
    decoder = Decoder(random_model(config).eval(), 2, 1, recurrence=False)
    tokens = torch.tensor([[3], [4]])
    decoder.step(tokens)
    with pytest.raises(ValueError, match="end after 1 token: no token 2"):
        decoder.step(tokens)
    with pytest.raises(ValueError, match="holds 1 token, not 2"):
        decoder.past.extend(*torch.zeros(2, 2, 1, 2, 8))


def test_a_draw_falls_into_the_interval_of_its_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 9, generator=generator, dtype=torch.float64)
    logits[:, [0, 4]] = -float("inf")
    draws = torch.rand(500, generator=generator, dtype=torch.float64)
    draws[:3] = torch.tensor([0.0, 1 - 2.0**-53, 0.5])
    tokens = sample(logits, draws, 0.7).numpy()
    weights = np.exp(logits.numpy() / 0.7)
    ends = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    for token, end, draw in zip(tokens, ends, draws.numpy(), strict=True):
        assert (end[token - 1] if token else 0.0) <= draw + 1e-12 and draw < end[token] + 1e-12
    assert not np.isin(tokens, [0, 4]).any() and len(np.unique(tokens)) == 7
    torch.testing.assert_close(sample(logits, draws, 1e-6), logits.argmax(dim=1))
    torch.testing.assert_close(sample(logits, draws, 5e-324), logits.argmax(dim=1))
    assert sample(logits, draws, 0.0).tolist() == logits.numpy().argmax(axis=1).tolist()
