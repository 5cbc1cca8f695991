"""Shards against bytes laid down by hand, and every way in which a shard can be wrong."""

import struct
from pathlib import Path

import numpy as np
import pytest

from train.common.errors import UserError
from train.data.shards import (
    ShardWriter,
    check_tokens,
    find_shards,
    load_validation_tokens,
    read_shard,
    write_shard,
)


def by_hand(tokens: list[int], *, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count) + bytes(1024 - 12)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def test_written_bytes_are_the_published_format(tmp_path: Path) -> None:
    tokens = [1, 0, 65535, 256, 8191]
    write_shard(tmp_path / "a.bin", tokens)
    assert (tmp_path / "a.bin").read_bytes() == by_hand(tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_reads_what_was_laid_down_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(by_hand([1, 513, 65535]))
    tokens = read_shard(tmp_path / "a.bin")
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable
    assert tokens.tolist() == [1, 513, 65535]


@pytest.mark.parametrize(
    ("data", "expected", "found"),
    [
        (by_hand([1, 2], magic=20240521), "20240520", "20240521"),
        (by_hand([1, 2], version=2), "version 1", "2"),
        (by_hand([1, 2, 3])[:-1], "1030 bytes", "1029"),
        (by_hand([1, 2, 3]) + b"\0", "1030 bytes", "1031"),
        (by_hand([1, 2, 3], count=-1), "at least one token", "-1"),
        (by_hand([]), "at least one token", "0"),
        (by_hand([1])[:1000], "1024 bytes", "1000"),
        (b"", "1024 bytes", "0"),
    ],
)
def test_refuses_a_bad_shard(tmp_path: Path, data: bytes, expected: str, found: str) -> None:
    path = tmp_path / "bad_train_000000.bin"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_shard(path)
    message = str(error.value)
    assert str(path) in message and expected in message and found in message and "python -m train.data" in message


def test_refuses_a_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such shard"):
        read_shard(tmp_path / "none.bin")


@pytest.mark.parametrize("tokens", [[], [-1, 2], [65536], [1.5], [[1, 2]]])
def test_refuses_tokens_that_do_not_fit(tmp_path: Path, tokens: list) -> None:
    with pytest.raises(UserError, match=r"a\.bin"):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_writer_puts_bos_first_and_lets_documents_straddle(tmp_path: Path) -> None:
    documents = [[10, 11, 12], [], [20], [30, 31, 32, 33, 34]]
    with ShardWriter(tmp_path, "x", "train", shard_tokens=4) as writer:
        for document in documents:
            writer.add(document)
    stream = [1, 10, 11, 12, 1, 1, 20, 1, 30, 31, 32, 33, 34]
    parts = [read_shard(path).tolist() for path in find_shards(tmp_path, "train")]
    assert parts == [stream[:4], stream[4:8], stream[8:12], stream[12:]]
    assert [path.name for path in writer.paths] == [f"x_train_{index:06d}.bin" for index in range(4)]
    assert writer.pending == 0


def test_writer_leaves_no_part_behind_after_an_error(tmp_path: Path) -> None:
    def add() -> None:
        with ShardWriter(tmp_path, "x", "val", shard_tokens=100) as writer:
            writer.add([5])
            writer.add([70000])

    with pytest.raises(UserError, match="65535"):
        add()
    assert not list(tmp_path.iterdir())


def test_writer_refuses_a_shard_whose_name_nobody_would_read(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "x", "val", shard_tokens=1, first_shard=999_999)
    with pytest.raises(UserError, match=r"at most 1,000,000 shards.*larger --shard-tokens"):
        writer.add([5])
    assert [path.name for path in find_shards(tmp_path, "val")] == ["x_val_999999.bin"]


def test_validation_tokens_are_all_shards_trimmed(tmp_path: Path) -> None:
    stream = np.arange(1000, 1030)
    write_shard(tmp_path / "x_val_000001.bin", stream[20:])
    write_shard(tmp_path / "x_val_000000.bin", stream[:20])
    # the bytes sidecar of another export is no shard of this split
    (tmp_path / "x_val_bytes_000000.bin").write_bytes(b"other")
    for seq_len in (1, 4, 7, 10, 15, 29):
        kept = (30 - 1) // seq_len * seq_len + 1
        assert load_validation_tokens(tmp_path, seq_len).tolist() == stream[:kept].tolist()
    with pytest.raises(UserError, match="30 tokens, one sequence needs 31"):
        load_validation_tokens(tmp_path, 30)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "x_val_000000.bin", [1, 1023, 5])
    assert len(load_validation_tokens(tmp_path, 2, vocab_size=1024)) == 3
    with pytest.raises(UserError, match=r"x_val_000000\.bin: holds token 1023, but vocab_size is 1023"):
        load_validation_tokens(tmp_path, 2, vocab_size=1023)
    check_tokens(np.array([], dtype=np.uint16), 1, "empty")


def test_shards_of_two_datasets_do_not_mix(tmp_path: Path) -> None:
    write_shard(tmp_path / "a_train_000000.bin", [1, 2])
    write_shard(tmp_path / "b_train_000000.bin", [1, 2])
    with pytest.raises(UserError, match=r"several datasets \(a, b\)"):
        find_shards(tmp_path, "train")


def test_a_folder_without_shards_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*_val_NNNNNN.bin shard"):
        find_shards(tmp_path, "val")
    with pytest.raises(UserError, match="no such folder"):
        find_shards(tmp_path / "none", "val")
    with pytest.raises(UserError, match="no such folder"):
        find_shards("", "train")
