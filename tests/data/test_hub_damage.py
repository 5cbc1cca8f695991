"""The downloader, where a repository or the local folder holds what it should not."""

import json
from pathlib import Path

import pytest
from hub_remote import VOCAB, make_model, make_remote

from train.common.errors import UserError
from train.data.hub import FolderSource, download


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_model(tmp_path_factory.mktemp("hub") / "t.model")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("datasets", 0, "stats", name), value) for name in ("files_val", "files_train") for value in (10**12, -1, 1.5, "2", None, float("inf"))),
        (("datasets", 0, "stats", "files_val"), 0),
        *((("datasets", 0, name), value) for name in ("name", "tokenizer_name", "stats") for value in (5, None, [], "a\x1b[31m")),
        *((("tokenizers", 0, "model_path"), value) for value in (5, None, [], "", "/etc/passwd", "tokenizers/\x00")),
        (("datasets", 0), []), (("tokenizers",), 5), ((), "[" * 200_000), ((), "\ud800"),
    ],
)  # fmt: skip
def test_a_manifest_of_wrong_values_is_refused_at_once(
    tmp_path: Path, model: bytes, place: tuple[str | int, ...], value: object
) -> None:
    remote = make_remote(tmp_path / "remote", model)
    manifest = remote / "datasets" / "manifest.json"
    values = json.loads(manifest.read_text())
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    if place:
        inner[place[-1]] = value
    manifest.write_bytes((json.dumps(values) if place else str(value)).encode(errors="surrogatepass"))
    with pytest.raises(UserError, match="--skip-manifest") as refused:
        download(f"sp{VOCAB}", 1, tmp_path / "data", FolderSource(str(remote), "datasets"))
    assert str(refused.value).isprintable()
    assert not (tmp_path / "data" / "datasets").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"source": 5}', b"\xff", b"[" * 200_000])
def test_a_damaged_note_of_the_source_is_named(tmp_path: Path, model: bytes, content: bytes) -> None:
    source = FolderSource(str(make_remote(tmp_path / "remote", model)), "datasets")
    folder, _ = download(f"sp{VOCAB}", 1, tmp_path / "data", source)
    (folder / "source.json").write_bytes(content)
    with pytest.raises(UserError, match=r"source\.json: .*: delete it"):
        download(f"sp{VOCAB}", 1, tmp_path / "data", source)


def test_a_broken_tokenizer_is_not_placed_and_a_damaged_one_is_replaced(tmp_path: Path, model: bytes) -> None:
    remote = make_remote(tmp_path / "remote", model)
    source = FolderSource(str(remote), "datasets")
    served = remote / "datasets" / "tokenizers" / f"fineweb_{VOCAB}_bpe.model"
    served.write_bytes(model[:1000])
    with pytest.raises(UserError, match="not a SentencePiece model"):
        download(f"sp{VOCAB}", 1, tmp_path / "data", source)
    assert not list((tmp_path / "data").rglob("*.model"))
    served.write_bytes(model)
    placed = download(f"sp{VOCAB}", 1, tmp_path / "data", source)[1]
    placed.write_bytes(model[:1000])
    assert download(f"sp{VOCAB}", 1, tmp_path / "data", source)[1].read_bytes() == model
