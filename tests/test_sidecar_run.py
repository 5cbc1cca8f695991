"""A run on text with case operators: every score is per byte of the sidecar."""

import json
import math
import shutil
from pathlib import Path

import pytest
from submission_runs import narrow

from train.common.errors import UserError
from train.config import Config
from train.data.build import build_dataset
from train.data.corpus import split_documents, stdlib_documents
from train.data.shards import find_shards, load_validation_tokens, read_shard, write_shard
from train.evaluate.__main__ import main as evaluate
from train.evaluate.scores import read_evaluation
from train.export.__main__ import main as export
from train.pipeline import run_pipeline
from train.run.folder import RunFolder
from train.run.log_grammar import parse_log
from train.single_file.pack import script_modules, script_settings
from train.submission.runs import tokenizer_facts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Config]:
    root = tmp_path_factory.mktemp("sidecar")
    documents = [document for document, _ in zip(stdlib_documents(), range(12), strict=False)]
    build_dataset(*split_documents(documents, 6000), root / "data", 512, case_operators=True)
    config = narrow(root / "data", root, 1, iterations=2, recur_start_step=1, quantizer="rtn", samples="end")
    return run_pipeline(config), config


def sizes_of_targets(config: Config) -> list[int]:
    tokens = load_validation_tokens(config.data_path, max(config.train_seq_len, config.window))
    (shard,) = find_shards(config.data_path, "val")
    sidecar = Path(str(shard).replace("_val_", "_val_bytes_"))
    return read_shard(sidecar)[1 : len(tokens)].tolist()


def test_training_and_the_final_score_count_the_sidecar(finished: tuple[RunFolder, Config]) -> None:
    folder, config = finished
    sizes = sizes_of_targets(config)
    per_loss = len(sizes) / sum(sizes) / math.log(2)
    validations = parse_log(next(folder.path.glob("train_seed*.log")))["vals"]
    assert len(validations) == 2
    for line in validations.values():
        assert line["val_bpb"] == pytest.approx(line["val_loss"] * per_loss, abs=2e-4)
    entries = list(read_evaluation(folder).values())
    assert {entry["stride"] for entry in entries} == {0, 32}
    for entry in entries:
        assert (entry["tokens"], entry["bytes"]) == (len(sizes), sum(sizes))
        assert entry["val_bpb"] == pytest.approx(entry["val_loss"] * per_loss, rel=1e-9)


def test_samples_have_capitals_again(finished: tuple[RunFolder, Config]) -> None:
    # the prompts are import, def and The
    assert "artifact: The" in finished[0].samples.read_text()


def test_hugging_face_s_format_is_refused(finished: tuple[RunFolder, Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--to hf: .*_512_bpe\.model needs case operators"):
        export([str(finished[0].path), "--to", "hf", "--out", str(tmp_path / "hf")])


def test_evaluate_counts_the_sidecar(finished: tuple[RunFolder, Config], capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = finished
    sizes = sizes_of_targets(config)
    for stride, count in ((0, 300), (32, 200)):
        assert evaluate([str(folder.path), "--json", "--stride", str(stride), "--max-tokens", str(count)]) == 0
        assert json.loads(capsys.readouterr().out)["bytes"] == sum(sizes[:count])


def test_a_record_checks_the_sidecar(finished: tuple[RunFolder, Config], tmp_path: Path) -> None:
    _, config = finished
    facts = tokenizer_facts(config)
    assert facts["counts_bytes"] is True and "the sidecar counts" in facts["finding"]
    copy = Path(shutil.copytree(config.data_path, tmp_path / "data"))
    (sidecar,) = copy.glob("*_val_bytes_*.bin")
    write_shard(sidecar, 2 * read_shard(sidecar))
    assert tokenizer_facts(config.replace(data_path=str(copy)))["counts_bytes"] is False


def test_a_packed_script_reads_the_sidecar_and_leaves_the_transform_out(
    finished: tuple[RunFolder, Config],
) -> None:
    sources = script_modules("quickstart", script_settings(finished[1])).sources
    assert "read_sidecar" in sources["train/data/validation.py"]
    assert "train/data/case_operators.py" not in sources
