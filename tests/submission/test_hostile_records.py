"""Record folders that are hostile: pipes, links, bombs, long runs and any bytes cost little and end in no traceback."""

import base64
import bz2
import io
import lzma
import os
import random
import sys
import time
import zlib
from pathlib import Path

import brotli
import pytest
from foreign_records import CODE, make_foreign
from record_example import edit, failures, notes

from train.submission.__main__ import main
from train.submission.check import apply_rules
from train.submission.record_folder import read_record_folder


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return make_foreign(tmp_path / "record")


def test_pipes_links_and_devices_are_not_read(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "secret.log"
    secret.write_text("step:1/2 train_loss:2.0 paid prefix\n")
    os.mkfifo(record / "pipe.log")
    (record / "secret.log").symlink_to(secret)
    (record / "loop").symlink_to(record)
    assert main(["check", str(record)]) == 0
    told = notes(record)["each log counts once"]
    for name in (
        "pipe.log (a pipe, socket or device)",
        "secret.log (a link, not followed)",
        "loop (a link, not followed)",
    ):
        assert f"{name} is not read" in told
    for name in ("README.md", "submission.json", "train_gpt.py"):
        (record / name).unlink()
        os.mkfifo(record / name)
    (record / "ngram.py").unlink()
    assert failures(record)["required files"] == "missing: README.md, submission.json, train_gpt.py"
    capsys.readouterr()


def test_a_bomb_is_unpacked_only_so_far(record: Path) -> None:
    # the noise keeps the packed text longer than a short script
    noise = random.Random(1).randbytes(300)
    for pack in (zlib.compress, lzma.compress, bz2.compress, brotli.compress):
        bomb = base64.b85encode(pack(noise + b"a" * 20_000_000)).decode()
        (record / "train_gpt.py").write_text(f'exec(L.decompress(B.b85decode("{bomb}")))')
        source = read_record_folder(record).sources["train_gpt.py"]
        assert len(source) < 5_000_000 and source.endswith("a" * 1_000_000)


def test_a_number_of_thousands_of_digits_hides_no_other(record: Path) -> None:
    edit(record / "submission.json", '"bytes_code": ', f'"more": {"9" * 5000}, "bytes_code": ')
    assert read_record_folder(record).claims.values["bytes_code"] == CODE


@pytest.mark.parametrize("name", ["README.md", "submission.json", "train_seed42.log"])
def test_long_runs_of_one_character_take_no_time(record: Path, name: str) -> None:
    lines = ["gptq:collected" + " " * 900, "8" + " " * 900, "a:" + "," * 900, "|" * 900, "#" * 900, "traintrain" * 90]
    text = ("\n".join(lines) + "\n") * 30 + "\n" * 100_000 + "train on val " * 10_000 + "```\n    " * 1000
    (record / name).write_text(text)
    before = time.process_time()
    read = read_record_folder(record)
    apply_rules(read)
    assert time.process_time() - before < 1.5


def test_a_terminal_without_unicode_gets_escapes(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["check", str(record)]) == 0
    stream.flush()
    assert b"1.06123000 \\xb1 0.000" in stream.buffer.getvalue()


def test_any_bytes_are_judged_without_a_traceback(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record / "a\x1b[31m.log").write_bytes(b"\x1b[2Jstep:1/2 train_loss:2.0\n")
    deep = b"[" * 100_000
    texts = [
        b"",
        b"\x00\xff" * 50,
        b'{"val_bpb": ' + b"9" * 5000 + b"}",
        deep,
        b'{"val_bpb": 1e999, "seeds": {"1": {}}}',
        b"\xff\xfe{",
    ]
    texts += [
        b'{"val_bpb": {"mean": [1]}, "seeds": [[1]], "seed_results": [{"seed": {}}], "track": 5, "name": "\\ud800"}'
    ]
    texts += [b'{"seed_results": {"' + b"9" * 5000 + b'": {"val_bpb": NaN}}, "val_bpb": -Infinity}']
    sources = [
        b"exec(b85decode('" + b"(" * 20_000,
        b"x=" + b"-" * 50_000 + b"1 #decompress",
        b"decompress('" + b"0" * 9000 + b"')",
    ]
    for number, text in enumerate(texts):
        (record / "submission.json").write_bytes(text)
        (record / "train_gpt.py").write_bytes(sources[number % len(sources)])
        (record / "README.md").write_bytes(text + b"\nval_bpb: 1." + b"0" * 5000 + b"\n")
        assert main(["check", str(record)]) in (0, 1)
        assert main(["check", str(record), "--json"]) in (0, 1)
        output = capsys.readouterr().out
        assert "\x1b" not in output
        output.encode()
