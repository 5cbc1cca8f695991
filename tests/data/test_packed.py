"""Loader packed: rows and documents of #2014 and #2135 against numbers of their scripts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.config import Config, ConfigError
from train.data.dataset import Dataset
from train.data.loaders import Loader
from train.data.shards import write_shard
from train.loop import PREFETCHED_STEPS
from train.model.documents import Documents

ORACLES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "fixtures/frontier_training.json").read_text(encoding="utf-8")
)["4_document_packing"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for shard, size in enumerate(ORACLES["shards"]["sizes"]):
        j = torch.arange(size)
        tokens = 2 + (7 * j * j + 13 * j + 5 + 101 * shard) % 8190
        tokens[(j % 29 == 3 + shard) | (j % 47 == 10)] = 1
        assert tokens[:6].tolist() == ORACLES["shards"]["first_tokens"][shard]
        write_shard(folder / f"fineweb_train_{shard:06d}.bin", tokens.numpy())
    return folder


def config(data: Path, **changes: object) -> Config:
    return Config(
        data_path=str(data), vocab_size=8192, train_seq_len=8, train_batch_tokens=8 * 40, loader="packed", document_masking=True,
        rope_scaling="none",
    ).replace(**changes)  # fmt: skip


def loader_of(settings: Config, rank: int = 0, world_size: int = 8) -> Loader:
    return Dataset(settings).loader(Ranks(rank=rank, world_size=world_size))


@pytest.mark.parametrize("run", ["A_W8", "B_W8"])
def test_rows_and_documents_are_those_of_the_scripts(run: str, data: Path) -> None:
    oracle, loaders = ORACLES["runs"][run], [loader_of(config(data), rank) for rank in range(8)]
    compared = 0
    for step, expected in enumerate(oracle["batches"]):
        longest = oracle["max_piece_per_step"][min(step, len(oracle["max_piece_per_step"]) - 1)]
        if run == "B_W8" and step in (2, 5):
            # the documents are longer from here on, and the script drops what it has prefetched
            assert {loader.skip(PREFETCHED_STEPS) for loader in loaders} == {2 * 8 * 41}
        rows = [loader.next_batch() for loader in loaders]
        for span in expected["spans"]:
            ((inputs, targets),) = rows[span["rank"]]
            assert list(inputs.shape) == span["shape"] and torch.equal(inputs[:, 1:], targets[:, :-1])
            assert inputs[0, :3].tolist() == span["inputs_first3"] and inputs[0, -2:].tolist() == span["inputs_last2"]
            assert int(targets[0, -1]) == span["target_last"]
            starts = Documents.of(inputs, longest).starts[0].nonzero().flatten().tolist()
            assert [*starts, 40] == span["cu"]
            compared += 1
    assert compared == sum(len(batch["spans"]) for batch in oracle["batches"])


@pytest.mark.parametrize("case", ORACLES["piece_starts_alone"], ids=lambda case: str(case["pieces"]))
def test_documents_of_a_whole_row(case: dict[str, Any]) -> None:
    bos = case["bos"] if isinstance(case["bos"], list) else [7 * j * j + 3 * j for j in range(100)]
    ids = torch.full((1, case["T"]), 5)
    ids[0, [place for place in bos if place < case["T"]]] = 1
    documents = Documents.of(ids, case["max_piece"])
    starts = documents.starts[0].nonzero().flatten()
    assert (len(starts), int(starts.sum())) == (case["pieces"], case["sum_of_starts"])
    assert starts[:8].tolist() == case["first8"] and starts[-3:].tolist() == case["last3_starts"]
    # the backends that take lengths get the same documents
    offsets = documents.offsets()
    assert offsets[: len(starts)].tolist() == starts.tolist() and int(offsets[-1]) == case["T"]
    assert int(offsets.diff().max()) == case["longest"] <= documents.longest


def test_what_packed_rows_need(data: Path, tmp_path: Path) -> None:
    for change in ({"document_masking": False}, {"rope_scaling": "ntk"}):
        with pytest.raises(ConfigError, match="set DOCUMENT_MASKING=1 and ROPE_SCALING=none"):
            config(data, **change)
    with pytest.raises(UserError, match="no training shard holds 1608 tokens after its first document"):
        loader_of(config(data, train_batch_tokens=8 * 200))
    # a shard without a document has no rows
    write_shard(tmp_path / "x_train_000000.bin", torch.full((2000,), 7).numpy())
    with pytest.raises(UserError, match="after its first document"):
        loader_of(config(tmp_path))
