"""The pipeline where things break: full disks, kills, two processes at once, files that changed."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from pipeline_runs import Finished, command, flags, record, small

from train.artifact.requantize import main as quantize
from train.checkpoint import read_tensors
from train.common.errors import UserError, main_guard
from train.evaluate.__main__ import main as evaluate
from train.evaluate.scores import read_evaluation
from train.pipeline import run_pipeline
from train.run.folder import RunFolder, create_run_folder, open_run_folder
from train.submission.__main__ import main as submission
from train.submission.record import summarize

ROOT = Path(__file__).resolve().parents[1]


def resume(arguments: list[str]) -> RunFolder:
    folder = RunFolder(Path(*arguments))
    return run_pipeline(folder.read_config().replace(runs_dir=str(folder.path.parent), resume="auto"))


def test_a_file_system_that_takes_no_more_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text that is long enough to be learned from, line by line\n" * 2000)
    # a limit on the size of a file is what a test can have of a full disk
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.argv[0] = 'train.data'; "
    arguments = ["text", tmp_path / "text.txt", "--out", tmp_path / "out", "--vocab", "300"]
    result = subprocess.run(
        [sys.executable, "-c", f"{limit} runpy.run_module('train.data', run_name='__main__')", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr and "run again" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


class FullDisk(io.FileIO):
    """A disk that takes some bytes and no more."""

    left = 3000

    def write(self, data: bytes) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.pt", "model.golf", "loss.png"])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    name: str,
    finished: Finished,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small(dataset, tmp_path, checkpoint_every=5)
    real = os.fdopen

    def fdopen(handle: int, mode: str) -> BinaryIO:
        full = f".{name}." in os.readlink(f"/proc/self/fd/{handle}")
        return io.BufferedWriter(FullDisk(handle, mode)) if full else real(handle, mode)

    with monkeypatch.context() as patched:
        patched.setattr("train.common.files.os.fdopen", fdopen)
        with pytest.raises(SystemExit) as ended:
            main_guard(lambda: bool(run_pipeline(config)))
    assert ended.value.code == 2
    assert f"{name}: No space left on device: free some space" in capsys.readouterr().err
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert name not in left and not any(path.endswith(".part") for path in left)
    folder = run_pipeline(config.replace(resume="auto"))
    expected, found = (read_tensors(folder.weights) for folder in (finished.folder, folder))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_run_folder_is_worked_on_by_one_process(finished: Finished, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    config = finished.config.replace(runs_dir=str(tmp_path), resume="auto")
    with open_run_folder(config):
        result = command("train", *flags(config))
    assert result.returncode == 2
    assert f"{folder.path}: another process is at work on this run" in result.stderr
    assert resume([str(folder.path)]) == folder


def test_an_artifact_is_made_and_scored_by_one_process(finished: Finished, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    with folder.held():
        for work in (quantize, evaluate, record):
            with pytest.raises(UserError, match="another process is at work on this run"):
                work([str(folder.path)])
        # another file is nobody else's business
        assert quantize([str(folder.path), "--quantizer", "rtn", "--out", str(tmp_path / "other.golf")]) == 0
    with folder.held(shared=True):
        assert evaluate([str(folder.path), "--stride", "0"]) == 0
        assert record([str(folder.path)]) == 0
        with pytest.raises(UserError, match="another process is at work on this run"):
            quantize([str(folder.path)])
    (tmp_path / "empty").mkdir()
    for name, said in (("none", "no such run folder"), ("empty", "is not a run folder")):
        with pytest.raises(UserError, match=said):
            evaluate([str(tmp_path / name)])
    assert not list((tmp_path / "empty").iterdir())


def begin_at(place: str, second: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> threading.Thread:
    """Lets `second` begin where a first command comes to `place`, which goes on when it waits for a lock or has ended."""
    real, lock, goes_on = pkgutil.resolve_name(place), fcntl.flock, threading.Event()

    def work() -> None:
        try:
            second()
        finally:
            goes_on.set()

    thread = threading.Thread(target=work)

    def flock(file: object, operation: int) -> None:
        if threading.current_thread() is thread and not operation & fcntl.LOCK_NB:
            goes_on.set()
        lock(file, operation)

    def arrive(*given: object) -> object:
        if thread.ident is None:
            thread.start()
            assert goes_on.wait(60)
        return real(*given)

    monkeypatch.setattr("train.run.folder.fcntl.flock", flock)
    monkeypatch.setattr(place, arrive)
    return thread


def test_scores_made_at_once_are_both_kept(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    before = read_evaluation(folder)
    first, second = ([str(folder.path), "--stride", "0", "--max-tokens", tokens] for tokens in ("256", "512"))
    thread = begin_at("train.evaluate.scores.write_json", lambda: evaluate(second), monkeypatch)
    assert evaluate(first) == 0
    thread.join()
    after = read_evaluation(folder)
    assert before.items() <= after.items()
    assert {entry["max_tokens"] for key, entry in after.items() if key not in before} == {256, 512}


# at the second place the first has a file half-written
@pytest.mark.parametrize("place", ["train.submission.record.run_readme", "train.common.files.os.fsync"])
def test_of_records_made_at_once_the_last_is_whole(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    first, second = (["record", str(folder.path), "--name", name] for name in ("first", "second"))
    thread = begin_at(place, lambda: submission(second), monkeypatch)
    assert submission(first) == 0
    thread.join()
    assert json.loads((folder.path / "submission.json").read_text())["name"] == "second"
    assert (folder.path / "README.md").read_text().startswith("# second: ")


@pytest.fixture(scope="module")
def killed(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose record was killed while it wrote a plot."""
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path_factory.mktemp("killed") / "run"))
    end = "import os; from train.submission import __main__, plots; plots.Figure.savefig = lambda *_, **__: os.kill(os.getpid(), 9); "
    program = [sys.executable, "-c", f"{end} __main__.main(['record', {str(folder.path)!r}])"]
    assert subprocess.run(program, cwd=ROOT, capture_output=True, timeout=120, check=False).returncode == -9
    return folder


@pytest.mark.parametrize("arguments", [["evaluate", "--stride", "0"], ["submission", "record"]])
def test_what_a_killed_record_was_writing_is_gone_after_the_next_command(
    killed: RunFolder, tmp_path: Path, arguments: list[str]
) -> None:
    folder = RunFolder(shutil.copytree(killed.path, tmp_path / "run"))
    assert len(list(folder.path.glob(".loss.png.*.part"))) == 1
    works = {"evaluate": evaluate, "submission": submission}
    assert works[arguments[0]]([*arguments[1:], str(folder.path)]) == 0
    assert not list(folder.path.glob(".*.part"))


def test_what_the_command_asks_for_holds_whoever_held_the_run_before(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    held = RunFolder.held

    def later(self: RunFolder, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        # another process has ended between the first look at the settings and the lock
        self.write_config(self.read_config().replace(prune_excess=8))
        return held(self, shared=shared)

    monkeypatch.setattr(RunFolder, "held", later)
    # as the run has it before, which was taken for no change
    assert quantize([str(folder.path), "--prune-excess", "0", "--quantizer", finished.config.quantizer]) == 0
    assert folder.read_config().prune_excess == 0


def test_a_file_system_without_locks_is_named(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("train.run.folder.fcntl.flock", flock)
    for shared in (False, True):
        with pytest.raises(UserError, match=r"\.lock: cannot be locked \(No locks available\): .* RUNS_DIR"):
            with folder.held(shared=shared):
                pass


class Killed(BaseException):
    """The end of a process, where a test wants it."""


def kill(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize(
    "place", ["train.run.folder.write_json", "train.artifact.storage.atomic_write", "train.artifact.make.load_model"]
)
@pytest.mark.parametrize("prunes", [False, True])
def test_a_kill_leaves_no_old_score_beside_a_new_artifact(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, prunes: bool
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    before, config = folder.artifact.read_bytes(), folder.read_config()
    # a target that leaves room for a fraction of the model
    changes = (
        ["--target-mb", str((json.loads(folder.summary.read_text())["bytes_code"] + 8_000) / 2**20)] if prunes else []
    )
    with monkeypatch.context() as patched:
        patched.setattr(place, kill)
        if place == "train.run.folder.write_json" and not changes:
            assert quantize([str(folder.path)]) == 0
        else:
            with pytest.raises(Killed):
                quantize([str(folder.path), *changes])
    assert not folder.evaluation.exists() and not folder.summary.exists()
    # an artifact that is there is that of the settings that are there
    if folder.artifact.exists():
        assert (folder.artifact.read_bytes() == before) == (folder.read_config() == config)
    with pytest.raises(UserError, match=r"evaluation\.json: missing: run python -m train.evaluate"):
        summarize(folder)
    (folder.path / ".model.golf.abc.part").touch()
    assert quantize([str(folder.path), *changes]) == 0
    assert not list(folder.path.glob(".*.part"))


@pytest.mark.parametrize(
    ("name", "old", "new", "stage"),
    [
        ("config.json", '"seed": 1337', '"seed": 1338', evaluate),
        ("training.json", '"steps": 12', '"steps": 13', record),
        ("evaluation.json", '"tokens": ', '"tokens": 1', record),
    ],
)
def test_a_number_that_changed_on_the_disk_is_noticed(
    finished: Finished, tmp_path: Path, name: str, old: str, new: str, stage: Callable[[list[str]], int]
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    text = (folder.path / name).read_text()
    assert old in text
    (folder.path / name).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=f"{name}: changed since it was written"):
        stage([str(folder.path)])


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("training.json", '"steps": 12', '"steps": "12"', r"training\.json: steps: expected int, found '12'"),
        ("training.json", '"last": {', '"last": 1, "other": {', r"training\.json: last: expected dict, found 1"),
        ("training.json", '"val_bpb": ', '"val_bpb": "x", "other": ', "step0_val_bpb: expected "),
        ("stages.json", '"train": ', '"train": "x", "data": ', "stage_seconds: expected dict"),
        ("evaluation.json", '"val_bpb"', '"bpb"', r"evaluation\.json: a score without val_bpb: evaluate again"),
        ("evaluation.json", '"tokens": ', '"tokens": "x", "other": ', "tokens: expected a whole number, got 'x'"),
        ("metrics.jsonl", '"code_bytes": ', '"code_bytes": "x", "other": ', r"metrics\.jsonl: no sizes in it"),
    ],
)
def test_a_value_of_another_kind_is_named(
    finished: Finished, tmp_path: Path, name: str, old: str, new: str, words: str
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    text = (folder.path / name).read_text()
    assert old in text
    # as somebody writes it who was told to delete the checksum
    (folder.path / name).write_text(re.sub(r',\s*"crc32": "\w+"', "", text.replace(old, new)))
    with pytest.raises(UserError, match=words):
        summarize(folder)


def test_a_kill_leaves_no_run_folder_without_settings(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(dataset, tmp_path / "runs", resume="auto")
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_config", kill)
        with pytest.raises(Killed):
            create_run_folder(config)
    assert not (tmp_path / "runs" / "run").exists()
    with open_run_folder(config) as folder:
        (folder.path / ".model.golf.abc.part").touch()
    with open_run_folder(config) as folder:
        assert {path.name for path in folder.path.iterdir()} == {".lock", "config.json"}


@pytest.mark.parametrize(
    ("name", "content", "stage"),
    [
        ("config.json", b"[]", evaluate),
        ("config.json", b"{}", evaluate),
        ("config.json", b"\x8d\xff", quantize),
        ("training.json", b"{}", quantize),
        ("stages.json", b"[]", record),
        ("stages.json", b'{"train": "x"}', resume),
        ("metrics.jsonl", b"", record),
        ("evaluation.json", b'{"a": 1}', record),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    finished: Finished, name: str, content: bytes, stage: Callable[[list[str]], object], tmp_path: Path
) -> None:
    folder = RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))
    (folder.path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(name)):
        stage([str(folder.path)])
