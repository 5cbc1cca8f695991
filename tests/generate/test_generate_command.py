"""`python -m train.generate`: from a run folder and from an artifact alone."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from untrained_run import make_untrained_run

from train.common.errors import UserError
from train.generate.__main__ import main
from train.generate.load import load
from train.generate.samples import PROMPTS, sample_texts, write_samples
from train.run.folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained_run(tmp_path_factory.mktemp("untrained"))


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_run_continues_a_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, run, "--prompt", " quick  brown ", "--tokens", 24, "--seed", 1)
    assert text.startswith("quick brown") and text.endswith("\n") and len(text) > 24
    assert text == printed(capsys, run, "--prompt", "quick brown", "--tokens", 24, "--seed", 1)
    assert text != printed(capsys, run, "--prompt", "quick brown", "--tokens", 24, "--seed", 2)
    greedy = printed(capsys, run, "--prompt", "quick brown", "--tokens", 24, "--temperature", 0)
    assert greedy == printed(capsys, run, "--prompt", "quick brown", "--tokens", 24, "--temperature", 0, "--seed", 9)
    assert text.startswith(printed(capsys, run, "--prompt", "quick brown", "--tokens", 9, "--seed", 1).rstrip("\n�"))


def test_an_artifact_alone_needs_its_tokenizer(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = shutil.copy(run / "model.golf", tmp_path / "alone.golf")
    tokenizer = run.parent / "data" / "tiny_300_bpe.model"
    common = ["--prompt", "fox", "--tokens", "60"]
    from_run = printed(capsys, run, *common)
    # beside the run's config.json, another artifact of the run needs nothing either
    assert printed(capsys, run / "model.golf", *common) == from_run
    # the run's window is 32 tokens; the artifact says only that the rotary base is the same up to 64
    assert (load(run).window, load(alone).window, load(alone).run) == (32, 64, None)
    assert printed(capsys, alone, *common, "--tokenizer", tokenizer, "--window", "32") == from_run
    assert printed(capsys, alone, *common, "--tokenizer", tokenizer) != from_run
    for arguments, problem in (
        ([alone], r"alone\.golf: an artifact holds no tokenizer, .*: give --tokenizer FILE"),
        ([alone, "--tokenizer", tmp_path / "none"], r"--tokenizer: .*none: no such file: give --tokenizer FILE"),
        ([tmp_path / "none"], "no such run or artifact: give a run folder, its name in runs/, or a model.golf"),
        ([tmp_path], "config.json: missing"),
    ):
        with pytest.raises(UserError, match=problem):
            main([*map(str, arguments)])


def test_a_run_whose_data_is_gone_needs_the_tokenizer(run: Path, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    folder.write_config(folder.read_config().replace(data_path=str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"expected one tokenizer in its data_path .*gone: give --tokenizer FILE"):
        main([str(folder.path)])
    folder.write_config(folder.read_config().replace(tokenizer_path=str(tmp_path / "gone.model")))
    with pytest.raises(UserError, match=r"its tokenizer .*gone\.model is missing: give --tokenizer FILE"):
        main([str(folder.path)])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--window", "x"],
        ["--window", str(10**20)],
    ],
)
def test_a_wrong_number_is_refused(run: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(run), *wrong])
    assert f"argument {wrong[0]}: " in capsys.readouterr().err


def test_a_terminal_without_unicode_shows_what_it_can(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main([str(run), "--prompt", "fox 日本", "--tokens", "1"]) == 0
    terminal.seek(0)
    assert terminal.read().startswith("fox ??")


def test_samples_are_the_runs_and_change_no_state(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.generate.samples.TOKENS", 8)
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    config, model = folder.read_config(), load(run).model.train()
    before = torch.get_rng_state()
    texts = sample_texts(config, model, recurrence=True)
    assert (
        texts
        == sample_texts(config, model, recurrence=True)
        != sample_texts(config.replace(seed=7), model, recurrence=True)
    )
    assert [text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)] == [True] * 3
    assert torch.equal(torch.get_rng_state(), before) and model.training
    # texts of a step that is done again replace the earlier ones
    for label in ("step 1", "step 11", "step 1", "artifact"):
        write_samples(folder, config, model, label)
    assert folder.samples.read_text() == "".join(
        f"{label}: {text}\n" for label in ("step 11", "step 1", "artifact") for text in texts
    )
    assert f"step 11: {texts[0]}\n" in capsys.readouterr().out
