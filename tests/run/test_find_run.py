"""Commands take a run by path or by name, and find its data from any folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_runs import Finished

from train.artifact.requantize import main as quantize
from train.common.errors import UserError
from train.evaluate.__main__ import main as evaluate
from train.evaluate.scores import read_evaluation, write_evaluation
from train.export.__main__ import main as export
from train.generate.__main__ import main as generate
from train.run.folder import RunFolder, find_run
from train.runs.__main__ import main as runs
from train.submission.__main__ import main as submission


@pytest.fixture
def run(finished: Finished, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was started in `home` with relative paths; the current folder is another."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    folder = RunFolder(shutil.copytree(finished.folder.path, home / "runs" / "mine"))
    (home / "data").symlink_to(dataset)
    elsewhere.mkdir()
    monkeypatch.setenv("RUNS_DIR", str(home / "runs"))
    folder.write_config(folder.read_config().replace(data_path="data", runs_dir="runs", run_id="mine"))
    scores = [{**entry, "data_path": "data"} for entry in read_evaluation(folder).values()]
    folder.drop_scores()
    for score in scores:
        write_evaluation(folder, score)
    monkeypatch.chdir(elsewhere)
    return folder


@pytest.mark.parametrize("given", ["path", "name"])
@pytest.mark.parametrize(
    "command",
    [
        lambda run: evaluate([run, "--stride", "0"]),
        lambda run: generate([run, "--tokens", "3"]),
        lambda run: export([run, "--to", "state_dict", "--out", "model.pt"]),
        lambda run: runs(["show", run]),
    ],
    ids=["evaluate", "generate", "export", "show"],
)
def test_a_run_is_given_by_path_or_name_from_any_folder(
    run: RunFolder, command: Callable[[str], int], given: str
) -> None:
    stored, scores = run.config.read_bytes(), read_evaluation(run).keys()
    assert command(str(run.path) if given == "path" else "mine") == 0
    # the same score again, and no path of this machine
    assert run.config.read_bytes() == stored and read_evaluation(run).keys() == scores


def test_stages_that_read_a_runs_data_find_it(run: RunFolder) -> None:
    # with training text, and with the manifest
    assert quantize(["mine", "--gptq-calib-batches", "1", "--out", "k.golf"]) == 0
    assert submission(["record", "mine"]) == 0


def test_a_path_that_is_a_run_comes_before_a_name(run: RunFolder) -> None:
    Path("mine").mkdir()
    assert find_run("mine") == run.path
    shutil.copy(run.config, "mine")
    assert find_run("mine") == Path("mine") and find_run("none") == Path("none")


def test_data_that_is_nowhere_is_named_with_the_flag_that_gives_it(run: RunFolder, dataset: Path) -> None:
    moved = run.path.rename(run.path.with_name("moved").resolve().parents[1] / "moved")
    with pytest.raises(UserError, match=r"data_path 'data': no such folder: .*or give --data_path"):
        evaluate([str(moved)])
    assert evaluate([str(moved), "--data_path", str(dataset), "--stride", "0", "--max-tokens", "256"]) == 0
