"""The paid prefix: its published arithmetic, its part in a score, its label, and what is refused."""

import lzma
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scoring_example import CONFIG, StandIn, make_text
from submission_example import make_run, make_summary

from train.common.errors import UserError
from train.config import Config
from train.data.paid_prefix import (
    NOT_COMPLIANT,
    build_prefix,
    decode_prefix,
    encode_prefix,
    prefix_bytes,
    read_prefix,
)
from train.data.shards import write_shard
from train.evaluate.scoring import evaluate_model
from train.recipes import load_recipe, recipe_names
from train.run.folder import RunFolder
from train.submission.paid_prefix import main
from train.submission.record import RecordDetails, write_record
from train.submission.summary import Summary, size_line, summary_text


def test_the_published_arithmetic_holds(tmp_path: Path) -> None:
    # as many targets as the stock validation text of vocabulary 1,024 has
    tokens = np.resize(np.arange(1021, dtype=np.uint16), 62_021_632 + 1)
    blob = encode_prefix(tokens[1 : 6_200_000 + 1])
    raw = lzma.decompress(blob)
    assert len(raw) == 12_400_000
    assert raw[:4] == bytes([1, 0, 2, 0])
    (tmp_path / "prefix.xz").write_bytes(blob)
    prefix = read_prefix(tmp_path / "prefix.xz", tokens)
    assert (prefix.targets, prefix.blob_bytes) == (6_200_000, len(blob))
    assert round(100 * prefix.coverage, 5) == 9.99651
    # of #262: model, prefix and code
    summary = make_summary(
        bytes_model=11_667_026, bytes_code=67_890, bytes_prefix=4_240_472, bytes_total=15_975_388, model_groups={}
    )
    assert "code 67,890 + paid prefix 4,240,472 + model 11,667,026 = 15,975,388 of 16,000,000" in size_line(summary)


@pytest.mark.parametrize(("rule", "stride"), [("once", 8), ("overlap_tail", 8), ("full_windows", 8), ("once", 0)])
def test_known_targets_cost_no_nats_and_their_bytes_count(rule: str, stride: int) -> None:
    tokens, sizes = make_text(150)
    arguments = {"stride": stride, "seq_len": 32, "rule": rule}
    known = np.random.default_rng(3).random(149) < 0.4
    plain = evaluate_model(StandIn(), tokens, sizes, CONFIG, **arguments)
    paid = evaluate_model(StandIn(), tokens, sizes, CONFIG, known=known, **arguments)
    # one target at a time: what it costs is what the sum loses
    each = []
    for target in np.flatnonzero(known):
        alone = np.arange(149) == target
        score = evaluate_model(StandIn(), tokens, sizes, CONFIG, known=alone, **arguments)
        each.append((plain.val_loss - score.val_loss) * plain.tokens)
    assert paid.val_loss * paid.tokens == pytest.approx(plain.val_loss * plain.tokens - math.fsum(each), abs=1e-4)
    assert max(each) > 1
    assert (paid.bytes, paid.tokens) == (plain.bytes, plain.tokens)


def test_a_wrong_token_in_the_blob_is_charged(tmp_path: Path) -> None:
    tokens, _ = make_text(40)
    targets = tokens[1:21].copy()
    targets[4] += 1
    (tmp_path / "p.xz").write_bytes(encode_prefix(targets))
    known = read_prefix(tmp_path / "p.xz", tokens).known
    assert known.tolist() == [index < 20 and index != 4 for index in range(39)]


def make_shards(folder: Path, counts: tuple[int, ...]) -> np.ndarray:
    tokens = [
        np.random.default_rng(seed).integers(1, 900, count).astype(np.uint16) for seed, count in enumerate(counts)
    ]
    for index, shard in enumerate(tokens):
        write_shard(folder / f"made_val_{index:06d}.bin", shard)
    return np.concatenate(tokens)


def test_the_command_reads_across_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = make_shards(tmp_path, (300, 200))
    output = tmp_path / "p.xz"
    assert main(["build", "--val-dir", str(tmp_path), "--num-tokens", "400", "--output", str(output)]) == 0
    assert decode_prefix(output.read_bytes(), 400).tolist() == tokens[1:401].tolist()
    printed = capsys.readouterr().out
    assert "400 target tokens, 80.16032 % of the validation text" in printed and NOT_COMPLIANT in printed


@pytest.mark.parametrize("count", [0, -3, 500])
def test_a_text_that_is_too_short_is_refused(tmp_path: Path, count: int) -> None:
    make_shards(tmp_path, (300, 200))
    with pytest.raises(UserError, match=r"--num-tokens: expected 1 to 499"):
        build_prefix(tmp_path, count, tmp_path / "p.xz")
    assert not (tmp_path / "p.xz").exists()


def test_the_command_ends_on_bad_input_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.submission.paid_prefix", "build", "--val-dir", str(tmp_path / "none")]
    command += ["--num-tokens", "3", "--output", str(tmp_path / "p.xz")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda blob: blob[:-9], "ends early"),
        (lambda blob: b"not xz at all", "not an .xz stream"),
        (lambda blob: blob[:40] + bytes([blob[40] ^ 255]) + blob[41:], "damaged"),
        (lambda blob: lzma.compress(b"abc"), "ends early"),
        (lambda blob: lzma.compress(bytes(2 * 51)), "more targets than the validation text's 50"),
        (lambda blob: lzma.compress(bytes(10_000_000)), "more targets"),
    ],
)
def test_bad_blobs_are_refused_by_name(tmp_path: Path, damage, message: str) -> None:
    tokens, _ = make_text(51)
    (tmp_path / "p.xz").write_bytes(damage(encode_prefix(tokens[1:31])))
    with pytest.raises(UserError, match=rf"paid_prefix_file: .*p\.xz: .*{message}"):
        read_prefix(tmp_path / "p.xz", tokens)


def test_a_missing_blob_is_refused_by_name(tmp_path: Path) -> None:
    config = Config(paid_prefix_file=str(tmp_path / "none.xz"))
    for read in (lambda: prefix_bytes(config), lambda: read_prefix(config.paid_prefix_file, np.zeros(3, np.uint16))):
        with pytest.raises(UserError, match=r"paid_prefix_file: .*none\.xz: "):
            read()


@pytest.mark.parametrize("name", recipe_names())
def test_no_recipe_turns_it_on(name: str) -> None:
    assert load_recipe(name).config().paid_prefix_file == ""
    assert prefix_bytes(load_recipe(name).config()) == 0


def test_the_label_stands_in_json_readme_plots_and_the_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = make_summary(bytes_prefix=100, bytes_total=15_981_400, label=NOT_COMPLIANT)
    assert Summary.from_dict(summary.to_dict()) == summary
    titles: list[str] = []
    monkeypatch.setattr("train.submission.plots._save", lambda figure, path: titles.append(figure.get_suptitle()))
    run = make_run(tmp_path, summary)
    write_record(RunFolder(run), summary, RecordDetails(blurb="My own words."))
    assert len(titles) == 3 and all(NOT_COMPLIANT in title for title in titles)
    record = (run / "submission.json").read_text()
    assert f'"label": "{NOT_COMPLIANT}"' in record
    assert f'"blurb": "{NOT_COMPLIANT}. My own words."' in record
    assert '"bytes_paid_prefix": 100' in record
    assert (run / "README.md").read_text().splitlines()[0].endswith(f"({NOT_COMPLIANT})")
    assert NOT_COMPLIANT in summary_text(summary)
    assert NOT_COMPLIANT not in summary_text(make_summary())
