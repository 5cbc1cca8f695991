"""`python -m train.evaluate`: a run folder is scored from its artifact's bytes, alone and over ranks."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline_runs import command_on_two_ranks
from untrained_run import make_untrained_run, run_truth

from train.artifact.__main__ import main as convert
from train.common.errors import UserError
from train.evaluate.__main__ import _load, main
from train.evaluate.scores import find_evaluation, read_evaluation
from train.evaluate.windows import plan_windows
from train.model.gpt import GPT
from train.run.folder import RunFolder
from train.run.log_grammar import GRAMMAR
from train.run.logger import read_metrics


@pytest.fixture(scope="module")
def untrained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_untrained_run(tmp_path_factory.mktemp("untrained"))


def test_weights_compute_as_the_device_asks_that_scores_them(untrained_run: Path) -> None:
    config = RunFolder(untrained_run).trained_config()
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        settings = config.replace(device=device)
        for weights in ("master", "artifact"):
            assert _load(RunFolder(untrained_run), settings, weights).compute_dtype == dtype


def test_command_scores_the_artifact_from_its_bytes(
    untrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    assert main([str(run)]) == 0
    nats, tokens, size = run_truth(run, 32, 8)
    (entry,) = read_evaluation(RunFolder(run)).values()
    assert (entry["tokens"], entry["bytes"]) == (tokens, size)
    assert entry["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert entry["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    rounded, exact = capsys.readouterr().out.splitlines()[-2:]
    match = GRAMMAR["final"].fullmatch(rounded)
    assert match and match["name"] == "int6_sliding_window" and match["stride"] == "8"
    assert exact == f"final_int6_sliding_window_exact val_loss:{entry['val_loss']:.8f} val_bpb:{entry['val_bpb']:.8f}"
    assert read_metrics(run / "metrics.jsonl") == [{"kind": "final", **entry}]


def test_a_published_file_scores_as_the_run_that_it_came_from(
    untrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published, artifact = tmp_path / "final_model.ptz", tmp_path / "model.golf"
    convert(["convert", str(untrained_run / "model.golf"), "--format", "pr1392", "--out", str(published)])
    shape = "--vocab_size 300 --num_layers 2 --model_dim 16 --num_heads 2 --num_kv_heads 1 --embed_dtype float32"
    shape += " --rope_train_seq_len 64 --recur_layers 1"
    convert(
        ["convert", str(published), "--from", "pr1392", "--recipe", "baseline", *shape.split(), "--out", str(artifact)]
    )
    windows = ["--stride=8", "--seq-len=32", "--logits-rounding=none", f"--data-path={untrained_run.parent / 'data'}"]
    capsys.readouterr()
    assert main([str(artifact), "--recipe", "baseline", *windows, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    # the recipe's sequences have 1,024 tokens, and the text is cut to a multiple
    nats, tokens, size = run_truth(untrained_run, 32, 8, 1025)
    assert (entry["tokens"], entry["bytes"]) == (tokens, size)
    assert entry["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    # an artifact alone has no file of scores
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final_model.ptz", "model.golf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.golf"], "--recipe: needed to score an artifact alone: one of baseline, quickstart"),
        (["model.golf", "--recipe", "baseline", "--weights", "master"], "--weights: an artifact alone has no master"),
        (["model.golf", "--recipe", "basline"], "recipe: no recipe 'basline'; did you mean baseline"),
        (["", "--recipe", "baseline"], "--recipe: the run .* has its own settings: leave it out"),
    ],
)
def test_a_recipe_belongs_to_an_artifact_alone(untrained_run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(untrained_run / arguments[0]), *arguments[1:]])


def test_a_score_of_the_run_itself_is_in_its_log(untrained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    seed = json.loads((run / "config.json").read_text())["seed"]
    data = f"--data-path={untrained_run.parent / 'data'}"
    log = run / f"train_seed{seed}.log"
    for arguments in (["--max-tokens", "150"], ["--stride", "0"], ["--weights", "master"]):
        main([str(run), data, *arguments])
        assert not log.exists()
    main([str(run)])
    seconds = find_evaluation(RunFolder(run), RunFolder(run).read_config())["seconds"]
    first, exact = log.read_text().splitlines()
    assert first.endswith(f"eval_time:{1000 * seconds:.0f}ms") and "_exact val_loss:" in exact


def test_command_options_change_what_is_scored_and_scores_stand_side_by_side(
    untrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    # with --json not even the progress may reach stdout
    monkeypatch.setattr("train.common.progress.LINE_INTERVAL_SECONDS", 0.0)
    batches: list[tuple[int, ...]] = []
    hidden = GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, ids, **flags: (batches.append(tuple(ids.shape)), hidden(self, ids, **flags))[1]
    )
    arguments = ["--stride", "0", "--max-tokens", "150", "--seq-len", "16", "--batch-seqs", "3", "--json"]
    main([str(run), *arguments])
    entry = json.loads(capsys.readouterr().out)
    nats, tokens, size = run_truth(run, 16, 0, 151)
    assert (entry["tokens"], entry["bytes"], entry["windows"], entry["name"]) == (150, size, 10, "int6_roundtrip")
    # ten windows in batches of at most three, made even
    assert set(batches[:4]) == {(3, 16)}
    assert entry["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    main([str(run), *arguments, "--weights", "master"])
    master = json.loads(capsys.readouterr().out)
    assert master["name"] == "prequant_roundtrip" and 0 < abs(master["val_loss"] - entry["val_loss"]) < 0.2
    main([str(run), "--rule", "overlap_tail", "--max-tokens", "150", "--json"])
    repeated = json.loads(capsys.readouterr().out)
    assert repeated["tokens"] == plan_windows(150, 32, 8, "overlap_tail").scored > 150
    main([str(run), *arguments])
    scores = read_evaluation(RunFolder(run))
    assert len(scores) == 3 and len(read_metrics(run / "metrics.jsonl")) == 4


def test_the_score_says_whether_windows_share_layer_0(
    untrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    for arguments, said in (
        ([], "on"),
        (["--stride", "0"], "off (windows do not overlap)"),
    ):
        main([str(run), "--max-tokens", "100", *arguments])
        line = f"reuse of layer 0's queries, keys and values in overlapping windows: {said}"
        assert capsys.readouterr().out.splitlines()[-3] == line
        assert read_metrics(run / "metrics.jsonl")[-1]["layer0"] == said


def test_flags_are_understood_as_the_trainer_writes_them(
    untrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    forms = (
        ["--stride", "4", "--seq-len", "16", "--max-tokens=60", "--logits-rounding", "bf16"],
        ["--eval_stride", "4", "--eval_seq_len", "16", "--max_tokens=60", "--logits_rounding", "bf16"],
        ["--eval-stride=4", "--seq_len", "16", "--max-tokens", "60", "--logits-rounding=bf16"],
    )
    entries = []
    for form in forms:
        main([str(run), *form, "--json"])
        entries.append(json.loads(capsys.readouterr().out))
    assert all(
        (entry["stride"], entry["seq_len"], entry["tokens"], entry["logits_rounding"]) == (4, 16, 60, "bf16")
        for entry in entries
    )
    main([str(run), *forms[0][:-1], "none", "--json"])
    exact = json.loads(capsys.readouterr().out)
    # a score of rounded logits does not take the place of one without
    assert exact["val_loss"] != entries[0]["val_loss"] == entries[1]["val_loss"]
    assert len(read_evaluation(RunFolder(run))) == 2
    assert exact["tokens_per_second"] == pytest.approx(60 / exact["seconds"], abs=0.1)


def test_command_gives_the_same_score_on_two_ranks(untrained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    main([str(run), "--json"])
    (alone,) = read_evaluation(RunFolder(run)).values()
    result = command_on_two_ranks("train.evaluate", run)
    assert result.returncode == 0, result.stderr
    (shared,) = read_evaluation(RunFolder(run)).values()
    assert shared["world_size"] == 2 and alone["world_size"] == 1
    for name in ("tokens", "bytes", "windows"):
        assert shared[name] == alone[name]
    assert shared["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-7)
    # one rank reports for both
    assert result.stdout.count("final_int6_sliding_window_exact") == 1
    assert len(read_metrics(run / "metrics.jsonl")) == 2


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}


def spoil_scores_and_artifact(run: Path) -> None:
    """What would be noticed last has to be noticed first: before the work, not after it."""
    (run / "evaluation.json").write_text("[")
    (run / "model.golf").unlink()


def folder_in_place_of_artifact(run: Path) -> None:
    (run / "model.golf").unlink()
    (run / "model.golf").mkdir()


def damage(run: Path, name: str) -> None:
    path = run / name
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("spoil", "arguments", "fragment"),
    [
        (lambda run: (run / "model.golf").unlink(), [], r"model\.golf: missing: run python -m train first"),
        (folder_in_place_of_artifact, [], r"model\.golf: expected a file, found a folder: move it away"),
        (lambda run: (run / "config.json").unlink(), [], r"config\.json: missing"),
        (lambda run: damage(run, "model.golf"), [], r"model\.golf"),
        (lambda run: damage(run, "config.json"), [], r"config\.json: not readable"),
        (lambda run: (run / "evaluation.json").write_text("["), [], r"evaluation\.json: not readable"),
        (spoil_scores_and_artifact, [], r"evaluation\.json: not readable"),
        (lambda run: None, ["--data-path", "/nowhere"], "/nowhere"),
        (lambda run: None, ["--stride", "33"], "stride: expected 0"),
        (lambda run: None, ["--attention", "fa3"], "attention: fa3 cannot run: needs a CUDA GPU"),
        (lambda run: None, ["--stride", "-1"], "eval_stride: must be at least 0"),
        (lambda run: None, ["--seq-len", "5000"], "one sequence needs 5001"),
        (lambda run: (run / "weights.pt").unlink(), ["--weights", "master"], r"weights\.pt: missing"),
        (lambda run: torch.save({}, run / "weights.pt"), ["--weights", "master"], "not the weights of this run"),
    ],
)
def test_bad_runs_are_refused_and_leave_no_score(
    untrained_run: Path, tmp_path: Path, spoil: Callable[[Path], object], arguments: list[str], fragment: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    spoil(run)
    before = contents(run)
    with pytest.raises(UserError, match=fragment):
        main([str(run), *arguments])
    assert contents(run) == before


@pytest.mark.parametrize("wrong", ["--batch-seqs=0", "--batch-seqs=-1", "--max-tokens=-1"])
def test_a_number_out_of_range_is_refused(untrained_run: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(untrained_run), wrong])
    assert f"argument {wrong.partition('=')[0]}: expected a whole number from" in capsys.readouterr().err


def test_help_is_complete_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    flags = {
        "--stride",
        "--rule",
        "--seq-len",
        "--max-tokens",
        "--batch-seqs",
        "--data-path",
        "--weights",
        "--device",
        "--attention",
        "--compile",
        "--logits-rounding",
        "--json",
    }
    assert flags <= set(re.findall(r"--[a-z0-9-]+", text))
    assert "python -m train.evaluate runs/" in text and "torchrun --standalone" in text


def test_a_score_that_is_no_number_is_never_written(untrained_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(untrained_run, tmp_path / "run"))
    weights = torch.load(run / "weights.pt")
    weights["embedding.weight"][7] = math.nan
    torch.save(weights, run / "weights.pt")
    with pytest.raises(UserError, match="master: the loss on the validation text is nan"):
        main([str(run), "--weights", "master", "--max-tokens", "256"])
    assert not (run / "evaluation.json").exists() and not (run / "metrics.jsonl").exists()


def test_a_score_belongs_to_the_bytes_of_its_artifact(untrained_run: Path, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(untrained_run, tmp_path / "run")))
    assert main([str(run.path)]) == 0
    found = find_evaluation(run, run.read_config())
    assert found["artifact_sha256"] == hashlib.sha256(run.artifact.read_bytes()).hexdigest()
    run.artifact.write_bytes(run.artifact.read_bytes() + b"other")
    with pytest.raises(UserError, match=r"evaluation\.json: the score of another model\.golf: evaluate again"):
        find_evaluation(run, run.read_config())
