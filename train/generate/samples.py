"""Prints texts that a run's model writes, and stores them in samples.txt."""

from __future__ import annotations

import itertools

from tqdm import tqdm

from train.common.files import atomic_write
from train.config import Config
from train.data.tokenizer import find_tokenizer, load_tokenizer
from train.generate.text import characters, continue_text, encode
from train.model.gpt import GPT
from train.run.folder import RunFolder

# these prompts suit a model of Python's own texts better than a model of web pages
PROMPTS = ("import", "def", "The")
TOKENS = 32
TEMPERATURE = 0.8


def sample_texts(config: Config, model: GPT, *, recurrence: bool) -> list[str]:
    """Generate one text per prompt. The random numbers depend on the run's seed. The model keeps its mode."""
    path = find_tokenizer(config.data_path, config.vocab_size, config.tokenizer_path)
    tokenizer = load_tokenizer(path, config.vocab_size, operators=True)
    was_training, texts = model.training, []
    model.eval()
    try:
        for number, prompt in enumerate(PROMPTS):
            ids = encode(tokenizer, prompt)
            added = continue_text(
                model, ids, TOKENS,
                window=config.window, temperature=TEMPERATURE, seed=[config.seed, number], recurrence=recurrence,
            )  # fmt: skip
            texts.append("".join(characters(tokenizer, itertools.chain(ids, added))))
    finally:
        model.train(was_training)
    return texts


def write_samples(folder: RunFolder, config: Config, model: GPT, label: str, *, recurrence: bool = True) -> None:
    """Print sample texts and write them to samples.txt. Earlier texts with the same label are replaced.

    The texts are not logged, because other programs parse the log's lines.
    """
    lines = [f"{label}: {text}" for text in sample_texts(config, model, recurrence=recurrence)]
    for line in lines:
        tqdm.write(line)
    earlier = folder.samples.read_text(encoding="utf-8").split("\n")[:-1] if folder.samples.exists() else []
    kept = [line for line in earlier if not line.startswith(f"{label}: ")]
    atomic_write(folder.samples, "".join(f"{line}\n" for line in kept + lines))
