"""The rule check: a sound record passes, and each broken rule fails with its own line and no other."""

import json
import math
from pathlib import Path

import pytest
from record_example import (
    BYTES,
    CODE,
    RUNS,
    TOKENS,
    edit,
    edit_json,
    failures,
    log_text,
    loss_of,
    make_record,
    notes,
    verdicts,
)
from sentencepiece import SentencePieceTrainer

from train.submission.__main__ import main
from train.submission.check import RULES
from train.submission.record_scores import TEXTS
from train.submission.rules.finding import Verdict


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return make_record(tmp_path / "record")


def test_a_sound_record_keeps_every_rule(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(record)]) == 0
    output = capsys.readouterr().out
    assert f"  breaks      no rule; keeps {len(RULES)} of {len(RULES)}\n" in output and "note" not in output
    assert "  score       1.08655472 ± 0.00070236 bits per byte\n" in output
    assert "  read from   int6_sliding_window in train_seed42.log, line 23, and 2 other logs\n" in output
    assert "  also logged int6_roundtrip 1.10409460\n" in output
    assert "  size        15,981,300 (seed 42, logged total), 18,700 left\n" in output
    assert "590.127 + 9.5 = 599.6 s (seed 1337)\n" in output
    assert "  evaluation  79.2 s (int6_sliding_window, seed 42)\n" in output
    assert len(output.splitlines()) <= 40


def test_notes_fail_only_where_they_are_meant_to(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(record, blurb="")
    assert list(notes(record)) == ["keys of submission.json"]
    assert (main(["check", str(record)]), main(["check", str(record), "--strict"])) == (0, 1)
    capsys.readouterr()
    assert main(["check", str(record), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["val_bpb"] == 1.08655472 and found["other_scores"]["int6_roundtrip"] == 1.1040946
    assert {item["verdict"] for item in found["findings"]} == {"ok", "note"}


def test_too_many_bytes(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the sparse derivative of #262: 12,201,906 + 4,240,256 + 83,592
    total = 12_201_906 + 4_240_256 + 83_592
    edit_json(record, bytes_total=total)
    assert failures(record) == {"total size": "16,525,754 (submission.json), 525,754 too many"}
    assert main(["check", str(record)]) == 1
    output = capsys.readouterr().out
    assert "BREAKS      total size: 16,525,754 (submission.json), 525,754 too many (rule: code and model have" in output


def test_bytes_that_are_neither_model_nor_code(record: Path) -> None:
    # #262: 11,667,026 + 67,890 leave 4,240,472 bytes of prefix
    edit_json(record, bytes_total=15_975_388, bytes_model=11_667_026, bytes_code=67_890)
    source = record / "train_gpt.py"
    source.write_text(source.read_text()[:67_890])
    found = notes(record)
    assert "submission.json: 15,975,388 is +4,240,472 from 11,667,026 + 67,890" in found["total = model + code"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", "Built with a Paid Prefix of 6.2M tokens.\n"),
        ("train_seed42.log", "score NOT COMPLIANT: validation tokens in the artifact\n"),
    ],
)
def test_validation_tokens_in_the_artifact(record: Path, file: str, text: str) -> None:
    with (record / file).open("a") as stream:
        stream.write(text)
    assert list(failures(record)) == ["no validation tokens in the artifact"]
    assert file in failures(record)["no validation tokens in the artifact"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("After training we fine-tune the model on validation data.", Verdict.FAILS),
        ("A val-only run.", Verdict.FAILS),
        ("It is never trained on validation data.", Verdict.PASSES),
        ("Test-time training on validation tokens that were already scored.", Verdict.NOTE),
        ("Trained on the training set, scored on the validation set.", Verdict.PASSES),
    ],
)
def test_validation_tokens_in_training(record: Path, text: str, verdict: Verdict) -> None:
    edit(record / "README.md", "# A record\n", f"# A record\n\n{text}\n")
    assert "no training on validation tokens" in verdicts(record, verdict)


@pytest.mark.parametrize(("clock", "fails"), [(600_100, False), (600_237, False), (600_238, True)])
def test_training_clock(record: Path, clock: int, fails: bool) -> None:
    # the loop begins one step of 118.86 ms too many, because it reads the clock before the device is done
    (record / "train_seed42.log").write_text(log_text("42", clock=clock, calibration=0.0))
    assert failures(record) == ({"training time": "600.238 s (seed 42), 118.9 ms per step"} if fails else {})


def test_calibration_outside_the_clock(record: Path) -> None:
    # #1471: training ended at 590.04 s, the Hessians took 10.6 s more
    (record / "train_seed42.log").write_text(log_text("42", clock=590_040, calibration=10.6))
    value = "590.040 + 10.6 = 600.6 s (seed 42)"
    assert notes(record)["training and calibration time"] == f"{value}; up to 606.5 s was admitted" and not failures(
        record
    )
    (record / "train_seed42.log").write_text(log_text("42", clock=596_040, calibration=10.6))
    assert failures(record) == {"training and calibration time": value.replace("590", "596").replace("600.6", "606.6")}


def test_calibration_that_nobody_timed_is_not_seen(record: Path) -> None:
    for seed in RUNS:
        edit(record / f"train_seed{seed}.log", "gptq:calibrated", "something else:")
    assert "training and calibration time" in verdicts(record, Verdict.UNKNOWN)
    edit(record / "train_seed42.log", "something else:", "gptq:generated 64 sequences in 196.0s, something else:")
    assert "generated text" in verdicts(record, Verdict.PASSES)["training and calibration time"]


def test_evaluation_clock(record: Path) -> None:
    results = json.loads((record / "submission.json").read_text())["seed_results"]
    results["42"]["eval_time_s"] = 601.0
    edit_json(record, seed_results=results)
    edit(record / "train_seed42.log", "eval_time:79200ms", "eval_time:601000ms")
    assert failures(record) == {"evaluation time": "601.0 s (int6_sliding_window, seed 42)"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds(tmp_path: Path, seeds: int) -> None:
    record = make_record(tmp_path / "record")
    submission = json.loads((record / "submission.json").read_text())
    kept = list(RUNS)[:seeds]
    for seed in set(RUNS) - set(kept):
        (record / f"train_seed{seed}.log").unlink()
        del submission["seed_results"][seed]
    edit_json(record, seeds=[int(seed) for seed in kept], seed_results=submission["seed_results"])
    assert notes(record)["seeds"] == f"{seeds}: {', '.join(kept)}"
    # one seed has no deviation, which the line about seeds already says
    edit_json(record, val_bpb_std=None)
    assert ("keys of submission.json" in notes(record)) == (seeds > 1)


def test_a_tail_that_is_scored_32_times(record: Path) -> None:
    # 31 windows of 64 tokens too many; the flat evaluation gives away what a token stands for
    (record / "train_seed42.log").write_text(log_text("42", tokens=TOKENS + 31 * 64, size=BYTES + 31 * 230))
    found = notes(record)["each token scored once"]
    assert found == "3.7266246 bytes per token (seed 42), sp8192 has 3.7266311: the last tokens are scored again"
    assert not failures(record)


def test_a_tail_that_is_scored_32_times_in_a_published_record(tmp_path: Path) -> None:
    # #1019's first seed, of which the folder has no log
    values = {"seed_results": {"314": {"val_loss": 1.88276292, "val_bpb": 1.11508120}}}
    (tmp_path / "submission.json").write_text(json.dumps(values))
    assert "sp1024 has 2.4359301: the last tokens are scored again" in notes(tmp_path)["each token scored once"]


def test_counts_in_the_json_decide(record: Path) -> None:
    facts = {"rule": "once", "tokens": TOKENS, "validation_tokens": TOKENS}
    edit_json(record, evaluation=facts)
    assert not failures(record)
    edit_json(record, evaluation={**facts, "rule": "overlap_tail", "tokens": TOKENS + 1984})
    assert notes(record)["each token scored once"] == "40,542,144 of 40,540,160 tokens, rule overlap_tail"
    edit_json(record, evaluation={**facts, "tokens": 1000, "validation_tokens": 1000})
    assert failures(record) == {"validation text": "1,000 tokens: another text"}


@pytest.mark.parametrize(
    ("window", "tokens"), [(2048, 47_851_520), (2560, 47_851_520), (2816, 47_852_288), (3072, 47_852_544)]
)
def test_whole_windows_of_the_caseops_text_are_the_text(record: Path, window: int, tokens: int) -> None:
    facts = {"rule": "once", "tokens": tokens, "validation_tokens": tokens, "window": window}
    edit_json(record, evaluation=facts)
    assert f"{tokens:,} tokens: CaseOps sp8192" in verdicts(record, Verdict.PASSES)["validation text"]
    edit_json(record, evaluation={**facts, "tokens": tokens - window, "validation_tokens": tokens - window})
    assert "validation text" in failures(record)


def test_a_tokenizer_without_a_piece_for_the_space(record: Path, tmp_path: Path) -> None:
    # no space in the text, no piece for it
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 50)
    settings = {"model_type": "bpe", "byte_fallback": True, "bos_id": 1, "pad_id": 0, "eos_id": 2, "unk_id": 3}
    options = {"hard_vocab_limit": False, "required_chars": "abcdefgh", "minloglevel": 2, "add_dummy_prefix": False}
    SentencePieceTrainer.train(input=str(text), model_prefix=str(record / "bad"), vocab_size=272, **settings, **options)
    found = failures(record)
    assert list(found) == ["tokenizer counts bytes correctly"]
    assert "it has no piece '▁' for a lone space" in found["tokenizer counts bytes correctly"]
    (record / "bad.model").write_bytes(b"no model")
    assert "not a SentencePiece model" in failures(record)["tokenizer counts bytes correctly"]


def test_bytes_per_token_of_no_published_tokenizer_are_not_seen(record: Path) -> None:
    (record / "submission.json").write_text(json.dumps({"val_loss": 2.0, "val_bpb": 1.0}))
    for seed in RUNS:
        (record / f"train_seed{seed}.log").unlink()
    unknown = verdicts(record, Verdict.UNKNOWN)
    assert {"tokenizer counts bytes correctly", "validation text", "each token scored once"} <= set(unknown)


def test_hardware(record: Path) -> None:
    edit_json(record, hardware="4 cores of a laptop")
    assert failures(record) == {"hardware": "4 cores of a laptop (submission.json)"}
    edit_json(record, hardware="8 x H100 PCIe")
    assert list(failures(record)) == ["hardware"]


def test_code_that_is_counted_is_code_that_is_shipped(record: Path) -> None:
    with (record / "train_gpt.py").open("a") as stream:
        stream.write("#")
    assert notes(record) == {
        "bytes_code is the size of the code": f"{CODE:,} is the code of the log; the folder has {CODE + 1:,}"
    }
    # the runs of #1392 logged 143,667 bytes, the record ships 76,450
    (record / "train_gpt.py").unlink()
    (record / "train").mkdir()
    (record / "train_gpt.py").write_text("# seed matrix_lr\n" + "#" * 50_000)
    (record / "train/part.py").write_text("#" * (76_450 - 50_017))
    results = json.loads((record / "submission.json").read_text())["seed_results"]
    for seed, (_, model, _, _) in RUNS.items():
        results[seed]["artifact_bytes"] = model + 76_450
    edit_json(record, bytes_code=76_450, seed_results=results, bytes_total=15_898_181 + 76_450)
    for _, model, _, _ in RUNS.values():
        edit(record / "README.md", f"{model + CODE:,}", f"{model + 76_450:,}")
    assert not failures(record)
    assert verdicts(record, Verdict.PASSES)["bytes_code is the size of the code"] == "76,450; logged: 83,119"


# model, other parts, code, total of published records; #1392 with the code of its README and with the logged one
SIZES = [
    (15_815_847, 0, 47_642, 15_863_489),
    (11_667_026, 4_240_472, 67_890, 15_975_388),
    (12_201_906, 4_240_256, 83_592, 16_525_754),
    (15_289_740, 0, 63_530, 15_353_270),
    (15_624_965, 0, 64_415, 15_689_380),
    (15_748_095, 0, 76_450, 15_824_545),
    (15_792_991, 0, 76_450, 15_869_441),
    (15_799_271, 0, 76_450, 15_875_721),
    (15_748_095, 0, 143_667, 15_891_762),
    (15_792_991, 0, 143_667, 15_936_658),
    (15_799_271, 0, 143_667, 15_942_938),
    (15_898_181, 0, 83_119, 15_981_300),
    (15_895_751, 0, 83_119, 15_978_870),
    (15_892_700, 0, 83_119, 15_975_819),
    (15_973_467, 0, 15_516, 15_988_983),
]


@pytest.mark.parametrize(("model", "other", "code", "total"), SIZES)
def test_published_totals_are_judged_from_their_parts(
    tmp_path: Path, model: int, other: int, code: int, total: int
) -> None:
    values = {"bytes_model": model, "bytes_code": code, "bytes_total": total, "bytes_paid_prefix": other}
    (tmp_path / "submission.json").write_text(json.dumps(values))
    found = failures(tmp_path)
    assert "total = model + code" in verdicts(tmp_path, Verdict.PASSES)
    assert ("total size" in found) == (total > 16_000_000)
    # a prefix that nobody names is so many bytes too many
    (tmp_path / "submission.json").write_text(json.dumps({**values, "bytes_paid_prefix": 0, "bytes_total": total + 1}))
    assert f"is {other + 1:+,} from" in notes(tmp_path)["total = model + code"]


@pytest.mark.parametrize(
    ("loss", "bpb", "name", "bytes_per_token"),
    [
        (1.94077647, 1.14943715, "sp1024", 2.4359301),
        (2.39821507, 1.16836161, "sp2048", 2.9613203),
        (2.58004547, 1.12125804, "sp4096", 3.3196808),
        (2.85199103, 1.10409460, "sp8192", 3.7266311),
    ],
)
def test_published_pairs_name_their_validation_text(
    tmp_path: Path, loss: float, bpb: float, name: str, bytes_per_token: float
) -> None:
    tokens, size = TEXTS[name]
    assert loss / math.log(2) * tokens / size == pytest.approx(bpb, abs=1.2e-8)
    assert round(size / tokens, 7) == bytes_per_token
    (tmp_path / "submission.json").write_text(json.dumps({"val_loss": loss, "val_bpb": bpb}))
    held = verdicts(tmp_path, Verdict.PASSES)
    assert held["validation text"].endswith(f"bytes per token (submission.json): {name}")
    assert name in held["each token scored once"] and name in held["tokenizer counts bytes correctly"]


def test_losses_of_the_example_are_the_identity() -> None:
    # #1471's flat pair, as logged
    assert loss_of(1.10409460) == pytest.approx(2.85199103, abs=2e-8)
