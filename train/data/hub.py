"""Downloads the published FineWeb shards: the validation split, the first N training shards and the tokenizer.

A repository has a folder, called the prefix, with `manifest.json`, `tokenizers/fineweb_<V>_bpe.model` and
`datasets/fineweb10B_<variant>/fineweb_{train,val}_NNNNNN.bin`. The local folder has the same layout without the prefix.
The published run commands expect this layout. A variant is `sp<V>`, or `sp<V>_NAME` with the tokenizer
`fineweb_<V>_bpe_NAME.model`. If the tokenizer has operators, there is a file `fineweb_val_bytes_NNNNNN.bin` for each
validation shard.
"""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from train.common.errors import UserError
from train.common.files import atomic_write, atomic_writer, open_lock, read_file, read_json
from train.common.progress import Progress
from train.data.shards import check_shard
from train.data.tokenizer import find_operator, load_tokenizer, published_tokenizer

DEFAULT_REPO = "willdepueoai/parameter-golf"
CASE_OPERATORS_REPO = "romeerp/parameter-golf-caseops-v1"
DEFAULT_PREFIX = "datasets"
DEFAULT_TRAIN_SHARDS = 80
ORIGIN = "source.json"

# shard numbers have six digits
_MOST_SHARDS = 1_000_000
_VARIANT = re.compile(r"sp(\d+)(_\w+)?", re.ASCII)
_LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def default_repo(variant: str) -> str:
    """Return the repository that publishes a variant."""
    return CASE_OPERATORS_REPO if "_caseops_" in variant else DEFAULT_REPO


class Unreachable(UserError):
    """The repository cannot be reached."""


class Source(ABC):
    """A repository of shards. Its files are in the folder `prefix`, or at the top level if `prefix` is empty."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix.strip("/")

    @property
    @abstractmethod
    def name(self) -> str:
        """Repository and prefix, for messages and the local `source.json`."""

    @abstractmethod
    def fetch(self, path: str) -> Path | None:
        """Return a local copy of a file, or None if the repository has no such file."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder; empty if the folder does not exist."""

    def remote(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path


class HubSource(Source):
    """A dataset repository on the Hugging Face Hub. huggingface_hub resumes and caches downloads."""

    def __init__(self, repo: str, prefix: str) -> None:
        super().__init__(prefix)
        self.repo = repo

    @property
    def name(self) -> str:
        return f"{self.repo}:{self.prefix}"

    def fetch(self, path: str) -> Path | None:
        folder, _, file = self.remote(path).rpartition("/")
        with self._translated():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

            try:
                return Path(hf_hub_download(self.repo, file, subfolder=folder or None, repo_type="dataset"))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None

    def names(self, folder: str) -> list[str]:
        with self._translated():
            from huggingface_hub import HfApi
            from huggingface_hub.errors import EntryNotFoundError

            try:
                entries = list(HfApi().list_repo_tree(self.repo, self.remote(folder), repo_type="dataset"))
            except EntryNotFoundError:
                return []
            return [PurePosixPath(entry.path).name for entry in entries]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
        except ImportError as error:
            raise UserError(f"huggingface_hub is needed to download ({error}): pip install huggingface_hub") from None
        # the base classes of HfHubHTTPError belong to an HTTP library; which one, depends on huggingface_hub's version
        bases = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
        transport: tuple[type[Exception], ...] = (OSError, *bases)
        try:
            yield
        except HFValidationError as error:
            raise UserError(f"--repo {self.repo}: not a repository name: {error}") from None
        except RepositoryNotFoundError:
            raise UserError(
                f"--repo {self.repo}: no such dataset repository, or it is private: check the name, or log in with `hf auth login`"
            ) from None
        except transport as error:
            if getattr(error, "errno", None) in _LOCAL_FAULTS:
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise Unreachable(
                f"{self.repo}: cannot be reached ({reason}): check the network and that HF_HUB_OFFLINE is not set, or give --source DIR with a "
                "local copy; without FineWeb, `python -m train.data stdlib` makes a dataset offline"
            ) from None


class FolderSource(Source):
    """A copy of a repository in a local folder."""

    def __init__(self, folder: str, prefix: str) -> None:
        super().__init__(prefix)
        parsed = urlparse(folder)
        self.folder = Path(unquote(parsed.path) if parsed.scheme == "file" else folder).resolve()
        if not self.folder.is_dir():
            raise UserError(
                f"--source {folder}: no such folder: expected a copy of the repository, with {self.remote('datasets')} in it"
            )

    @property
    def name(self) -> str:
        return f"{self.folder}:{self.prefix}"

    def fetch(self, path: str) -> Path | None:
        file = self.folder / self.remote(path)
        return file if file.is_file() else None

    def names(self, folder: str) -> list[str]:
        path = self.folder / self.remote(folder)
        return [file.name for file in path.iterdir()] if path.is_dir() else []


@dataclass(frozen=True)
class Plan:
    """The files to download, as paths relative to the prefix."""

    dataset: str
    tokenizer: str
    shards: list[str]


def download(
    variant: str, train_shards: int, out: str | Path, source: Source, *, skip_manifest: bool = False
) -> tuple[Path, Path]:
    """Download a variant's tokenizer, validation shards and first training shards. Valid local files are kept.

    If several processes call this function at the same time, one downloads and the others wait.

    Args:
        variant: name of the tokenizer, `sp<V>` for V pieces, or `sp<V>_NAME`.
        train_shards: number of training shards to download, each with 10^8 tokens.
        out: local folder for `datasets/fineweb10B_<variant>`, `tokenizers` and the manifest.
        source: the repository.
        skip_manifest: list the files in the repository instead of reading its manifest.

    Returns:
        The dataset's folder and the tokenizer's file.

    Raises:
        UserError: the repository cannot be reached, lacks the variant, or has too few shards or an invalid file; or
            `out` already has this variant from another repository.
    """
    match = _VARIANT.fullmatch(variant)
    if not match:
        raise UserError(f"--variant {variant}: expected sp<V> or sp<V>_NAME, such as sp1024 or sp8192")
    if train_shards < 0:
        raise UserError(f"--train-shards {train_shards}: expected 0 or more")
    vocab_size, root = int(match[1]), Path(out)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / ".download.lock"):
        make = _plan_by_names if skip_manifest else _plan_by_manifest
        plan = make(source, root, variant, train_shards)
        folder = root / "datasets" / plan.dataset
        _claim(folder, source)
        tokenizer = root / "tokenizers" / PurePosixPath(plan.tokenizer).name
        _get(source, plan.tokenizer, tokenizer, lambda path: load_tokenizer(path, vocab_size, operators=True))
        shards = plan.shards
        if find_operator(load_tokenizer(tokenizer, vocab_size, operators=True)):
            shards = [
                path.replace("/fineweb_val_", "/fineweb_val_bytes_") for path in shards if "/fineweb_val_" in path
            ] + shards
        with Progress(len(shards), f"downloading {plan.dataset}", "shards") as bar:
            for path in shards:
                _get(source, path, folder / PurePosixPath(path).name, check_shard)
                bar.advance(1, PurePosixPath(path).name)
    return folder, tokenizer


def _plan_by_manifest(source: Source, root: Path, variant: str, train_shards: int) -> Plan:
    datasets = _manifest(source, root)
    dataset = f"fineweb10B_{variant}"
    place = f"{source.name}, {source.remote('manifest.json')}"
    if dataset not in datasets:
        raise UserError(
            f"{place}: has no {dataset}, only {', '.join(sorted(datasets)) or 'nothing'}: choose another --variant or --repo"
        )
    entry = datasets[dataset]
    _check_count(source, dataset, train_shards, entry.files_train)
    if not entry.tokenizer:
        raise UserError(f"{place}: has no usable model_path for the tokenizer of {dataset}: try --skip-manifest")
    names = [f"fineweb_val_{index:06d}.bin" for index in range(entry.files_val)]
    names += [f"fineweb_train_{index:06d}.bin" for index in range(train_shards)]
    return Plan(dataset, entry.tokenizer, [f"datasets/{dataset}/{name}" for name in names])


def _plan_by_names(source: Source, root: Path, variant: str, train_shards: int) -> Plan:
    dataset = f"fineweb10B_{variant}"
    names = sorted(source.names(f"datasets/{dataset}"))
    val, train = (
        [name for name in names if re.fullmatch(rf"fineweb_{split}_\d{{6}}\.bin", name)] for split in ("val", "train")
    )
    if not val:
        raise UserError(
            f"{source.name}: no fineweb_val_*.bin in {source.remote(f'datasets/{dataset}')}: choose another --variant, --repo or --prefix"
        )
    _check_count(source, dataset, train_shards, len(train))
    return Plan(
        dataset,
        f"tokenizers/{published_tokenizer(variant)}",
        [f"datasets/{dataset}/{name}" for name in val + train[:train_shards]],
    )


def _check_count(source: Source, dataset: str, wanted: int, there: int) -> None:
    if wanted > there:
        raise UserError(
            f"{source.name}: {dataset} has {there} training shards, not {wanted}: give --train-shards {there} or fewer"
        )


@dataclass(frozen=True)
class _Entry:
    """A dataset of a repository's manifest."""

    tokenizer: str  # path of its tokenizer's model; empty: none that can be used
    files_train: int
    files_val: int


def _manifest(source: Source, root: Path) -> dict[str, _Entry]:
    """Read the repository's manifest: the datasets by name. A copy is kept in `root` for the time without network."""
    kept = root / f"manifest.{re.sub(r'[^A-Za-z0-9]+', '-', source.name).strip('-')}.json"
    try:
        fetched = source.fetch("manifest.json")
    except Unreachable:
        if not kept.is_file():
            raise
        print(f"{source.name}: cannot be reached, using {kept} from an earlier download", flush=True)
        fetched = kept
    if fetched is None:
        raise UserError(
            f"{source.name}: has no {source.remote('manifest.json')}: give --skip-manifest, which lists the files instead, or another --prefix"
        )
    data = read_file(fetched)
    try:
        manifest = json.loads(data)
        models = {_text(item["name"]): item.get("model_path") for item in manifest["tokenizers"]}
        entries = {
            _text(entry["name"]): _Entry(
                _inside(models.get(_text(entry["tokenizer_name"]))),
                _count(entry["stats"]["files_train"], 0),
                _count(entry["stats"]["files_val"], 1),
            )
            for entry in manifest["datasets"]
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{source.name}, manifest.json: not a manifest of shards ({error!r}): try --skip-manifest"
        ) from None
    atomic_write(kept, data)
    return entries


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"expected a name, found {ascii(value)[:80]}")
    return value


def _count(value: object, lowest: int) -> int:
    if type(value) is not int or not lowest <= value <= _MOST_SHARDS:
        raise ValueError(f"expected {lowest} to {_MOST_SHARDS:,} shards, found {str(value)[:80]}")
    return value


def _inside(path: object) -> str:
    """The path of a file below the prefix, or "" if it is none."""
    if not isinstance(path, str) or not path.isprintable() or path.startswith("/"):
        return ""
    return path if PurePosixPath(path).name and ".." not in PurePosixPath(path).parts else ""


def _claim(folder: Path, source: Source) -> None:
    """Write the repository's name into the folder, so that the folder never gets shards of another repository."""
    tokenizers = folder.parent.parent / "tokenizers"
    for place in (folder, tokenizers):
        place.mkdir(parents=True, exist_ok=True)
        # delete files that a killed process left. The lock keeps other processes from writing here.
        for part in place.glob(".*.part"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    record = folder / ORIGIN
    if record.exists():
        remedy = "delete it, or that folder if its shards may be from another repository"
        origin = read_json(record, remedy).get("source")
        if not isinstance(origin, str):
            raise UserError(f"{record}: expected the name of a source, found {origin!r}: {remedy}")
        if origin != source.name:
            raise UserError(
                f"{folder}: its files are from {origin}, not from {source.name}: choose another --out, or delete that folder"
            )
        return
    if any(folder.glob("*.bin")):
        print(f"{folder}: assuming that the shards there are from {source.name}", flush=True)
    atomic_write(record, json.dumps({"source": source.name}) + "\n")


def _get(source: Source, path: str, target: Path, check: Callable[[Path], object]) -> None:
    """Download a file unless `target` is already valid. `check` raises a UserError for an invalid file."""
    if target.is_file():
        try:
            check(target)
            return
        except UserError as error:
            print(f"downloading it again: {error}", flush=True)
    fetched = source.fetch(path)
    if fetched is None:
        raise UserError(f"{source.name}: has no {source.remote(path)}: choose another --variant, --repo or --prefix")
    # resolve the path, because the cache of huggingface_hub returns symbolic links
    whole = fetched.resolve()
    # an invalid file is never placed
    check(whole)
    _place(whole, target)


def _place(whole: Path, target: Path) -> None:
    """Copy `whole` to `target`. This is no hard link, so that damage to one file does not affect the other."""
    with whole.open("rb") as file, atomic_writer(target) as copy:
        shutil.copyfileobj(file, copy, 1 << 22)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is downloading to {path.parent}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
