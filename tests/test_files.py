"""Files are whole or absent; commands end on a sentence."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from train.errors import UserError, main_guard
from train.files import atomic_write, atomic_writer, sha256_file


def test_a_file_appears_whole_and_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", "text é")
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_bytes() == "text é".encode()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert sha256_file(tmp_path / "a") == hashlib.sha256("text é".encode()).hexdigest()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic_write(target, b"old")

    def fail_half_way() -> None:
        with atomic_writer(target) as file:
            file.write(b"new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        fail_half_way()
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("x.bin: truncated"), 2, "error: x.bin: truncated"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/model.golf"),
            2,
            "error: runs/a/model.golf: No space left",
        ),
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


def test_a_defect_keeps_its_traceback() -> None:
    def main() -> int:
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        main_guard(main)
