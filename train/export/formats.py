"""The formats of `python -m train.export`. Tensors are float32 and have the same names as in weights.pt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from train.artifact.storage import MODEL_FIELDS
from train.checkpoint import write_tensors
from train.common.files import atomic_write, temporary_folder
from train.data.shards import BOS
from train.model.gpt import GPT

_SOURCES = Path(__file__).parent
# golf_inference.py computes the model; the other two files adapt it to the package transformers
_HF_SOURCES = ("golf_inference.py", "modeling_golf.py", "tokenization_golf.py")


@dataclass(frozen=True)
class Exported:
    """A model to be written. `window` is its window length in tokens. Only the format hf needs `tokenizer`."""

    model: GPT
    window: int
    tokenizer: Path | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The settings that determine what the model computes, and the window length."""
        values = self.model.config.to_dict()
        return {name: values[name] for name in MODEL_FIELDS} | {"window": self.window}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.float().contiguous().clone() for name, tensor in self.model.state_dict().items()}


@dataclass(frozen=True)
class ExportFormat:
    """A format: description for --help, suffix of the output's name, and function that writes the model."""

    about: str
    suffix: str
    write: Callable[[Exported, Path], object]


def write_state_dict(exported: Exported, path: Path) -> None:
    write_tensors(path, exported.tensors)


def write_safetensors(exported: Exported, path: Path) -> None:
    from safetensors.torch import save

    atomic_write(path, save(exported.tensors, {"format": "pt", "config": json.dumps(exported.config)}))


def write_hf(exported: Exported, path: Path) -> None:
    """Write a folder that the package transformers loads. After an error there is no folder."""
    assert exported.tokenizer is not None
    with temporary_folder(path) as work:
        folder = work / "hf"
        folder.mkdir()
        write_safetensors(exported, folder / "model.safetensors")
        special = {"bos_token_id": BOS, "eos_token_id": BOS, "pad_token_id": 0}
        for name, values in {
            "config.json": {
                "architectures": ["GolfForCausalLM"],
                "model_type": "golf",
                "auto_map": {
                    "AutoConfig": "modeling_golf.GolfConfig",
                    "AutoModelForCausalLM": "modeling_golf.GolfForCausalLM",
                },
                "torch_dtype": "float32",
                "tie_word_embeddings": False,
                "use_cache": False,
                **special,
                **exported.config,
            },
            "generation_config.json": {"use_cache": False, **special},
            "tokenizer_config.json": {
                "tokenizer_class": "GolfTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_golf.GolfTokenizer", None]},
                "clean_up_tokenization_spaces": False,
            },
        }.items():
            atomic_write(folder / name, json.dumps(values, indent=1) + "\n")
        for name in _HF_SOURCES:
            atomic_write(folder / name, (_SOURCES / name).read_bytes())
        atomic_write(folder / "tokenizer.model", exported.tokenizer.read_bytes())
        os.rename(folder, path)


FORMATS = {
    "safetensors": ExportFormat(
        "float32 tensors, with the model's fields as metadata", ".safetensors", write_safetensors
    ),
    "state_dict": ExportFormat(
        "float32 tensors by torch.save, for weights_only=True", "_state_dict.pt", write_state_dict
    ),
    "hf": ExportFormat("a folder that transformers loads with trust_remote_code", "_hf", write_hf),
}
