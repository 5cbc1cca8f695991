"""train/common/errors.py: commands end with an error in one sentence, defects with their traceback."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable

import pytest
import torch

from train.common.errors import UserError, main_guard


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("x.bin: truncated"), 2, "error: x.bin: truncated"),
        (UserError("new\nline: no such run"), 2, "error: new line: no such run\n"),
        (OSError(errno.EBUSY, "Device or resource busy", "."), 2, "error: .: Device or resource busy: choose another"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/model.golf"),
            2,
            "error: runs/a/model.golf: No space left",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "runs"), 2, "error: runs: File exists: choose another path"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xxx"), 2, "error: xxx: File name too long: choose another"),
        (OSError(errno.ELOOP, "Too many levels", "a"), 2, "error: a: Too many levels"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            2,
            "error: a: Permission denied: give this user the permission",
        ),
        (MemoryError(), 2, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "lower TRAIN_BATCH_TOKENS"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "lower TRAIN_BATCH_TOKENS"),
        (ModuleNotFoundError("none", name="tqdm.auto"), 2, "error: tqdm is not installed: pip install tqdm, or"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_bad_input_ends_a_command_with_a_sentence(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture
) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as caught:
        main_guard(main)
    assert caught.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "said"), [("0", "interrupted at step 3\n"), ("1", "")])
def test_the_first_of_several_processes_says_once_that_it_was_interrupted(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)

    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            # torchrun's, which comes after the terminal's
            os.kill(os.getpid(), signal.SIGINT)
            raise KeyboardInterrupt("interrupted at step 3") from None

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            main_guard(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.code == 130 and capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "broken"),
        OSError(errno.ENOENT, "broken"),
        RuntimeError("broken"),
        ModuleNotFoundError("broken", name="train.nothing"),
    ],
)
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    def main() -> int:
        raise error

    with pytest.raises(type(error), match="broken"):
        main_guard(main)


def test_an_argument_that_is_not_utf8_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--run_id", "x\udcff"])
    with pytest.raises(SystemExit) as caught:
        main_guard(lambda: pytest.fail("went on"))
    assert caught.value.code == 2
    assert r"'x\udcff' is not UTF-8" in capsys.readouterr().err


def guarded(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        main_guard(run)
    return caught.value.code


def test_a_terminal_without_utf8_shows_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert guarded(lambda: print("lauf-nº-1 → é", flush=True), monkeypatch) == 0
    assert written.getvalue() == b"lauf-n\\xba-1 \\u2192 \\xe9\n"


def test_a_name_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("tensor \x1b[31ma\x07\u202e\ud800: damaged")

    assert guarded(main, monkeypatch) == 2
    assert capsys.readouterr().err == "error: tensor \\x1b[31ma\\x07\\u202e\\ud800: damaged\n"


def test_a_utf8_name_where_names_are_ascii_is_no_other_encoding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert (
        guarded(lambda: pytest.fail("went on"), monkeypatch, os.fsencode("é").decode("ascii", "surrogateescape")) == 2
    )
    assert "is UTF-8, but this Python reads names as ascii: set PYTHONUTF8=1" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--vocab", "1", "--vocab=2"], ["--json", "--json"]])
def test_a_flag_given_twice_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert guarded(lambda: pytest.fail("went on"), monkeypatch, *arguments) == 2
    assert f"error: {arguments[0]}: given twice" in capsys.readouterr().err
    assert guarded(lambda: 0, monkeypatch, "--set", "a=1", "--set", "b=2") == 0
