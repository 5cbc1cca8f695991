"""train/common/files.py: files are whole or absent."""

import errno
import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from train.checkpoint import read_tensors
from train.common.errors import UserError
from train.common.files import (
    atomic_write,
    atomic_writer,
    open_lock,
    read_json,
    sha256_file,
    temporary_folder,
    write_json,
)
from train.run.log_grammar import parse_log
from train.run.logger import read_metrics


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


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UserError, match="a device or a pipe"):
        atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_fifo()
    assert os.listdir(tmp_path) == ["a"]


def test_a_place_where_nothing_can_be_written_is_named_as_given(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "a"
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write(target, b"new")
    assert caught.value.filename == str(target)


def test_json_nested_beyond_reading_is_refused(tmp_path: Path) -> None:
    path, limit = tmp_path / "a.json", sys.getrecursionlimit()
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"a\.json: not readable as JSON .*: write it again"):
        read_json(path, "write it again")
    # about the limit some objects can be read but not written again, as their checksum wants
    for depth in range(limit - 200, limit + 20):
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        with suppress(UserError):
            read_json(path, "write it again")


def test_every_flipped_byte_of_an_object_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    path, values = (
        tmp_path / "a.json",
        {"seed": 1337, "val_bpb": 1.08725556, "name": "é", "layers": [3, 4], "none": None},
    )
    write_json(path, values)
    assert read_json(path, "") == values
    whole = path.read_bytes()
    checksum = whole.index(b'"crc32"')
    unnoticed = 0
    for place in range(checksum):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with suppress(UserError):
            assert read_json(path, "") == values
            unnoticed += 1
    # line breaks and indents alone may become other white space
    assert unnoticed <= whole.count(b"\n") + whole.count(b" ")


def test_a_changed_object_says_how_to_keep_the_change(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"data_path": "here"})
    path.write_text(path.read_text().replace("here", "there"))
    with pytest.raises(
        UserError, match=r"a\.json: changed since it was written .*: restore it; .* delete the field crc32"
    ):
        read_json(path, "restore it")
    path.write_text(path.read_text().replace(path.read_text()[path.read_text().index(",") : -2], ""))
    assert read_json(path, "") == {"data_path": "there"}


def test_a_pipe_or_a_device_is_not_read(tmp_path: Path) -> None:
    """Reading waited for the pipe's writer, and never came to the end of /dev/zero."""
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", Path("/dev/zero")):
        for read in (read_metrics, parse_log, read_tensors, open_lock, lambda path: read_json(path, "restore it")):
            with pytest.raises(UserError, match="is a device or a pipe"):
                read(path)


def test_a_whole_number_beyond_reading_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "train", "step": {"9" * 5000}}}\n')
    with pytest.raises(UserError, match="line 1: expected a JSON object"):
        read_metrics(path)


def test_a_number_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'{{"seconds": 1{"0" * 400}}}')
    with pytest.raises(UserError, match=r"a\.json: not readable as JSON \(OverflowError\): write it again"):
        read_json(tmp_path / "a.json", "write it again")
    (tmp_path / "a.json").write_text(f'{{"seconds": 1{"0" * 300}}}')
    assert read_json(tmp_path / "a.json", "write it again") == {"seconds": 10**300}


def test_the_next_write_deletes_what_a_kill_left_and_nothing_that_is_held(tmp_path: Path) -> None:
    target = tmp_path / "a[1].bin"
    killed = "import os, sys; from train.common import files; files.os.replace = lambda *_: os._exit(9); files.atomic_write(sys.argv[1], b'x')"
    subprocess.run([sys.executable, "-c", killed, target], check=False, cwd=Path(__file__).parents[2])
    (tmp_path / ".a[1].bin.folder.part").mkdir()
    (tmp_path / ".a[1].bin.folder.part" / "file").touch()
    other = tmp_path / ".other.bin.x.part"
    other.touch()
    assert len(list(tmp_path.glob(".a*.part"))) == 2
    with atomic_writer(target) as first:
        # of two that write the same file, each keeps its own part
        first.write(b"first")
        atomic_write(target, b"second")
        assert len(list(tmp_path.glob(".a*.part"))) == 1 and target.read_bytes() == b"second"
    assert target.read_bytes() == b"first"
    with temporary_folder(target) as folder:
        atomic_write(target, b"third")
        assert list(folder.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].bin", other.name}
