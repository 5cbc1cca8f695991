"""Trains a very narrow quickstart with several seeds, for the tests that make records of real runs."""

from pathlib import Path

from train.config import Config
from train.data.build import build_dataset
from train.data.corpus import split_documents, stdlib_documents
from train.pipeline import run_pipeline
from train.recipes import load_recipe


def make_dataset(out: Path, characters: int = 250_000, validation: int = 12_000) -> Path:
    """Build a dataset from about `characters` characters of the standard library, with a vocabulary of 512."""
    documents = []
    for document in stdlib_documents():
        documents.append(document)
        if sum(len(d.text) for d in documents) > characters:
            break
    parts = split_documents(documents, validation)
    build_dataset(*parts, out, 512)
    return out


def narrow(dataset: Path, runs: Path, seed: int, **changes: object) -> Config:
    """The settings of a quickstart that takes about a second."""
    values: dict[str, object] = dict(  # noqa: C408
        data_path=str(dataset), corpus="", runs_dir=str(runs), run_id=f"seed{seed}", seed=seed, vocab_size=512, model_dim=32,
        num_heads=2, num_kv_heads=1, rope_dims=4, ve_dim=8, train_seq_len=64, rope_train_seq_len=64, train_batch_tokens=1024,
        num_layers=4, xsa_last_n=4, ve_layers=(2, 3), parallel_start_layer=3, recur_layers=(1, 2), recur_start_step=2,
        bigram_vocab_size=64, bigram_dim=8, iterations=4, max_wallclock_seconds=0.0, gptq_reserve_seconds=0.0, gptq_calib_batches=2,
        val_loss_every=2, passthrough_max_elements=512, eval_stride=32, warmup_steps=1, device="cpu",
    )  # fmt: skip
    return load_recipe("quickstart").config(**{**values, **changes})


def make_runs(folder: Path, dataset: Path) -> list[Path]:
    return [run_pipeline(narrow(dataset, folder, seed)).path for seed in (42, 314, 999)]
