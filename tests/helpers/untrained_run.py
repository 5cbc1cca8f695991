"""A finished run folder with an untrained model, and the model's score by the slow loop of `plain_evaluation`."""

import json
from pathlib import Path

import numpy as np
import torch
from plain_evaluation import plain_bytes, plain_score

from train.artifact.storage import load_model, write_artifact
from train.config import Config
from train.data.shards import load_validation_tokens, write_shard
from train.data.tokenizer import byte_tables, load_tokenizer, train_tokenizer
from train.model.gpt import GPT
from train.quantize.quantize_model import quantize_model
from train.run.folder import RunFolder

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. ".split()
MODEL = Config(
    vocab_size=300,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    train_seq_len=32,
    train_batch_tokens=256,
    rope_train_seq_len=64,
    recur_layers=(1,),
    quantizer="rtn",
    passthrough_max_elements=64,
    embed_dtype="float32",
    eval_stride=8,
)


def make_untrained_run(root: Path) -> Path:
    """Write data, weights and artifact of an untrained model. Returns the run folder."""
    data, run = root / "data", root / "run"
    data.mkdir()
    run.mkdir()
    random = np.random.default_rng(3)
    documents = [" ".join(random.choice(TEXT, 40)) for _ in range(60)]
    tokenizer = train_tokenizer(documents, MODEL.vocab_size, data / "tiny_300_bpe.model")
    ids = np.concatenate([[1, *tokenizer.Encode(document)] for document in documents[:12]])
    write_shard(data / "tiny_val_000000.bin", ids)
    config = MODEL.replace(data_path=str(data))
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    torch.manual_seed(5)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    torch.save(model.state_dict(), run / "weights.pt")
    (run / "training.json").write_text(json.dumps({"recurrence": True}))
    write_artifact(run / "model.golf", quantize_model(model, config, {}), config, code_bytes=0)
    return run


def run_truth(run: Path, seq_len: int, stride: int, limit: int | None = None) -> tuple[float, int, int]:
    """Nats, tokens and bytes of the artifact's model, by `plain_score`."""
    config = RunFolder(run).read_config()
    tokens = load_validation_tokens(config.data_path, 32)[:limit]
    tables = byte_tables(load_tokenizer(Path(config.data_path) / "tiny_300_bpe.model", 300), 300)
    sizes = plain_bytes(tokens, tables)
    return plain_score(load_model(run / "model.golf"), tokens, sizes, seq_len, stride, "once", config.logit_softcap)
