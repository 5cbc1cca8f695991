"""The rule check: a sound record passes, and each broken rule fails with its own line and no other."""

import base64
import bz2
import json
import lzma
import math
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import brotli
import pytest
from record_example import BYTES, CODE, RUNS, TOKENS, edit, edit_json, log_text, loss_of, make_record
from sentencepiece import SentencePieceTrainer

from train.errors import UserError
from train.script.single_file import LATIN1, _latin1_literal
from train.submission.__main__ import main
from train.submission.evidence import read_evidence
from train.submission.rules import RULES, Verdict, judge
from train.submission.rules.scoring import TEXTS


def verdicts(folder: Path, verdict: Verdict) -> dict[str, str]:
    return {item.rule: item.value for item in judge(read_evidence(folder)) if item.verdict is verdict}


def failures(folder: Path) -> dict[str, str]:
    return verdicts(folder, Verdict.FAILS)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return make_record(tmp_path / "record")


def test_a_sound_record_keeps_every_rule(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(record)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("ok ")]) == len(RULES)
    assert "20 of 20 rules hold." in lines
    assert any("15,981,300 (seed 42), 18,700 to spare  (limit: 16,000,000 bytes)" in line for line in lines)
    assert any("590.127 + 9.5 = 599.6 s (seed 1337)" in line for line in lines)


def test_too_many_bytes(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the sparse derivative of #262: 12,201,906 + 4,240,256 + 83,592
    total = 12_201_906 + 4_240_256 + 83_592
    edit_json(record, bytes_total=total)
    assert failures(record) == {"code and model together": "16,525,754 (submission.json), 525,754 too many"}
    assert main(["check", str(record)]) == 1
    output = capsys.readouterr().out
    assert "FAIL     code and model together" in output and "Failed: code and model together." in output


def test_bytes_that_are_neither_model_nor_code(record: Path) -> None:
    # #262: 11,667,026 + 67,890 leave 4,240,472 bytes of prefix
    edit_json(record, bytes_total=15_975_388, bytes_model=11_667_026, bytes_code=67_890)
    source = record / "train_gpt.py"
    source.write_text(source.read_text()[:67_890])
    found = failures(record)
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
        ("It is never trained on validation data.", Verdict.HOLDS),
        ("Test-time training on validation tokens that were already scored.", Verdict.UNSEEN),
        ("Trained on the training set, scored on the validation set.", Verdict.HOLDS),
    ],
)
def test_validation_tokens_in_training(record: Path, text: str, verdict: Verdict) -> None:
    edit(record / "README.md", "# A record\n", f"# A record\n\n{text}\n")
    assert "no validation tokens in training" in verdicts(record, verdict)


@pytest.mark.parametrize(
    ("old", "new", "rule", "words"),
    [
        (
            "1.08725556",
            "1.08725557",
            "README agrees with json and logs",
            "1.08725557 in README.md, 1.08725556 measured",
        ),
        (
            "1.08655776",
            "1.08855776",
            "README agrees with json and logs",
            "1.08855776 in README.md, 1.08655776 measured",
        ),
        ("15,975,819", "15,975,818", "README agrees with json and logs", "15,975,818 in README.md, 15975819 measured"),
        ("| 2024 | 1.08585085", "| 2024 | 1.0858", "", ""),
        (
            "| 2024 | 1.08585085",
            "| 2024 | 1.0860",
            "README agrees with json and logs",
            "1.0860 in README.md's row of seed 2024",
        ),
    ],
)
def test_one_digit_in_the_readme(record: Path, old: str, new: str, rule: str, words: str) -> None:
    edit(record / "README.md", old, new)
    found = failures(record)
    assert list(found) == ([rule] if rule else []) and words in found.get(rule, "")


@pytest.mark.parametrize("seed", list(RUNS))
def test_one_digit_between_json_and_log(record: Path, seed: str) -> None:
    bpb = f"{RUNS[seed][0]:.8f}"
    other = bpb[:-1] + str((int(bpb[-1]) + 1) % 10)
    edit(record / f"train_seed{seed}.log", f"val_bpb:{bpb}", f"val_bpb:{other}")
    found = failures(record)["submission.json agrees with the logs"]
    assert found == f"train_seed{seed}.log: val_bpb is {float(other)}, json says {float(bpb)}"


def test_one_digit_beside_a_lost_zero(record: Path) -> None:
    # json writes 1.0872555, and the log must not say 1.08725553
    results = json.loads((record / "submission.json").read_text())["seed_results"]
    results["42"]["val_bpb"] = 1.08725550
    edit_json(record, seed_results=results)
    assert "submission.json agrees with the logs" in failures(record)


def test_mean_that_is_not_the_mean(record: Path) -> None:
    edit_json(record, val_bpb=1.08655473)
    assert (
        failures(record)["mean and deviation are those of the seeds"] == "val_bpb 1.08655473, of the seeds 1.08655472"
    )


@pytest.mark.parametrize(("clock", "fails"), [(600_100, False), (600_118, False), (601_000, True)])
def test_training_clock(record: Path, clock: int, fails: bool) -> None:
    # a step of 118.86 ms that began at 599.99 s may end
    (record / "train_seed42.log").write_text(log_text("42", clock=clock, calibration=0.0))
    assert list(failures(record)) == (["training", "training and calibration on training data"] if fails else [])
    if fails:
        assert failures(record)["training"] == "601.000 s (seed 42), steps of 118.9 ms"


def test_calibration_outside_the_clock(record: Path) -> None:
    # #1471: training ended at 590.04 s, the Hessians took 10.6 s more
    (record / "train_seed42.log").write_text(log_text("42", clock=590_040, calibration=10.6))
    found = failures(record)
    assert found == {"training and calibration on training data": "590.040 + 10.6 = 600.6 s (seed 42)"}


def test_calibration_that_nobody_timed_is_not_seen(record: Path) -> None:
    for seed in RUNS:
        edit(record / f"train_seed{seed}.log", "gptq:calibrated", "something else:")
    assert "training and calibration on training data" in verdicts(record, Verdict.UNSEEN)
    edit(record / "train_seed42.log", "something else:", "gptq:generated 64 sequences in 196.0s, something else:")
    assert "generated text" in verdicts(record, Verdict.HOLDS)["training and calibration on training data"]


def test_evaluation_clock(record: Path) -> None:
    results = json.loads((record / "submission.json").read_text())["seed_results"]
    results["42"]["eval_time_s"] = 601.0
    edit_json(record, seed_results=results)
    edit(record / "train_seed42.log", "eval_time:79200ms", "eval_time:601000ms")
    assert failures(record) == {"evaluation": "601.0 s (seed 42)"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds(tmp_path: Path, seeds: int) -> None:
    record = make_record(tmp_path / "record")
    submission = json.loads((record / "submission.json").read_text())
    kept = list(RUNS)[:seeds]
    for seed in set(RUNS) - set(kept):
        (record / f"train_seed{seed}.log").unlink()
        del submission["seed_results"][seed]
    edit_json(record, seeds=[int(seed) for seed in kept], seed_results=submission["seed_results"])
    assert failures(record)["seeds"] == f"{seeds}: {', '.join(kept)}"


def test_a_tail_that_is_scored_32_times(record: Path) -> None:
    # 31 windows of 64 tokens too many; the flat evaluation gives away what a token stands for
    (record / "train_seed42.log").write_text(log_text("42", tokens=TOKENS + 31 * 64, size=BYTES + 31 * 230))
    found = failures(record)
    assert "train_seed42.log: 3.7266246" in found["every token scored once"]
    assert "3.7266311 in the flat evaluation" in found["every token scored once"]


def test_a_tail_that_is_scored_32_times_in_a_published_record(tmp_path: Path) -> None:
    # #1019's first seed, of which the folder has no log
    values = {"seed_results": {"314": {"val_loss": 1.88276292, "val_bpb": 1.11508120}}}
    (tmp_path / "submission.json").write_text(json.dumps(values))
    assert failures(tmp_path)["every token scored once"].endswith("sp1024 with its last 64 tokens scored 32 times")


def test_counts_in_the_json_decide(record: Path) -> None:
    facts = {"rule": "once", "tokens": TOKENS, "validation_tokens": TOKENS}
    edit_json(record, evaluation=facts)
    assert not failures(record)
    edit_json(record, evaluation={**facts, "rule": "overlap_tail", "tokens": TOKENS + 1984})
    assert failures(record)["every token scored once"] == "40,542,144 of 40,540,160 tokens, rule overlap_tail"
    edit_json(record, evaluation={**facts, "tokens": 1000, "validation_tokens": 1000})
    assert failures(record) == {"the challenge's validation text": "1,000 tokens: another text"}


def test_a_tokenizer_without_a_piece_for_the_space(record: Path, tmp_path: Path) -> None:
    # no space in the text, no piece for it
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 50)
    settings = {"model_type": "bpe", "byte_fallback": True, "bos_id": 1, "pad_id": 0, "eos_id": 2, "unk_id": 3}
    options = {"hard_vocab_limit": False, "required_chars": "abcdefgh", "minloglevel": 2, "add_dummy_prefix": False}
    SentencePieceTrainer.train(input=str(text), model_prefix=str(record / "bad"), vocab_size=272, **settings, **options)
    found = failures(record)
    assert list(found) == ["tokenizer counts bytes right"]
    assert "it has no piece '▁' for a lone space" in found["tokenizer counts bytes right"]
    (record / "bad.model").write_bytes(b"no model")
    assert "not a SentencePiece model" in failures(record)["tokenizer counts bytes right"]


def test_bytes_per_token_of_no_published_tokenizer_are_not_seen(record: Path) -> None:
    (record / "submission.json").write_text(json.dumps({"val_loss": 2.0, "val_bpb": 1.0}))
    for seed in RUNS:
        (record / f"train_seed{seed}.log").unlink()
    unseen = verdicts(record, Verdict.UNSEEN)
    assert {"tokenizer counts bytes right", "the challenge's validation text", "every token scored once"} <= set(unseen)


def test_hardware(record: Path) -> None:
    edit_json(record, hardware="4 cores of a laptop")
    assert failures(record) == {"hardware": "4 cores of a laptop"}
    edit_json(record, hardware="8 x H100 PCIe")
    assert list(failures(record)) == ["hardware"]


def test_code_that_is_counted_is_code_that_is_shipped(record: Path) -> None:
    with (record / "train_gpt.py").open("a") as stream:
        stream.write("#")
    assert failures(record) == {"code that is counted": f"{CODE:,} in submission.json, {CODE + 1:,} in the folder"}
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
    assert verdicts(record, Verdict.HOLDS)["code that is counted"] == "76,450; the runs logged 83,119"


def test_a_command_whose_variables_the_script_ignores(record: Path) -> None:
    edit(record / "README.md", "MATRIX_LR=0.02", "MATRIX_LR=0.02 MUON_WD=0.09 RECUR_LAYERS=4,5")
    rule = "README's command sets variables that the script reads"
    assert failures(record) == {rule: "ignored: MUON_WD, RECUR_LAYERS"}


RAW = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 6, "pb": 0}]}


@pytest.mark.parametrize(
    "compress",
    [brotli.compress, bz2.compress, lzma.compress, zlib.compress, lambda data: lzma.compress(data, **RAW)],
)
def test_a_compressed_script_is_read_without_running_it(record: Path, compress: Callable[[bytes], bytes]) -> None:
    rng = random.Random(1)
    filler = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=4000))
    rule = "README's command sets variables that the script reads"
    for known, verdict in (("seed matrix_lr", Verdict.HOLDS), ("seed", Verdict.FAILS)):
        packed = base64.b85encode(compress(f"raise SystemExit  # {known} {filler}".encode())).decode()
        (record / "train_gpt.py").write_text(f'import base64 as B;exec(L.decompress(B.b85decode("{packed}")))')
        assert rule in verdicts(record, verdict)
        literal = _latin1_literal(compress(f"raise SystemExit  # {known} {filler}".encode()))
        (record / "train_gpt.py").write_bytes(b'%bexec(decompress(%b.encode("latin1")))' % (LATIN1, literal))
        assert rule in verdicts(record, verdict)
    (record / "train_gpt.py").write_text(f"exec(f(b85decode('{'0' * 2000}')))")
    assert "compressed in an unknown way" in verdicts(record, Verdict.UNSEEN)[rule]


def test_missing_keys_and_files(record: Path) -> None:
    edit_json(record, bytes_code=None, blurb="")
    found = failures(record)
    assert found["the 14 common keys of submission.json"] == "missing or empty: blurb, bytes_code"
    assert found["code that is counted"] == "no bytes_code in submission.json, the logs say 83,119"
    (record / "submission.json").write_text("{")
    (record / "train_gpt.py").unlink()
    value = failures(record)["the files of a record"]
    assert "train_gpt.py" in value and "a readable submission.json (not readable as JSON" in value


def test_a_log_that_was_cut(record: Path) -> None:
    path = record / "train_seed1337.log"
    path.write_text(path.read_text()[:900])
    found = failures(record)
    assert found["logs run to their final score"] == "none in train_seed1337.log"


@pytest.mark.parametrize("number", ["nan", "inf", "0.00000000"])
def test_a_log_that_ends_without_a_sound_score(record: Path, number: str) -> None:
    edit(record / "train_seed1337.log", f"val_bpb:{RUNS['1337'][0]:.8f}", f"val_bpb:{number}")
    assert failures(record)["logs run to their final score"] == "none in train_seed1337.log"
    # what stands in the json is then what is judged
    assert read_evidence(record).result("1337")["val_bpb"] == RUNS["1337"][0]


@pytest.mark.parametrize(
    "value", ["x", [], {"a": 1}, True, 10**400, math.inf, math.nan], ids=lambda value: str(value)[:9]
)
def test_what_is_no_number_in_the_json_is_not_there(record: Path, value: object) -> None:
    names = ("val_loss", "val_bpb", "val_bpb_std", "bytes_total", "bytes_code", "eval_time_seconds")
    results = {seed: dict.fromkeys(("val_bpb", "val_loss", "artifact_bytes", "steps"), value) for seed in RUNS}
    facts = {"rule": "once", "tokens": value, "validation_tokens": value}
    edit_json(record, seed_results=results, evaluation=facts, **dict.fromkeys(names, value))
    found = failures(record)
    assert found.pop("code that is counted") == "no bytes_code in submission.json, the logs say 83,119"
    # an empty list or object is a missing key
    assert set(found) <= {"the 14 common keys of submission.json"}
    assert "every token scored once" in verdicts(record, Verdict.HOLDS)


@pytest.mark.parametrize("text", ["0.123456789012345", "1.0865547" + "1" * 40, "9" * 5000], ids=["15", "47", "5000"])
def test_long_numbers_in_the_readme_agree_with_nothing(record: Path, text: str) -> None:
    edit_json(record, seeds_drawn=10**17)
    edit(record / "README.md", "# A record", f"# A record\n\n{text}")
    assert failures(record) == {}


def test_a_foreign_folder_with_a_readme_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(
        "# Something\n\nRun on 8xH100 SXM, val_bpb 1.1, not trained on validation data.\n"
    )
    assert main(["check", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "ok       hardware" in output and "not seen training" in output
    assert "Could not be seen: " in output.splitlines()[-1]


def test_what_is_no_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_evidence(tmp_path / "none")
    with pytest.raises(UserError, match="not a record: neither"):
        read_evidence(tmp_path)


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
    assert "total = model + code" in verdicts(tmp_path, Verdict.HOLDS)
    assert ("code and model together" in found) == (total > 16_000_000)
    # a prefix that nobody names is so many bytes too many
    (tmp_path / "submission.json").write_text(json.dumps({**values, "bytes_paid_prefix": 0, "bytes_total": total + 1}))
    assert f"is {other + 1:+,} from" in failures(tmp_path)["total = model + code"]


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
    held = verdicts(tmp_path, Verdict.HOLDS)
    assert held["the challenge's validation text"].endswith(f"bytes per token: {name}")
    assert name in held["every token scored once"] and name in held["tokenizer counts bytes right"]


def test_losses_of_the_example_are_the_identity() -> None:
    # #1471's flat pair, as logged
    assert loss_of(1.10409460) == pytest.approx(2.85199103, abs=2e-8)
