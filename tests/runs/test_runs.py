"""`python -m train.runs`: the table of runs in any state, the page of one, a comparison, deletion, the dashboard."""

import json
import re
import shutil
import webbrowser
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.data.manifest import DatasetInfo, SplitInfo
from train.data.paid_prefix import NOT_COMPLIANT
from train.recipes import load_recipe
from train.run.folder import RunFolder, create_run_folder
from train.runs.__main__ import main
from train.runs.compare import same_scored_text
from train.runs.read import read_run
from train.submission import plots

# a run of 4 steps: val_bpb 7.2412, 588,271 bytes
FIXTURE = Path(__file__).parents[1] / "fixtures/run_0af82ef"


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNS_DIR", raising=False)
    Path("runs").mkdir()
    return Path("runs")


def add(name: str, *without: str, **changes: object) -> RunFolder:
    """A copy of the fixture's run in runs/, without some files and with other settings."""
    folder = RunFolder(Path(shutil.copytree(FIXTURE, Path("runs", name))))
    for file in without:
        (folder.path / file).unlink()
    if changes:
        folder.write_config(folder.read_config().replace(**changes))
    return folder


def summarized(folder: RunFolder, **changes: object) -> RunFolder:
    write_json(folder.summary, {**read_json(folder.summary, ""), **changes})
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_each_state_of_a_run_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    add("finished")
    add("killed", "summary.json", "weights.pt", "training.json", iterations=2000)
    add("trained", "summary.json")
    (add("damaged").path / "config.json").write_text("{")
    create_run_folder(load_recipe("baseline").config(run_id="new", matrix_lr=0.5, seed=7, checkpoint_every=3))
    for name in ("records", "sweep"):
        (Path("runs") / name).mkdir()
    (Path("runs") / "sweep" / "sweep.journal").touch()
    (Path("runs") / ".half.part").mkdir()
    summarized(add("paid"), label=NOT_COMPLIANT)
    with add("at work").held():
        text = printed(capsys)
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line) for line in text.splitlines()}
    # name, status, score, text, steps, seconds, bytes
    assert rows["finished"][:7] == ["finished", "finished", "7.2412", "tiny (4,448 B)", "4", "0.9", "588,271"]
    assert rows["killed"][:7] == ["killed", "interrupted", "7.2409~", "tiny", "4/2,000", "0.9", "-"]
    assert rows["trained"][:7] == ["trained", "trained", "7.2409~", "tiny", "4", "0.9", "-"]
    assert rows["at work"][1] == "running"
    assert rows["paid"][2] == "NOT COMPLIANT 7.2412"
    assert rows["new"][1:] == [
        "interrupted", "-", "fineweb10B_sp1024", "0/20,000", "0.0", "-", "baseline seed=7 matrix_lr=0.5",
    ]  # fmt: skip
    assert rows["damaged"][:2] == ["damaged", "damaged"]
    assert (
        rows["damaged"][2]
        == "runs/damaged/config.json: not readable as JSON (JSONDecodeError): restore it or train again"
    )
    assert text.splitlines()[-4:] == [
        "~ the last validation during training, before quantization; not the artifact's score",
        "scores on different texts are not comparable",
        "sweep sweep: python -m train.runs list runs/sweep",
        "folders without a config.json: records",
    ]
    assert ".half" not in text
    # a path lists another folder, and a folder that is a run is the list
    assert len(printed(capsys, "list", "runs/finished").splitlines()) == 2
    assert printed(capsys, "list", "runs/sweep") == "runs/sweep: no run in it\n"
    with pytest.raises(UserError, match="nowhere: no such folder"):
        main(["list", "nowhere"])


@pytest.mark.parametrize("file", ["config.json", "summary.json", "metrics.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\n", b"[]\n", b"null\n", b'{"kind": "val"}\n', b'{"kind": "val", "step": "x", "seconds": 1, "val_bpb": 1}\n',
        b'{"kind": "val", "step": 1, "seconds": 1, "val_bpb": "x"}\n', b'{"kind": "train", "step": null, "seconds": []}\n',
        b'{"kind": ["val"]}\n', b'{"recipe": "none", "\\n": 1}\n', b"[" * 5000 + b"\n",
    ],
)  # fmt: skip
def test_whatever_a_file_holds_the_run_has_one_line(
    file: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    add("good")
    folder = add("bad")
    (folder.path / file).write_bytes(content)
    if file == "metrics.jsonl":
        # a torn last line is no damage
        (folder.path / file).write_bytes(content + b'{"kind"')
    text = printed(capsys)
    assert [line.split()[0] for line in text.splitlines()] == ["run", "bad", "good"]
    harmless = file == "metrics.jsonl" and b'["val"]' in content
    assert ("damaged" in text and f"runs/bad/{file}" in text) != harmless
    # what one command shows of it is an error in one line
    if not harmless:
        with pytest.raises(UserError, match=f"runs/bad/{file}: .*") as refused:
            main(["show", "bad"])
        assert "\n" not in str(refused.value)


def test_wide_and_narrow_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add("wide\nname", "summary.json")
    with open(folder.metrics, "a") as metrics:
        many = {f"column{number}": number for number in range(5000)}
        metrics.write(json.dumps({"kind": "train", "step": 5, "seconds": 1.5, "train_loss": 1.0, **many}) + "\n")
    write_json(folder.config, {**folder.read_config().to_dict(), "recipe": "x" * 3000})
    name, *_ = printed(capsys).splitlines()[1].split("  ")
    assert name == r"'wide\nname'"
    assert printed(capsys).splitlines()[1].endswith(f"no recipe {'x' * 3000} here")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for columns in (1, 20, 80, 5000):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(len(line) for line in printed(capsys).splitlines()[:2]) <= columns


def test_the_page_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    add("finished", matrix_lr=0.5)
    add("killed", "summary.json", "weights.pt", "training.json", matrix_lr=0.5)
    text = printed(capsys, "show", "finished")
    assert "\n  val_bpb    7.2412 bits per byte of text, by the model loaded from the artifact\n" in text
    assert "\n  status     finished\n" in text and "resume" not in text
    # a path names a run, too
    text = printed(capsys, "show", "runs/killed/")
    assert "\n  training   step 4 of at most 4, 0.9 s\n  val_bpb    7.2409 at step 4, before quantization\n" in text
    assert "\n  resume     python -m train --run_id killed --resume auto\n" in text
    assert "\ndiffers from recipe quickstart:\n" in text and "\n  matrix_lr=0.5\n" in text
    assert re.search(r"\n +4,597 B  model\.golf\n", text)
    with pytest.raises(UserError, match="nothing: no such run folder"):
        main(["show", "nothing"])


def test_two_runs_are_compared_with_one_seed_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add("a", matrix_lr=0.5)
    summarized(add("b"), val_bpb=7.0, steps=6)
    drawn: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    text = printed(capsys, "compare", "a", "b")
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in text.splitlines()}
    assert rows["bpb of the artifact"] == ["7.2412", "7.0000", "+0.2412"]
    assert rows["steps"] == ["4", "6", "-2"] and rows["matrix_lr"] == ["0.5", "0.04"]
    assert rows["bytes of code and model"] == ["588,271", "588,271", "+0"]
    assert "seed" not in rows and "not comparable" not in text and "not known" not in text
    assert text.endswith("Curves: runs/a_vs_b.png\n")
    assert Path("runs/a_vs_b.png").read_bytes().startswith(b"\x89PNG")
    # the validations of metrics.jsonl, over steps and over seconds
    bpb = [7.604802827414805, 6.768292958156052, 7.240927712532107]
    for axis, xs in zip(drawn[0].axes, ([0, 2, 4], [0.0, 0.4053769760002979, 0.9432418000005782]), strict=True):
        curves = [line for line in axis.lines if len(line.get_xdata()) == 3]
        assert [(list(line.get_xdata()), list(line.get_ydata())) for line in curves] == [(xs, bpb)] * 2
        assert [line.get_ydata()[0] for line in axis.lines if line not in curves] == [7.241205004397796, 7.0]


@pytest.mark.filterwarnings("error")
def test_a_comparison_takes_names_that_are_formulas_and_runs_without_curves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summarized(add("_$x^$"), label=NOT_COMPLIANT)
    add("long" * 50)
    for name in ("new", "other"):
        create_run_folder(load_recipe("baseline").config(run_id=name))
    text = printed(capsys, "compare", "_$x^$", "new", "--out", "c.png")
    assert NOT_COMPLIANT in text and "-" in text and Path("c.png").stat().st_size > 10_000
    assert "long_vs_new.png\n" in printed(capsys, "compare", "long" * 50, "new")
    assert printed(capsys, "compare", "new", "other").endswith("No curves: neither run has a validation.\n")
    with pytest.raises(UserError, match="--out: the folder none does not exist"):
        main(["compare", "new", "other", "--out", "none/c.png"])


def test_scores_on_different_texts_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    add("a")
    summarized(add("b"), bytes=9000, tokens=8000)
    text = printed(capsys, "compare", "a", "b")
    assert "The scores are not comparable: the validation texts differ." in text
    assert re.search(r"^bpb of the artifact +7\.2412 +7\.2412$", text, re.MULTILINE)
    assert re.search(r"^steps +4 +4 +\+0$", text, re.MULTILINE)


def manifest(folder: str, tokens: int, text_bytes: int, digest: str) -> None:
    val = SplitInfo(documents=3, text_bytes=text_bytes, normalized_bytes=4500, tokens=tokens, shards=1)
    made = DatasetInfo(folder, "text", 352, "t.model", digest, val, val, 1000)
    Path(folder).mkdir()
    (Path(folder) / "manifest.json").write_text(json.dumps({**asdict(made), "notes": ""}))


@pytest.mark.parametrize(
    ("others", "same"),
    [
        # the same text with another tokenizer; another text with the same tokenizer
        ((4020, 5000, "second"), True),
        ((4020, 5001, "first"), False),
        # built again since: its tokens are not those that were scored
        ((9000, 5000, "first"), None),
    ],
)
def test_texts_are_told_apart_by_their_manifests(others: tuple[int, int, str], same: bool | None) -> None:
    manifest("first", 4001, 5000, "first")
    manifest("second", *others)
    a, b = add("a", data_path="first"), add("b", data_path="second")
    summarized(b, tokens=4010)
    assert same_scored_text(read_run(a), read_run(b)) is same
    assert same_scored_text(read_run(a), read_run(a)) is True


@pytest.mark.parametrize(
    ("answer", "gone"),
    [("y", True), ("YES ", True), ("", False), ("n", False), ("x", False), (EOFError, False), (b"\xff", False)],
)
def test_a_run_is_deleted_after_a_question(
    answer: object, gone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = add("mine")
    asked: list[str] = []

    def reply(question: str) -> str:
        asked.append(question)
        if answer is EOFError:
            raise EOFError
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    monkeypatch.setattr("builtins.input", reply)
    files = [path for path in FIXTURE.iterdir() if path.is_file()]
    text = printed(capsys, "rm", "mine")
    assert re.fullmatch(rf"delete runs/mine \({len(files) + 1} files, [\d,]+ bytes\)\? \[y/N\] ", asked[0])
    assert text.split() == ["deleted" if gone else "kept", "runs/mine"]
    assert folder.path.exists() != gone
    assert {path.name for path in Path("runs").iterdir()} == (set() if gone else {"mine"})


def test_what_is_no_idle_run_is_not_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    folder = add("mine")
    for lock in (folder.held(), folder.held(shared=True)):
        with lock, pytest.raises(UserError, match="mine: another process is at work on this run"):
            main(["rm", "mine", "--yes"])
    Path("runs/foreign").mkdir()
    Path("runs/link").symlink_to(folder.path.resolve())
    for name, said in (
        ("foreign", "is not a run folder"),
        ("link", "is a link"),
        ("..", "is not a run folder"),
        (".", "is"),
    ):
        with pytest.raises(UserError, match=said):
            main(["rm", name, "--yes"])
    # transformers calls the settings of its models config.json, too
    Path("runs/llama").mkdir()
    Path("runs/llama/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="runs/llama is no run folder"):
        main(["rm", "llama", "--yes"])
    assert len(list(Path("runs").iterdir())) == 4 and len(list(folder.path.iterdir())) > 5
    # a damaged one goes, too
    (folder.path / "config.json").write_text("{")
    place = folder.path.resolve()
    monkeypatch.chdir(place)
    assert main(["rm", ".", "--yes"]) == 0
    assert not place.exists() and len(list(place.parent.iterdir())) == 3


@pytest.mark.parametrize("found", [True, False])
def test_the_dashboard_is_opened(
    found: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def browse(url: str) -> bool:
        opened.append(url)
        return found

    monkeypatch.setattr(webbrowser, "open", browse)
    with pytest.raises(UserError, match=r"^nowhere: no such folder: python -m train makes run folders below runs/$"):
        main(["open", "nowhere"])
    add("good")
    (add("bad").path / "config.json").write_text("{")
    text = printed(capsys, "open")
    page = Path("runs/dashboard.html").resolve()
    assert opened == [page.as_uri()] and '"id": "good"' in page.read_text()
    assert text.startswith("not shown: runs/bad/config.json: ")
    assert text.endswith(f"1 run: {page.as_uri()}\n" if found else f"no browser found: open {page.as_uri()} in one\n")


def test_the_folder_of_runs_may_be_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add("mine", "summary.json", "weights.pt")
    Path("runs").rename("elsewhere")
    monkeypatch.setenv("RUNS_DIR", "elsewhere")
    assert "mine" in printed(capsys)
    assert "resume     python -m train --run_id mine --runs_dir elsewhere --resume auto" in printed(
        capsys, "show", "mine"
    )
