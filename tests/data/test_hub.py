"""The downloader, against a copy of the remote layout that the test makes, and a Hub client that serves it."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hub_remote import VOCAB, make_model, make_remote
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from train.common.errors import UserError
from train.data.case_operators import OPERATORS, transform
from train.data.corpus import stdlib_documents
from train.data.hub import FolderSource, HubSource, Unreachable, default_repo, download
from train.data.shards import find_shards, read_shard, read_sidecar, write_shard
from train.data.tokenizer import find_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_model(tmp_path_factory.mktemp("hub") / "t.model")


@pytest.mark.parametrize(("prefix", "manifest"), [("datasets", True), ("", True), ("some/export", False)])
def test_both_layouts_arrive_where_the_run_commands_look(
    tmp_path: Path, model: bytes, prefix: str, manifest: bool
) -> None:
    remote = make_remote(tmp_path / "remote", model, prefix=prefix, manifest=manifest)
    source = FolderSource(str(remote) if manifest else remote.as_uri(), prefix)
    folder, tokenizer = download(f"sp{VOCAB}", 3, tmp_path / "data", source, skip_manifest=not manifest)
    assert folder == tmp_path / "data" / "datasets" / f"fineweb10B_sp{VOCAB}"
    assert (
        tokenizer == tmp_path / "data" / "tokenizers" / f"fineweb_{VOCAB}_bpe.model" and tokenizer.read_bytes() == model
    )
    assert find_tokenizer(folder, VOCAB).resolve() == tokenizer.resolve()
    assert [path.name for path in find_shards(folder, "val")] == [f"fineweb_val_{index:06d}.bin" for index in range(2)]
    assert [path.name for path in find_shards(folder, "train")] == [
        f"fineweb_train_{index:06d}.bin" for index in range(3)
    ]
    for index, path in enumerate(find_shards(folder, "train")):
        assert read_shard(path).tolist() == list(range(100 + index, 150 + index))
    assert not [path.name for path in folder.iterdir() if "bytes" in path.name or "part" in path.name]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_tokenizer_with_operators_brings_the_bytes_of_the_validation_tokens(tmp_path: Path, manifest: bool) -> None:
    name = "_lossless_caps_caseops_v1_reserved"
    documents = [transform(document.text) for document, _ in zip(stdlib_documents(), range(3), strict=False)]
    train_tokenizer(documents, VOCAB, tmp_path / "t.model", OPERATORS)
    remote = make_remote(tmp_path / "remote", (tmp_path / "t.model").read_bytes(), manifest=manifest, name=name)
    shards = remote / "datasets" / "datasets" / f"fineweb10B_sp{VOCAB}{name}"
    for index in range(2):
        write_shard(shards / f"fineweb_val_bytes_{index:06d}.bin", np.arange(50) + index)
    source, root = FolderSource(str(remote), "datasets"), tmp_path / "data"
    folder, tokenizer = download(f"sp{VOCAB}{name}", 1, root, source, skip_manifest=not manifest)
    assert folder == root / "datasets" / f"fineweb10B_sp{VOCAB}{name}"
    assert find_tokenizer(folder, VOCAB).resolve() == tokenizer.resolve()
    assert tokenizer == root / "tokenizers" / f"fineweb_{VOCAB}_bpe{name}.model"
    sidecar = [sizes.tolist() for sizes in read_sidecar(find_shards(folder, "val"))]
    assert sidecar == [list(range(50)), list(range(1, 51))]
    (shards / "fineweb_val_bytes_000001.bin").unlink()
    with pytest.raises(UserError, match=r"has no datasets/datasets/.*/fineweb_val_bytes_000001\.bin"):
        download(f"sp{VOCAB}{name}", 1, tmp_path / "again", source, skip_manifest=not manifest)


def test_each_variant_has_its_repository() -> None:
    assert default_repo("sp8192") == "willdepueoai/parameter-golf"
    assert default_repo("sp8192_lossless_caps_caseops_v1_reserved") == "romeerp/parameter-golf-caseops-v1"


def test_goes_on_where_it_was_stopped(tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = make_remote(tmp_path / "remote", model)
    source = FolderSource(str(remote), "datasets")
    fetched: list[str] = []
    original = source.fetch

    def fetch(path: str) -> Path | None:
        fetched.append(Path(path).name)
        if len(fetched) == 5:
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(source, "fetch", fetch)
    with pytest.raises(KeyboardInterrupt):
        download(f"sp{VOCAB}", 4, tmp_path / "data", source)
    # one more was cut short by a full disk long ago
    folder = tmp_path / "data" / "datasets" / f"fineweb10B_sp{VOCAB}"
    cut = folder / "fineweb_val_000001.bin"
    whole = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(whole[:-10])
    (folder / ".x.part").mkdir()
    (folder / ".x.part" / "link").touch()
    (folder / ".y.part").touch()
    download(f"sp{VOCAB}", 4, tmp_path / "data", source)
    assert fetched[5:] == ["manifest.json", "fineweb_val_000001.bin"] + [
        f"fineweb_train_{index:06d}.bin" for index in range(4)
    ]
    assert not list(folder.glob(".*"))
    assert cut.read_bytes() == whole and len(find_shards(folder, "train")) == 4
    del fetched[:]
    download(f"sp{VOCAB}", 4, tmp_path / "data", source)
    assert fetched == ["manifest.json"]


def test_a_broken_remote_shard_does_not_arrive(tmp_path: Path, model: bytes) -> None:
    remote = make_remote(tmp_path / "remote", model)
    bad = remote / "datasets" / "datasets" / f"fineweb10B_sp{VOCAB}" / "fineweb_train_000001.bin"
    bad.write_bytes(bad.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: truncated"):
        download(f"sp{VOCAB}", 4, tmp_path / "data", FolderSource(str(remote), "datasets"))
    folder = tmp_path / "data" / "datasets" / f"fineweb10B_sp{VOCAB}"
    assert [path.name for path in find_shards(folder, "train")] == ["fineweb_train_000000.bin"]


@pytest.mark.parametrize("manifest", [True, False])
def test_refuses_more_shards_than_there_are(tmp_path: Path, model: bytes, manifest: bool) -> None:
    source = FolderSource(str(make_remote(tmp_path / "remote", model, manifest=manifest)), "datasets")
    with pytest.raises(UserError, match="has 4 training shards, not 5"):
        download(f"sp{VOCAB}", 5, tmp_path / "data", source, skip_manifest=not manifest)
    assert not (tmp_path / "data" / "datasets").exists()


def test_another_repository_does_not_get_this_ones_manifest_or_shards(tmp_path: Path, model: bytes) -> None:
    one = FolderSource(str(make_remote(tmp_path / "one", model)), "datasets")
    other_root = make_remote(tmp_path / "other", model, first=200)
    entry = json.loads((other_root / "datasets" / "manifest.json").read_text())
    entry["datasets"][0]["stats"]["files_train"] = 2
    (other_root / "datasets" / "manifest.json").write_text(json.dumps(entry))
    other = FolderSource(str(other_root), "datasets")
    download(f"sp{VOCAB}", 1, tmp_path / "data", one)
    with pytest.raises(UserError, match="has 2 training shards"):
        download(f"sp{VOCAB}", 3, tmp_path / "data", other)
    with pytest.raises(UserError, match=r"its files are from .*one:datasets, not from .*other:datasets"):
        download(f"sp{VOCAB}", 2, tmp_path / "data", other)
    folder = download(f"sp{VOCAB}", 4, tmp_path / "data", one)[0]
    assert [int(read_shard(path)[0]) for path in find_shards(folder, "train")] == [100, 101, 102, 103]


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("byte260", {}, "expected sp<V>"),
        ("sp1024", {}, "has no fineweb10B_sp1024, only fineweb10B_sp400"),
        ("sp400", {"manifest": None}, "--skip-manifest, which lists"),
        ("sp400", {"manifest": "{}"}, "not a manifest of shards"),
        ("sp400", {"manifest": '{"datasets": [{"name": "fineweb10B_sp400", "tokenizer_name": "bpe", "stats": {"files_train": 4, "files_val": 2}}], "tokenizers": []}'}, "usable model_path"),
        ("sp400", {"manifest": '{"datasets": [{"name": "fineweb10B_sp400", "tokenizer_name": "bpe", "stats": {"files_train": 4, "files_val": 2}}], "tokenizers": [{"name": "bpe", "model_path": "../x"}]}'}, "usable model_path"),
        ("sp400", {"missing": "datasets/tokenizers/fineweb_400_bpe.model"}, r"has no datasets/tokenizers/fineweb_400_bpe\.model"),
        ("sp400", {"missing": "datasets/datasets/fineweb10B_sp400/fineweb_val_000001.bin"}, r"has no datasets/datasets/.*val_000001\.bin"),
    ],
)  # fmt: skip
def test_says_what_the_repository_lacks(
    tmp_path: Path, model: bytes, variant: str, changes: dict, message: str
) -> None:
    remote = make_remote(tmp_path / "remote", model)
    manifest = remote / "datasets" / "manifest.json"
    if "missing" in changes:
        (remote / changes["missing"]).unlink()
    elif "manifest" in changes:
        manifest.unlink()
        if changes["manifest"] is not None:
            manifest.write_text(changes["manifest"])
    with pytest.raises(UserError, match=message):
        download(variant, 1, tmp_path / "data", FolderSource(str(remote), "datasets"))


def test_says_what_a_repository_without_manifest_lacks(tmp_path: Path, model: bytes) -> None:
    source = FolderSource(str(make_remote(tmp_path / "remote", model, manifest=False)), "datasets")
    with pytest.raises(UserError, match=r"no fineweb_val_\*\.bin in datasets/datasets/fineweb10B_sp1024"):
        download("sp1024", 1, tmp_path / "data", source, skip_manifest=True)
    with pytest.raises(UserError, match="expected a copy of the repository"):
        FolderSource(str(tmp_path / "none"), "datasets")
    with pytest.raises(UserError, match="expected 0 or more"):
        download(f"sp{VOCAB}", -1, tmp_path / "data", source)


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, model: bytes) -> None:
    remote = make_remote(tmp_path / "remote", model, manifest=False)
    (remote / "datasets" / "datasets" / "fineweb10B_sp400").rename(
        remote / "datasets" / "datasets" / "fineweb10B_sp1024"
    )
    (remote / "datasets" / "tokenizers" / "fineweb_400_bpe.model").rename(
        remote / "datasets" / "tokenizers" / "fineweb_1024_bpe.model"
    )
    with pytest.raises(UserError, match="has 400 pieces, but vocab_size is 1024"):
        download("sp1024", 1, tmp_path / "data", FolderSource(str(remote), "datasets"), skip_manifest=True)


def test_ranks_wait_for_each_other(tmp_path: Path, model: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    source = FolderSource(str(make_remote(tmp_path / "remote", model)), "datasets")
    root = tmp_path / "data"
    root.mkdir()
    with (root / ".download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=download, args=(f"sp{VOCAB}", 1, root, source))
        other.start()
        other.join(0.3)
        assert other.is_alive() and not (root / "datasets").exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        other.join(30)
    assert not other.is_alive() and len(find_shards(root / "datasets" / f"fineweb10B_sp{VOCAB}", "train")) == 1
    assert "waiting for another process" in capsys.readouterr().out


def test_damage_to_a_downloaded_file_leaves_the_source_whole(tmp_path: Path, model: bytes) -> None:
    remote = make_remote(tmp_path / "remote", model)
    sources = {path.name: path for path in remote.rglob("*.*") if path.is_file()}
    before = {name: path.read_bytes() for name, path in sources.items()}
    folder, tokenizer = download(f"sp{VOCAB}", 1, tmp_path / "data", FolderSource(str(remote), "datasets"))
    placed = [tokenizer, *folder.glob("*.bin")]
    assert len(placed) == 4
    for path in placed:
        assert path.read_bytes() == before[path.name]
        with path.open("r+b") as file:
            file.write(b"damage")
    assert {name: path.read_bytes() for name, path in sources.items()} == before


class FakeHub:
    """What `huggingface_hub` offers, served from a folder; files come as links into a cache, as the client makes them."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache, self.asked, self.online = root, cache, [], True
        cache.mkdir()

    def hf_hub_download(self, repo_id: str, filename: str, *, subfolder: str | None = None, repo_type: str) -> str:
        assert repo_type == "dataset" and "/" not in filename
        self.asked.append((repo_id, subfolder, filename))
        if not self.online:
            raise LocalEntryNotFoundError("Please check your connection")
        file = self.root / (subfolder or "") / filename
        if not file.is_file():
            # its constructor wants a response of whatever library the client uses
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        link = self.cache / f"{len(self.asked)}-{filename}"
        link.symlink_to(file)
        return str(link)


@pytest.fixture
def fake(tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    served = FakeHub(make_remote(tmp_path / "remote", model), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", served.hf_hub_download)
    return served


def test_the_hub_is_asked_for_the_published_paths(tmp_path: Path, fake: FakeHub) -> None:
    folder, tokenizer = download(f"sp{VOCAB}", 1, tmp_path / "data", HubSource("someone/export", "datasets"))
    below = f"datasets/datasets/fineweb10B_sp{VOCAB}"
    assert fake.asked == [
        ("someone/export", "datasets", "manifest.json"),
        ("someone/export", "datasets/tokenizers", f"fineweb_{VOCAB}_bpe.model"),
        ("someone/export", below, "fineweb_val_000000.bin"),
        ("someone/export", below, "fineweb_val_000001.bin"),
        ("someone/export", below, "fineweb_train_000000.bin"),
    ]
    # real files, not links into the cache
    assert not any(path.is_symlink() for path in (*folder.iterdir(), tokenizer))


def test_a_hub_without_manifest_says_so(tmp_path: Path, fake: FakeHub) -> None:
    (fake.root / "datasets" / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"someone/export:datasets: has no datasets/manifest\.json: give --skip-manifest"
    ):
        download(f"sp{VOCAB}", 1, tmp_path / "data", HubSource("someone/export", "datasets"))


def test_offline_the_same_source_still_serves_what_is_there(
    tmp_path: Path, fake: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    download(f"sp{VOCAB}", 2, root, HubSource("someone/export", "datasets"))
    fake.online = False
    download(f"sp{VOCAB}", 2, root, HubSource("someone/export", "datasets"))
    assert "from an earlier download" in capsys.readouterr().out
    with pytest.raises(Unreachable, match=r"someone/export: cannot be reached .*--source DIR.*train\.data stdlib"):
        download(f"sp{VOCAB}", 3, root, HubSource("someone/export", "datasets"))
    # the kept manifest belongs to one repository
    with pytest.raises(Unreachable, match="another/export: cannot be reached"):
        download(f"sp{VOCAB}", 2, root, HubSource("another/export", "datasets"))


def test_a_full_disk_is_not_taken_for_a_lost_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OSError, match="No space"):
        HubSource("someone/export", "datasets").fetch("manifest.json")


def test_a_malformed_repository_name_is_refused() -> None:
    with pytest.raises(UserError, match="--repo a/b/c: not a repository name"):
        HubSource("a/b/c", "datasets").fetch("manifest.json")


def test_the_command_takes_the_published_environment_and_ends_with_2_offline(tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "MATCHED_FINEWEB_REPO_ID": "someone/else",
        "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "elsewhere",
    }
    for extra in ([], ["--skip-manifest"]):
        command = [
            sys.executable,
            "-m",
            "train.data",
            "fineweb",
            "--variant",
            "sp1024",
            "--train-shards",
            "1",
            "--out",
            str(tmp_path / "data"),
            *extra,
        ]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert result.stderr.startswith("error: someone/else: cannot be reached") and "--source DIR" in result.stderr
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".download.lock"}
