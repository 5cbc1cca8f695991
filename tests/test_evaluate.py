"""Windows, sums and counts against a plain loop, the published counts, and the command on a run folder."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train.artifact import load_model, write_artifact
from train.config import Config
from train.data.shards import load_validation_tokens, write_shard
from train.data.tokenizer import ByteTables, byte_tables, load_tokenizer, train_tokenizer
from train.errors import UserError
from train.evaluate import evaluate_model, flat_evaluation, main, plan_windows
from train.log_grammar import GRAMMAR
from train.logger import read_metrics
from train.model.gpt import GPT
from train.quantize.tensors import quantize_model

VOCAB = 37
CONFIG = Config(vocab_size=259, eval_batch_seqs=4)


class StandIn(nn.Module):
    """Predicts from the mean of the tokens since the window's start and from the position in the window."""

    def __init__(self, longest: int = 64, dim: int = 12) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.head_weight = nn.Parameter(torch.randn(VOCAB, dim))
        self.place = nn.Parameter(torch.randn(longest, dim))
        self.mix = nn.Parameter(torch.randn(dim, dim) / 3)
        self.shapes: set[torch.Size] = set()
        self.recurrence: set[bool] = set()

    def hidden(self, ids: Tensor, *, recurrence: bool) -> Tensor:
        self.shapes.add(ids.shape)
        self.recurrence.add(recurrence)
        count = torch.arange(1, ids.shape[1] + 1)[:, None]
        mean = self.head_weight[ids].cumsum(1) / count
        return torch.tanh((mean + self.place[: ids.shape[1]]) @ self.mix) * 2


def make_text(count: int, seed: int = 0) -> tuple[np.ndarray, ByteTables]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, count).astype(np.uint16)
    boundary = np.arange(VOCAB) < 3
    base = np.where(boundary, 0, random.integers(1, 9, VOCAB)).astype(np.int16)
    space = (random.random(VOCAB) < 0.4) & ~boundary
    return tokens, ByteTables(base, space, boundary)


def plain_windows(total: int, length: int, stride: int, rule: str) -> Iterator[tuple[int, list[int]]]:
    """Start and scored targets of each window, straight from the published table."""
    start = 0
    while True:
        end = min(start + length, total)
        if stride == 0:
            if start >= total:
                return
            yield start, list(range(start, end))
            start += length
            continue
        if rule == "once":
            if start > 0 and start + length - stride >= total:
                return
            scored = range(start if start == 0 else start + length - stride, end)
        elif rule == "overlap_tail":
            if start >= total:
                return
            scored = range(start if start == 0 else max(end - stride, start), end)
        else:
            if start + length > total:
                return
            scored = range(end - stride, end)
        yield start, list(scored)
        start += stride


def plain_score(
    model: StandIn, tokens: np.ndarray, tables: ByteTables, length: int, stride: int, rule: str, softcap: float
) -> tuple[float, int, int]:
    """Nats, tokens and bytes: full logits, one window at a time, one token at a time."""
    nats, count, size = 0.0, 0, 0
    total = len(tokens) - 1
    for start, scored in plain_windows(total, length, stride, rule):
        ids = torch.tensor([[int(token) for token in tokens[start : min(start + length, total)]]])
        with torch.no_grad():
            logits = model.hidden(ids, recurrence=True)[0] @ model.head_weight.T
        z = (softcap * torch.tanh(logits / softcap)).double()
        for index in scored:
            target, previous = int(tokens[index + 1]), int(tokens[index])
            row = z[index - start]
            nats += math.log(sum(math.exp(float(value)) for value in row)) - float(row[target])
            count += 1
            size += int(tables.base_bytes[target])
            size += int(bool(tables.has_leading_space[target]) and not bool(tables.is_boundary[previous]))
    return nats, count, size


@pytest.mark.parametrize(
    ("targets", "seq_len", "overlap_tail", "once"),
    [(62_021_632, 2048, 969_088, 969_057), (45_508_608, 2048, 711_072, 711_041), (40_540_160, 2048, 633_440, 633_409)],
)
def test_published_window_counts(targets: int, seq_len: int, overlap_tail: int, once: int) -> None:
    old, new = plan_windows(targets, seq_len, 64, "overlap_tail"), plan_windows(targets, seq_len, 64, "once")
    assert (len(old.start), old.scored) == (overlap_tail, targets + 1_984)
    assert (len(new.start), new.scored) == (once, targets)
    assert old.start.dtype == new.length.dtype == new.score_from.dtype == np.int64


def test_published_counts_of_the_rule_with_full_windows() -> None:
    plan = plan_windows(50_905_088, 4096, 64, "full_windows")
    assert (len(plan.start), plan.scored) == (795_329, 50_901_056)
    assert int(plan.score_from[0]) == 4_032 and 50_905_088 - plan.scored == 4_032


def test_flat_rows_of_the_published_validation_set() -> None:
    plan = plan_windows(62_021_632, 2048, 0)
    assert (len(plan.start), plan.scored) == (30_284, 62_021_632)


@given(total=st.integers(1, 60), seq_len=st.integers(1, 20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_rule_scores_the_targets_it_promises(total: int, seq_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(0, seq_len))
    for rule in ("once", "overlap_tail", "full_windows"):
        if rule == "full_windows" and stride and total < seq_len:
            with pytest.raises(UserError, match="no window of"):
                plan_windows(total, seq_len, stride, rule)
            continue
        plan = plan_windows(total, seq_len, stride, rule)
        found = [
            (start, list(range(start + score_from, start + length)))
            for start, length, score_from in zip(*plan, strict=True)
        ]
        assert found == list(plain_windows(total, seq_len, stride, rule))
        times = np.bincount([target for _, targets in found for target in targets], minlength=total)
        if rule == "once" or stride == 0:
            assert times.tolist() == [1] * total
        elif rule == "overlap_tail":
            assert times.min() == 1


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((0, 8, 2, "once"), "nothing to score"),
        ((10, 8, 9, "once"), "stride: expected 0"),
        ((10, 8, -1, "once"), "stride: expected 0"),
        ((10, 8, 2, "twice"), "rule: expected one of once, overlap_tail, full_windows"),
    ],
)
def test_bad_plans_are_refused(arguments: tuple[int, int, int, str], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        plan_windows(*arguments)


@pytest.mark.parametrize("rule", ["once", "overlap_tail", "full_windows"])
@pytest.mark.parametrize(
    ("count", "seq_len", "stride"),
    [
        (97, 16, 1),
        (97, 16, 4),
        (99, 16, 4),
        (98, 16, 16),
        (83, 16, 0),
        (201, 64, 64),
        (130, 64, 24),
        (10, 16, 4),
        (2, 16, 1),
        (17, 16, 4),
    ],
)
def test_scores_equal_the_plain_loop(rule: str, count: int, seq_len: int, stride: int) -> None:
    tokens, tables = make_text(count, seed=count)
    model = StandIn()
    if rule == "full_windows" and stride and count - 1 < seq_len:
        with pytest.raises(UserError, match="no window of"):
            evaluate_model(model, tokens, tables, CONFIG, seq_len=seq_len, stride=stride, rule=rule)
        return
    nats, scored, size = plain_score(model, tokens, tables, seq_len, stride, rule, CONFIG.logit_softcap)
    result = evaluate_model(model, tokens, tables, CONFIG, seq_len=seq_len, stride=stride, rule=rule)
    assert (result.tokens, result.bytes) == (scored, size)
    assert result.val_loss == pytest.approx(nats / scored, rel=1e-6)
    assert result.val_bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert result.windows == len(list(plain_windows(count - 1, seq_len, stride, rule)))


def test_settings_come_from_the_config_unless_given() -> None:
    tokens, tables = make_text(90)
    model = StandIn()
    config = CONFIG.replace(
        eval_seq_len=16, eval_stride=4, eval_rule="overlap_tail", eval_max_tokens=50, logit_softcap=2.0
    )
    result = evaluate_model(model, tokens, tables, config)
    nats, scored, size = plain_score(model, tokens[:51], tables, 16, 4, "overlap_tail", 2.0)
    assert (result.tokens, result.bytes) == (scored, size)
    assert result.val_loss == pytest.approx(nats / scored, rel=1e-6)
    given_zero = evaluate_model(model, tokens, tables, config, stride=0, max_tokens=0, seq_len=8)
    assert (given_zero.tokens, given_zero.windows) == (89, 12)
    rounded = evaluate_model(model, tokens, tables, config.replace(logits_rounding="bf16"))
    assert rounded.val_loss != result.val_loss
    assert rounded.val_loss == pytest.approx(result.val_loss, rel=1e-2)


def test_shapes_are_static_and_the_recurrence_flag_and_training_mode_survive() -> None:
    tokens, tables = make_text(120)
    model = StandIn().train()
    evaluate_model(model, tokens, tables, CONFIG, seq_len=16, stride=4, batch_seqs=5, recurrence=False)
    # 27 windows go in 6 batches
    assert model.shapes == {torch.Size([5, 16])} and model.recurrence == {False} and model.training


def test_flat_evaluation_takes_the_training_rows_and_the_first_tokens() -> None:
    tokens, tables = make_text(100)
    model = StandIn()
    config = CONFIG.replace(
        train_seq_len=16, train_batch_tokens=64, val_max_tokens=40, val_batch_size=32, eval_stride=4
    )
    result = flat_evaluation(model, tokens, tables, config)
    nats, scored, size = plain_score(model, tokens[:41], tables, 16, 0, "once", config.logit_softcap)
    assert (result.tokens, result.bytes, result.windows) == (40, size, 3)
    assert result.val_loss == pytest.approx(nats / scored, rel=1e-6)
    assert model.shapes == {torch.Size([2, 16]), torch.Size([1, 8]), torch.Size([1, 16])}


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("count", [100, 20])
def test_ranks_split_the_windows_by_count_and_their_sums_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, world_size: int, count: int
) -> None:
    tokens, tables = make_text(count)
    whole = evaluate_model(StandIn().double(), tokens, tables, CONFIG, seq_len=16, stride=4)
    sums: list[list[float]] = []

    def record(tensor: Tensor) -> None:
        sums[-1] += tensor.reshape(-1).tolist()
        # stands for what the other ranks would add
        tensor.add_(1)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", record)
    for rank in range(world_size):
        sums.append([])
        evaluate_model(
            StandIn().double(), tokens, tables, CONFIG, seq_len=16, stride=4, rank=rank, world_size=world_size
        )
    nats, scored, size = (sum(column) for column in zip(*sums, strict=True))
    assert (scored, size) == (whole.tokens, whole.bytes)
    assert nats == pytest.approx(whole.val_loss * whole.tokens, rel=1e-12)
    # the first window scores 16 tokens, each further one 4, the last one what is left
    counts = [row[1] for row in sums]
    opening = next(rank for rank, count in enumerate(counts) if count)
    counts[opening] -= 12
    shares = [math.ceil(count / 4) for count in counts]
    assert sum(shares) == whole.windows and max(shares) - min(shares) <= 1


def test_several_ranks_without_a_process_group_are_refused() -> None:
    tokens, tables = make_text(50)
    with pytest.raises(RuntimeError, match="init_process_group"):
        evaluate_model(StandIn(), tokens, tables, CONFIG, seq_len=16, stride=4, world_size=2)


def test_texts_that_cannot_be_scored_are_refused() -> None:
    tokens, tables = make_text(50)
    with pytest.raises(UserError, match="nothing to score"):
        evaluate_model(StandIn(), tokens[:1], tables, CONFIG, seq_len=16, stride=4)
    with pytest.raises(UserError, match="nothing to score"):
        evaluate_model(StandIn(), tokens[:0], tables, CONFIG, seq_len=16, stride=4)
    with pytest.raises(UserError, match=f"{VOCAB}"):
        evaluate_model(StandIn(), np.array([1, 2, VOCAB], np.uint16), tables, CONFIG, seq_len=16, stride=4)
    with pytest.raises(UserError, match="no bytes"):
        evaluate_model(StandIn(), np.array([1, 1, 1], np.uint16), tables, CONFIG, seq_len=16, stride=4)


def test_progress_shows_the_running_bpb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.progress.LINE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("train.evaluate.NOTE_INTERVAL_SECONDS", 0.0)
    tokens, tables = make_text(90)
    result = evaluate_model(StandIn(), tokens, tables, CONFIG, seq_len=16, stride=4, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].startswith("evaluate: 89/89 tokens (100 %)")
    assert lines[-1].endswith(f"bpb {result.val_bpb:.4f}")
    evaluate_model(StandIn(), tokens, tables, CONFIG, seq_len=16, stride=4)
    assert capsys.readouterr().out == ""


TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. ".split()
MODEL = Config(
    vocab_size=300,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    train_seq_len=32,
    train_batch_tokens=256,
    rope_train_seq_len=64,
    recur_layers=(1,),
    quantizer="rtn",
    passthrough_max_elements=64,
    embed_dtype="float32",
    eval_stride=8,
    eval_batch_seqs=7,
)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with data, weights and artifact of a model that was not trained."""
    root = tmp_path_factory.mktemp("finished")
    data, run = root / "data", root / "run"
    data.mkdir()
    run.mkdir()
    random = np.random.default_rng(3)
    documents = [" ".join(random.choice(TEXT, 40)) for _ in range(60)]
    tokenizer = train_tokenizer(documents, MODEL.vocab_size, data / "tiny_300_bpe.model")
    ids = np.concatenate([[1, *tokenizer.Encode(document)] for document in documents[:12]])
    write_shard(data / "tiny_val_000000.bin", ids)
    config = MODEL.replace(data_path=str(data))
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    torch.manual_seed(5)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    torch.save(model.state_dict(), run / "weights.pt")
    (run / "training.json").write_text(json.dumps({"recurrence": True}))
    write_artifact(run / "model.golf", quantize_model(model, config, {}), config, code_bytes=0)
    return run


def run_truth(run: Path, seq_len: int, stride: int, limit: int | None = None) -> tuple[float, int, int]:
    """Nats, tokens and bytes of the artifact's model by the plain loop."""
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    tokens = load_validation_tokens(config.data_path, 32)[:limit]
    tables = byte_tables(load_tokenizer(Path(config.data_path) / "tiny_300_bpe.model", 300), 300)
    return plain_score(load_model(run / "model.golf"), tokens, tables, seq_len, stride, "once", config.logit_softcap)


def test_command_scores_the_artifact_from_its_bytes(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    assert main([str(run)]) == 0
    nats, tokens, size = run_truth(run, 32, 8)
    (entry,) = json.loads((run / "evaluation.json").read_text()).values()
    assert (entry["tokens"], entry["bytes"]) == (tokens, size)
    assert entry["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert entry["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    rounded, exact = capsys.readouterr().out.splitlines()[-2:]
    match = GRAMMAR["final"].fullmatch(rounded)
    assert match and match["name"] == "int6_sliding_window" and match["stride"] == "8"
    assert exact == f"final_int6_sliding_window_exact val_loss:{entry['val_loss']:.8f} val_bpb:{entry['val_bpb']:.8f}"
    assert read_metrics(run / "metrics.jsonl") == [{"kind": "final", **entry}]


def test_command_options_change_what_is_scored_and_scores_stand_side_by_side(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    arguments = ["--stride", "0", "--max-tokens", "150", "--seq-len", "16", "--batch-seqs", "3", "--json"]
    main([str(run), *arguments])
    entry = json.loads(capsys.readouterr().out)
    nats, tokens, size = run_truth(run, 16, 0, 151)
    assert (entry["tokens"], entry["bytes"], entry["windows"], entry["name"]) == (150, size, 10, "int6_roundtrip")
    assert entry["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    main([str(run), *arguments, "--weights", "master"])
    master = json.loads(capsys.readouterr().out)
    assert master["name"] == "prequant_roundtrip" and 0 < abs(master["val_loss"] - entry["val_loss"]) < 0.2
    main([str(run), "--rule", "overlap_tail", "--max-tokens", "150", "--json"])
    repeated = json.loads(capsys.readouterr().out)
    # windows at 120, 128, 136 and 144 end at 150 with the 8 targets that the one at 112 ... scored already
    assert repeated["tokens"] == plan_windows(150, 32, 8, "overlap_tail").scored > 150
    main([str(run), *arguments])
    scores = json.loads((run / "evaluation.json").read_text())
    assert len(scores) == 3 and len(read_metrics(run / "metrics.jsonl")) == 4


def test_command_gives_the_same_score_on_two_ranks(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    main([str(run), "--json"])
    (alone,) = json.loads((run / "evaluation.json").read_text()).values()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "train.evaluate",
    ]
    root = Path(__file__).parents[1]
    result = subprocess.run([*command, str(run)], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (shared,) = json.loads((run / "evaluation.json").read_text()).values()
    assert shared["world_size"] == 2 and alone["world_size"] == 1
    for name in ("tokens", "bytes", "windows"):
        assert shared[name] == alone[name]
    assert shared["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-7)
    # one rank reports for both
    assert result.stdout.count("final_int6_sliding_window_exact") == 1
    assert len(read_metrics(run / "metrics.jsonl")) == 2


def damage(run: Path, name: str) -> None:
    path = run / name
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("spoil", "arguments", "fragment"),
    [
        (lambda run: (run / "model.golf").unlink(), [], r"model\.golf: missing: run python -m train first"),
        (lambda run: (run / "config.json").unlink(), [], r"config\.json: missing"),
        (lambda run: damage(run, "model.golf"), [], r"model\.golf"),
        (lambda run: damage(run, "config.json"), [], r"config\.json: not readable"),
        (lambda run: (run / "evaluation.json").write_text("["), [], r"evaluation\.json: not readable"),
        (lambda run: None, ["--data-path", "/nowhere"], "/nowhere"),
        (lambda run: None, ["--stride", "33"], "stride: expected 0"),
        (lambda run: None, ["--stride", "-1"], "eval_stride: must be at least 0"),
        (lambda run: None, ["--seq-len", "5000"], "one sequence needs 5001"),
        (lambda run: (run / "weights.pt").unlink(), ["--weights", "master"], r"weights\.pt: missing"),
        (lambda run: damage(run, "weights.pt"), ["--weights", "master"], r"weights\.pt"),
        (lambda run: torch.save({}, run / "weights.pt"), ["--weights", "master"], "not the weights of this run"),
    ],
)
def test_bad_runs_are_refused_and_leave_no_score(
    finished_run: Path, tmp_path: Path, spoil: Callable[[Path], object], arguments: list[str], fragment: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    spoil(run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match=fragment):
        main([str(run), *arguments])
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


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
        "--json",
    }
    assert flags <= set(re.findall(r"--[a-z-]+", text))
    assert "python -m train.evaluate runs/" in text and "torchrun --standalone" in text
