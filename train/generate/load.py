"""Loads a model from a run folder or from an artifact alone. Finds the model's tokenizer and window length."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from train.artifact.storage import load_model
from train.common.errors import UserError
from train.config import Config
from train.data.tokenizer import find_tokenizer
from train.model.gpt import GPT
from train.run.folder import RunFolder


class Loaded(NamedTuple):
    """The model in an artifact, in evaluation mode on the CPU."""

    model: GPT
    window: int  # number of tokens that the model reads at once
    run: Config | None  # the run's settings, if the artifact lies in a run folder


def load(path: Path, device: str = "auto") -> Loaded:
    """Load the artifact of a run folder, or an artifact file. `device` determines the compute dtype.

    The window length is that of the run's evaluation. For an artifact outside a run folder it is `rope_train_seq_len`,
    the longest window for which the NTK rule does not change the rotary base.

    Raises:
        UserError: the run is not finished, or the artifact cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such run or artifact: give a run folder, its name in runs/, or a model.golf")
    folder = RunFolder(path if path.is_dir() else path.parent)
    run = folder.find_data(folder.read_config()) if path.is_dir() or folder.config.exists() else None
    artifact = folder.need(folder.artifact, "python -m train") if path.is_dir() else path
    model = load_model(artifact, (run or Config()).replace(device=device))
    return Loaded(model, run.window if run else model.config.rope_train_seq_len, run)


def tokenizer_path(path: Path, run: Config | None, given: str = "") -> Path:
    """Find the tokenizer of the model in the run folder or artifact `path`: `given`, or else the run's tokenizer.

    Raises:
        UserError: the tokenizer does not exist, or `given` is empty and the artifact is not in a run folder.
    """
    remedy = "give --tokenizer FILE, the .model file that made the shards"
    if given:
        if not Path(given).is_file():
            raise UserError(f"--tokenizer: {given}: no such file: {remedy}")
        return Path(given)
    if run is None:
        raise UserError(f"{path}: an artifact holds no tokenizer, and no run's config.json is beside it: {remedy}")
    try:
        found = find_tokenizer(run.data_path, run.vocab_size, run.tokenizer_path)
    except UserError:
        raise UserError(f"{path}: expected one tokenizer in its data_path {run.data_path}: {remedy}") from None
    if not found.is_file():
        raise UserError(f"{path}: its tokenizer {found} is missing: {remedy}")
    return found
