"""What a record folder shows is read as it is: numbers that disagree, what is packed, cut off, missing or no number."""

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
from record_example import (
    RUNS,
    edit,
    edit_json,
    failures,
    make_record,
    notes,
    verdicts,
)

from train.common.errors import UserError
from train.single_file.pack import LATIN1, _latin1_literal
from train.submission.__main__ import main
from train.submission.record_folder import read_record_folder
from train.submission.rules.finding import Verdict


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return make_record(tmp_path / "record")


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        ("1.08655472", Verdict.PASSES),
        ("1.0866", Verdict.PASSES),
        ("1.0865.", Verdict.PASSES),
        ("1.0867", Verdict.NOTE),
        ("1.08655473", Verdict.NOTE),
        ("1.087", Verdict.PASSES),
        ("1.0877", Verdict.FAILS),
        ("1.08655472" + "0" * 5000, Verdict.PASSES),
    ],
    ids=lambda value: str(value)[:12],
)
def test_the_readme_states_the_score_rounded_or_cut(record: Path, score: str, verdict: Verdict) -> None:
    edit(record / "README.md", "val_bpb 1.08655472,", f"val_bpb {score}")
    assert "README states the score of submission.json" in verdicts(record, verdict)


@pytest.mark.parametrize("seed", list(RUNS))
def test_one_digit_between_json_and_log(record: Path, seed: str) -> None:
    bpb = f"{RUNS[seed][0]:.8f}"
    other = bpb[:-1] + str((int(bpb[-1]) + 1) % 10)
    edit(record / f"train_seed{seed}.log", f"val_bpb:{bpb}", f"val_bpb:{other}")
    found = notes(record)["the score is in a log"]
    near = f"{float(other)} (int6_sliding_window in train_seed{seed}.log)"
    assert found == f"seed {seed}: {float(bpb)} is in no log; the nearest is {near}"
    edit(record / f"train_seed{seed}.log", f"val_bpb:{other}", "val_bpb:1.09000000")
    assert "the nearest is 1.09 (" in failures(record)["the score is in a log"]


def test_one_digit_beside_a_lost_zero(record: Path) -> None:
    # json writes 1.0872555, and the log must not say 1.08725553
    results = json.loads((record / "submission.json").read_text())["seed_results"]
    results["42"]["val_bpb"] = 1.08725550
    edit_json(record, seed_results=results)
    assert "the score is in a log" in notes(record)


def test_mean_that_is_not_the_mean(record: Path) -> None:
    rule = "the headline is the mean of the seeds"
    edit_json(record, val_bpb=1.08655473)
    assert notes(record)[rule] == "val_bpb is 1.08655473, the seeds give 1.08655472"
    edit_json(record, val_bpb=RUNS["2024"][0])
    assert notes(record)[rule].endswith("the seeds give 1.08655472; it is a seed's alone")
    edit_json(record, val_bpb=1.0861)
    assert failures(record)[rule] == "val_bpb is 1.0861, the seeds give 1.08655472"


def test_a_command_whose_variables_the_script_ignores(record: Path) -> None:
    edit(record / "README.md", "MATRIX_LR=0.02", "MATRIX_LR=0.02 MUON_WD=0.09 RECUR_LAYERS=4,5")
    rule = "script reads the variables of README's command"
    assert notes(record) == {rule: "ignored: MUON_WD, RECUR_LAYERS"} and not failures(record)


RAW = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 6, "pb": 0}]}


@pytest.mark.parametrize(
    "compress",
    [brotli.compress, bz2.compress, lzma.compress, zlib.compress, lambda data: lzma.compress(data, **RAW)],
)
def test_a_compressed_script_is_read_without_running_it(record: Path, compress: Callable[[bytes], bytes]) -> None:
    rng = random.Random(1)
    filler = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=4000))
    rule = "script reads the variables of README's command"
    for known, verdict in (("seed matrix_lr", Verdict.PASSES), ("seed", Verdict.NOTE)):
        packed = base64.b85encode(compress(f"raise SystemExit  # {known} {filler}".encode())).decode()
        (record / "train_gpt.py").write_text(f'import base64 as B;exec(L.decompress(B.b85decode("{packed}")))')
        assert rule in verdicts(record, verdict)
        literal = _latin1_literal(compress(f"raise SystemExit  # {known} {filler}".encode()))
        (record / "train_gpt.py").write_bytes(b'%bexec(decompress(%b.encode("latin1")))' % (LATIN1, literal))
        assert rule in verdicts(record, verdict)
    (record / "train_gpt.py").write_text(f"exec(f(b85decode('{'0' * 2000}')))")
    assert "compression is not recognized" in verdicts(record, Verdict.UNKNOWN)[rule]


def test_missing_keys_and_files(record: Path) -> None:
    edit_json(record, bytes_code=None, blurb="")
    found = notes(record)
    assert found["keys of submission.json"] == "missing or empty: blurb, bytes_code"
    assert found["bytes_code is the size of the code"] == "no bytes_code in submission.json; logged: 83,119"
    (record / "submission.json").write_text("{")
    (record / "train_gpt.py").unlink()
    value = failures(record)["required files"]
    assert "train_gpt.py" in value and "a valid submission.json (not valid JSON" in value


def test_a_log_that_was_cut(record: Path) -> None:
    path = record / "train_seed1337.log"
    path.write_text(path.read_text()[:900])
    assert notes(record)["the score is in a log"] == "seed 1337: no log with its score"


@pytest.mark.parametrize("number", ["nan", "inf", "0.00000000"])
def test_a_log_that_ends_without_a_sound_score(record: Path, number: str) -> None:
    edit(record / "train_seed1337.log", f"val_bpb:{RUNS['1337'][0]:.8f}", f"val_bpb:{number}")
    # the nearest score is that of the other windows
    assert "seed 1337: 1.08655776 is in no log" in failures(record)["the score is in a log"]
    # what stands in the json is then what is judged
    assert read_record_folder(record).results[1].numbers["val_bpb"] == RUNS["1337"][0]


@pytest.mark.parametrize(
    "value", ["x", [], {"a": "x"}, True, 10**400, math.inf, math.nan], ids=lambda value: str(value)[:9]
)
def test_what_is_no_number_in_the_json_is_not_there(record: Path, value: object) -> None:
    names = ("val_loss", "val_bpb", "val_bpb_std", "bytes_total", "bytes_code", "eval_time_seconds")
    results = {seed: dict.fromkeys(("val_bpb", "val_loss", "artifact_bytes", "steps"), value) for seed in RUNS}
    facts = {"rule": "once", "tokens": value, "validation_tokens": value}
    edit_json(record, seed_results=results, evaluation=facts, **dict.fromkeys(names, value))
    found = notes(record)
    assert found.pop("bytes_code is the size of the code") == "no bytes_code in submission.json; logged: 83,119"
    # an empty list or object is a missing key
    assert set(found) <= {"keys of submission.json"} and not failures(record)
    assert "each token scored once" in verdicts(record, Verdict.PASSES)


def test_a_foreign_folder_with_a_readme_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(
        "# Something\n\nRun on 8xH100 SXM, val_bpb 1.1, not trained on validation data.\n"
    )
    assert main(["check", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "  hardware    8 × H100 SXM (README.md)\n" in output and "not seen    seeds" not in output
    assert (
        "BREAKS      required files: missing: submission.json, train_gpt.py, a training log (rule: a record has"
        in output
    )
    assert "training time (no training time in a log or in submission.json)" in " ".join(output.split())


def test_what_is_no_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_record_folder(tmp_path / "none")
    with pytest.raises(UserError, match="not a record folder: no README"):
        read_record_folder(tmp_path)
