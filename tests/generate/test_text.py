"""Texts that grow token by token, against the whole forward pass, and their characters."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from model_systems import CASES, SHALLOW, narrow_config, random_ids, random_model
from sentencepiece import SentencePieceProcessor

from train.common.errors import UserError
from train.config import Config
from train.data.tokenizer import train_tokenizer
from train.generate import text
from train.generate.text import characters, continue_text, encode
from train.model.decoder import sample
from train.model.gpt import GPT
from train.recipes import load_recipe

TOKENS, WINDOW, SEED = 20, 10, 5


def shallow(system: str, **changes: object) -> Config:
    return narrow_config(system, **SHALLOW[system], rope_train_seq_len=6, **changes)


def quickstart() -> Config:
    narrow = {"model_dim": 32, "rope_dims": 4, "ve_dim": 12, "vocab_size": 259, "rope_train_seq_len": 6}
    return load_recipe("quickstart").config(**narrow)


def written(model: GPT, prompt: list[int], window: int, temperature: float, *, recurrence: bool) -> list[int]:
    """The text by the whole forward pass of the evaluation: windows of one length, padded at the end."""
    context, added = prompt[-window:], []
    for draw in np.random.default_rng(SEED).random(TOKENS):
        if len(context) == window + 1:
            context = context[-(window // 2 + 1) :]
        padded = torch.tensor([context + [0] * (window - len(context))])
        with torch.no_grad():
            logits = model.logits(padded, recurrence=recurrence)[:, len(context) - 1]
        drawn = sample(logits, torch.tensor([draw]), 1.0) if temperature else logits.argmax(dim=1)
        if int(drawn) == 1:
            break
        added.append(int(drawn))
        context = [*context, int(drawn)]
    return added


@pytest.mark.parametrize(
    ("config", "recurrence"),
    [
        *((shallow(system), recurrence) for system, recurrence in CASES),
        (quickstart(), False),
        (quickstart(), True),
        (shallow("sp8192", document_masking=True, smear_gate="document"), True),
        (shallow("sp1024", trigram=True), False),
    ],
    ids=[
        *(f"{system}, {recurrence}" for system, recurrence in CASES),
        "quickstart",
        "quickstart, True",
        "documents",
        "trigrams",
    ],
)
def test_every_token_is_that_of_the_whole_forward_pass(config: Config, recurrence: bool) -> None:
    model = random_model(config).eval()
    # the rotary base of the window is not that of a shorter text
    assert config.rope_train_seq_len < WINDOW
    added = []
    for prompt, window, temperature in ((3, WINDOW, 1.0), (15, WINDOW, 1.0), (3, 7, 0.0), (2, 1, 0.0)):
        ids = [1, *random_ids(config, 1, prompt)[0].tolist()]
        given = {"window": window, "temperature": temperature, "recurrence": recurrence}
        added.append(list(continue_text(model, ids, TOKENS, seed=SEED, **given)))
        assert added[-1] == written(model, ids, window, temperature, recurrence=recurrence)
    # some text was longer than its window
    assert max(map(len, added[:3])) > WINDOW


def test_the_seed_decides_and_nothing_else_draws() -> None:
    model = random_model(shallow("sp4096")).eval()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def drawn(seed: int) -> list[int]:
        return list(continue_text(model, [1, 7], TOKENS, window=16, temperature=0.8, seed=seed))

    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_a_document_ends_where_another_would_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([7, 9, 1, 8])
    monkeypatch.setattr(text, "sample", lambda *_: torch.tensor([next(drawn)]))
    model = random_model(shallow("baseline")).eval()
    assert list(continue_text(model, [1], TOKENS, window=16, temperature=1.0, seed=0)) == [7, 9]


def test_a_diverged_model_writes_no_text() -> None:
    model = random_model(shallow("baseline")).eval()
    with torch.no_grad():
        model.embedding.weight[3] = float("nan")
    with pytest.raises(UserError, match="training diverged"):
        list(continue_text(model, [1, 3], TOKENS, window=16, temperature=1.0, seed=0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceProcessor:
    words = ["The quick brown fox jumps over the lazy dog, naïve café."] * 40
    return train_tokenizer(words, 300, tmp_path_factory.mktemp("tokenizer") / "t.model")


def test_characters_are_whole_and_those_of_the_tokenizer(tokenizer: SentencePieceProcessor) -> None:
    prompt = "The 日本語  naïve\tfox 🙂 "
    ids = encode(tokenizer, prompt)
    assert ids[0] == 1 and ids[1:] == tokenizer.Encode(prompt)
    parts = list(characters(tokenizer, ids))
    assert "".join(parts) == tokenizer.Decode(ids[1:]) == "The 日本語 naïve fox 🙂"
    # four byte pieces make one character, which comes with the last of them
    assert parts[-5:] == ["", "", "", "🙂", ""]


def test_what_is_no_text_harms_no_terminal(tokenizer: SentencePieceProcessor, tmp_path: Path) -> None:
    first = tokenizer.PieceToId("<0x00>")
    junk = b"\xffa\xe6\x97b\x1b[2J\n\r\x85\xc2\x85\xe2\x80\xa8\xf0\x9f"
    found = "".join(characters(tokenizer, [0, 1, 2, 3, *(first + byte for byte in junk)]))
    expected = junk.decode(errors="replace")
    for control in ("\x1b", "\n", "\r", "\x85", "\u2028"):
        assert control in expected
        expected = expected.replace(control, "\ufffd")
    assert found == expected


def test_the_number_of_tokens_takes_no_memory() -> None:
    """All random numbers were drawn before the first token."""
    endless = continue_text(GPT(quickstart()).eval(), [1], 10**20, window=8, temperature=1.0, seed=0)
    assert len(list(itertools.islice(endless, 3))) == 3
