"""The commands of `python -m train.data` as a person types them."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from train.command_line import override_line, resolve
from train.common.errors import UserError, main_guard
from train.config import Config
from train.data.__main__ import main, parser
from train.data.corpus import stdlib_documents
from train.data.manifest import read_manifest
from train.data.orders import TrainingShards
from train.data.shards import find_shards, load_validation_tokens, read_shard
from train.data.tokenizer import find_tokenizer, load_tokenizer, train_tokenizer
from train.data.validation import load_validation

COMMANDS = ("stdlib", "text", "fineweb", "build")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train.data", *map(str, arguments)])
        monkeypatch.setattr("train.common.progress.FIRST_LINE_SECONDS", 0.0)
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document, _ in zip(stdlib_documents(), range(25), strict=False)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete_and_its_example_is_accepted(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    example = re.search(r"example: python -m train\.data (.*)$", text)
    assert example
    arguments = parser().parse_args(shlex.split(example[1]))
    assert arguments.command == command
    # an option without a word of explanation would be followed by the next option at once
    assert not re.search(r" --[a-z-]+( [A-Z]+)? --[a-z-]+( [A-Z]+)? --", text.partition("options:")[2])


def test_the_issue_s_commands_are_accepted() -> None:
    parsed = parser().parse_args("fineweb --variant sp8192 --train-shards 5".split())
    assert (parsed.variant, parsed.train_shards, parsed.prefix) == ("sp8192", 5, "datasets")
    parsed = parser().parse_args(
        "build --docs A.jsonl B.jsonl --vocab 2048 --tokenizer-train-docs 100000 --max-train-tokens 7 --workers 3".split()
    )
    assert (parsed.docs, parsed.val_docs, parsed.workers, parsed.max_train_tokens) == (
        ["A.jsonl", "B.jsonl"],
        50_000,
        3,
        7,
    )


def test_text_makes_a_dataset_that_can_be_trained_on(run, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index}.py").write_text(text)
    out = tmp_path / "data"
    printed = run("text", folder, "--vocab", 400, "--out", out, "--name", "mine")
    info = read_manifest(out)
    assert info and f"{info.train.tokens:,} tokens" in printed and "MB/s" in printed
    assert f"{info.val.text_bytes:,} bytes, {info.val.normalized_bytes:,} after normalization" in printed
    assert f"gzip -9 {info.yardsticks['gzip -9']:.2f}, xz -9 {info.yardsticks['xz -9']:.2f}" in printed
    assert printed.endswith(f"python -m train --data_path {out}\n")
    # long work says its rate, what is done, and the time left
    for pattern in (
        r"reading: [\d,]+/[\d,]+ bytes \(\d+ %\), \S+ bytes/s, 0 documents, (\d+ s|unknown time) left",
        rf"encoding train: .* \(100 %\), [\d,]+ bytes/s, {info.train.tokens:,} tokens, 0 s left",
    ):
        assert re.search(f"^{pattern}$", printed, re.MULTILINE)
    load_tokenizer(find_tokenizer(out, 400), 400)
    assert TrainingShards(find_shards(out, "train"), 400).total == info.train.tokens
    assert info.train.documents + info.val.documents >= 25 and info.source == "mine"
    assert len(load_validation_tokens(out, 64, 400)) > 64


def test_validation_text_of_ones_own(run, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:20]))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[20:]))
    (tmp_path / "empty.md").touch()
    printed = run(
        "text",
        tmp_path / "train.jsonl",
        tmp_path / "empty.md",
        "--val",
        tmp_path / "val.jsonl",
        "--vocab",
        400,
        "--out",
        tmp_path / "d",
        "--no-yardsticks",
    )
    info = read_manifest(tmp_path / "d")
    assert info and (info.train.documents, info.val.documents, info.yardsticks) == (20, 5, {})
    assert "skipped: 1 empty file\n" in printed
    tokenizer = load_tokenizer(find_tokenizer(tmp_path / "d", 400), 400)
    assert read_shard(find_shards(tmp_path / "d", "val")[0]).tolist() == [
        token for text in texts[20:] for token in (1, *tokenizer.Encode(text))
    ]


def test_a_tokenizer_gives_its_vocabulary(run, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "docs.txt").write_text("\n".join(texts[:5]))
    model = tmp_path / "own.model"
    train_tokenizer(["one two three four five six seven " * 9, *map(chr, range(97, 123))], 300, model)
    options = ["--tokenizer", model, "--out", tmp_path / "d", "--no-yardsticks"]
    with pytest.raises(UserError, match=r"^--vocab 400: .*own\.model has 300 pieces: leave --vocab out$"):
        run("text", tmp_path / "docs.txt", "--vocab", 400, *options)
    run("text", tmp_path / "docs.txt", *options)
    info = read_manifest(tmp_path / "d")
    assert info and info.vocab_size == 300 and (tmp_path / "d" / info.tokenizer).read_bytes() == model.read_bytes()
    # training takes the vocabulary from there, unless it is told another
    flags = ["--data_path", str(tmp_path / "d")]
    config, given = resolve(flags, {})
    assert config.vocab_size == 300
    assert override_line(given[1]) == f"setting:vocab_size=300 from:the manifest in {tmp_path / 'd'}"
    config, _ = resolve(flags, {"VOCAB_SIZE": "512"})
    with pytest.raises(UserError, match="has 300 pieces, but vocab_size is 512"):
        load_validation(config)
    assert resolve(["--data_path", str(tmp_path)], {})[0].vocab_size == Config.vocab_size


def test_build_reports_what_it_made(run, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    printed = run(
        "build", "--docs", tmp_path / "docs.jsonl", "--vocab", 400, "--val-docs", 5, "--tokenizer-train-docs", 20, "--max-train-tokens", 3000,
        "--workers", 1, "--out", f"{tmp_path / 'd'}/", "--name", "fineweb",
    )  # fmt: skip
    info = read_manifest(tmp_path / "d")
    assert (
        info
        and info.val.documents == 5
        and info.train.tokens == 3000
        and "for comparison" in printed
        and "MB/s" in printed
    )
    assert [path.name for path in find_shards(tmp_path / "d", "train")] == ["fineweb_train_000000.bin"]
    assert f"{info.val.text_bytes:,} bytes, {info.val.normalized_bytes:,} after normalization" in printed
    assert re.search(r"^encoding train: .*/s, \S+ MB/s of text, 3,000 tokens, 0 s left$", printed, re.MULTILINE)
    assert "val: 5 documents, " in printed and printed.count(" tokens, 1 shard\n") == 2


def test_stdlib_checks_the_folder_before_it_works(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        run("stdlib", "--out", tmp_path / "full")
    assert capsys.readouterr().out == ""


Ended = Callable[..., tuple[int, str]]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ended:
    """Exit code and error output of a command line, as `python -m train.data` ends with them."""

    def end(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.data", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main_guard(main)
        return caught.value.code, capsys.readouterr().err

    return end


def test_the_module_itself_ends_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.data", "text", tmp_path / "none", "--out", tmp_path / "d"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_bad_input_ends_with_2_and_a_sentence(ended: Ended, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    code, message = ended("text", empty, "--out", tmp_path / "d")
    assert (
        code == 2
        and message == f"error: {empty}: the text is empty (skipped: 1 empty file): give files with text in them\n"
    )
    code, message = ended("build", "--docs", tmp_path / "none.jsonl", "--out", tmp_path / "d")
    assert code == 2 and message.startswith(f"error: {tmp_path / 'none.jsonl'}: no such file")
    code, message = ended("fineweb", "--source", tmp_path / "none")
    assert code == 2 and "no such folder" in message
    for pieces in ("many", "-1", "260", "65537"):
        code, message = ended("text", empty, "--vocab", pieces)
        assert code == 2 and f"--vocab: expected a vocabulary size from 261 to 65536, got {pieces}" in message
    for option, value, said in (
        ("--name", "a/b", "expected a prefix for file names, got 'a/b'"),
        ("--name", "", "expected a prefix for file names, got ''"),
        ("--val-bytes", "-5", "expected a whole number from 0, got '-5'"),
    ):
        code, message = ended("text", empty, option, value, "--out", tmp_path / "d")
        assert code == 2 and f"{option}: {said}" in message
    (tmp_path / "docs.jsonl").write_text('{"text": "x"}\n')
    code, message = ended("build", "--docs", tmp_path / "docs.jsonl", "--tokenizer", tmp_path, "--out", tmp_path / "d")
    assert code == 2 and message.startswith(f"error: {tmp_path}: no such tokenizer")
    code, message = ended("build", "--docs", tmp_path / "docs.jsonl", "--out", empty / "d")
    assert code == 2 and message.startswith(f"error: {empty / 'd.partial'}: Not a directory: choose another path")
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob("*.partial"))
