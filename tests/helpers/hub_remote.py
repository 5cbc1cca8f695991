"""A repository of published shards, as the downloader finds it."""

import json
from pathlib import Path

import numpy as np

from train.data.corpus import stdlib_documents
from train.data.shards import write_shard
from train.data.tokenizer import train_tokenizer

VOCAB = 400


def make_model(path: Path) -> bytes:
    documents = (document.text for document, _ in zip(stdlib_documents(), range(20), strict=False))
    train_tokenizer(documents, VOCAB, path)
    return path.read_bytes()


def make_remote(
    root: Path, model: bytes, *, prefix: str = "datasets", manifest: bool = True, first: int = 100, name: str = ""
) -> Path:
    """A repository as published: two validation and four training shards."""
    base = root / prefix
    dataset, tokenizer_file = f"fineweb10B_sp{VOCAB}{name}", f"fineweb_{VOCAB}_bpe{name}.model"
    shards = base / "datasets" / dataset
    shards.mkdir(parents=True)
    for split, count in (("val", 2), ("train", 4)):
        for index in range(count):
            write_shard(shards / f"fineweb_{split}_{index:06d}.bin", np.arange(first + index, first + index + 50))
    (shards / "fineweb_val_bytes_000000.bin").write_bytes(b"sidecar")
    (base / "tokenizers").mkdir()
    (base / "tokenizers" / tokenizer_file).write_bytes(model)
    if manifest:
        entry = {
            "name": dataset,
            "tokenizer_name": "bpe",
            "vocab_size": VOCAB,
            "bos_id": 1,
            "eos_id": 2,
        }
        entry["stats"] = {"files_train": 4, "files_val": 2, "tokens_train": 200, "tokens_val": 100}
        tokenizer = {
            "name": "bpe",
            "model_path": f"tokenizers/{tokenizer_file}",
            "vocab_path": "tokenizers/none.vocab",
        }
        (base / "manifest.json").write_text(json.dumps({"datasets": [entry], "tokenizers": [tokenizer]}))
    return root
