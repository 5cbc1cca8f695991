"""train_gpt.py in its three forms: alone in an empty folder it trains and scores as the package does, to the last bit."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from train.common.errors import UserError
from train.config import format_value
from train.recipes import load_recipe
from train.run.folder import RunFolder
from train.run.log_grammar import parse_log
from train.single_file import pack as single_file
from train.single_file.code_size import counted_code_bytes
from train.single_file.pack import FORMS, form_bytes, minify, pack, script_modules
from train.submission.__main__ import main
from train.submission.build import package_score, recipe_settings, script_score, write_script
from train.submission.runs import read_run


@pytest.fixture(scope="module")
def run(narrow_runs: list[Path]) -> Path:
    return narrow_runs[0]


@pytest.fixture(scope="module")
def expected(run: Path) -> dict[str, Any]:
    return package_score(read_run(run))


@pytest.mark.parametrize("form", ["", *FORMS])
def test_every_form_scores_the_artifact_as_the_package_does(
    run: Path, expected: dict[str, Any], tmp_path: Path, form: str
) -> None:
    write_script(tmp_path, RunFolder(run).read_config(), form)
    assert [path.name for path in tmp_path.iterdir()] == ["train_gpt.py"] or not form
    found = script_score(tmp_path, read_run(run))
    for name in ("val_loss", "val_bpb", "tokens", "bytes", "windows", "stride", "rule"):
        assert found[name] == expected[name]


def test_the_smallest_form_trains_alone_in_an_empty_folder_as_the_package_did(run: Path, tmp_path: Path) -> None:
    config = RunFolder(run).read_config()
    write_script(tmp_path, config, "raw")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "SEED": "42",
        "DATA_PATH": config.data_path,
        "RUN_ID": "again",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "train_gpt.py", "--train_log_every", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not built" not in done.stderr
    assert "a packed script carries no compiled code; PyTorch gives the same values" in done.stderr
    # what the script carries is told apart from what was set
    told = re.findall(r"^setting:(\w+)=.* from:(.*)$", (tmp_path / "runs/again/train_seed42.log").read_text(), re.M)
    sources = dict(told)
    assert (sources["data_path"], sources["iterations"], sources["train_log_every"]) == (
        "environment DATA_PATH", "the script", "command line",
    )  # fmt: skip
    again = parse_log(tmp_path / "runs/again/train_seed42.log")
    before = parse_log(run / "train_seed42.log")
    for log in (again, before):
        for final in log["finals"].values():
            final.pop("eval_time_ms", None)
    assert again["finals"] == before["finals"]
    # what it counts as code is itself, and its run keeps it
    script = (tmp_path / "train_gpt.py").read_bytes()
    assert again["sizes"]["code"] == len(script)
    assert script.decode("latin-1").encode() in (tmp_path / "runs/again/source.txt").read_bytes()
    assert not (tmp_path / "runs/again/README.md").exists()


def test_the_plain_form_holds_each_module_as_it_is(tmp_path: Path) -> None:
    text = pack("baseline", {"SEED": "7"}, "plain").decode()
    tree = ast.parse(text)
    assert ast.get_docstring(tree).startswith("Trains, quantizes, packs and scores.")
    held = {
        node.targets[0].slice.value: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
    }
    assert held == script_modules("baseline", {}).sources
    assert "r'''" in text and "\\n" not in text.split("FILES['train/loop.py']")[1][:200]
    assert "    'RECIPE': 'baseline',\n    'SEED': '7',\n" in text


def test_forms_fall_in_size_and_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = form_bytes("quickstart")
    assert list(sizes) == list(FORMS)
    assert sizes["plain"] > 3 * sizes["wrapped"]
    # base85 writes 4 bytes as 5; what a latin-1 source must escape is a hundredth
    assert sizes["wrapped"] / sizes["raw"] == pytest.approx(1.25 / 1.02, rel=0.02)
    # what a run of the recipe counts
    config = load_recipe("quickstart").config()
    assert sizes == {form: counted_code_bytes(config.replace(code_form=form)) for form in FORMS}
    text = (Path(__file__).parents[2] / "docs" / "artifact.md").read_text()
    for form, said in (
        ("wrapped", r"It takes (\d+) to\s(\d+) kB"),
        ("raw", r"or (\d+) to (\d+) kB in the form `raw`"),
    ):
        smallest, largest = map(int, re.search(said, text).groups())
        assert smallest < sizes[form] / 1000 < largest
    assert main(["code", "quickstart"]) == 0
    output = capsys.readouterr().out
    assert all(re.search(rf"^{form} +{size:,} bytes", output, re.M) for form, size in sizes.items())
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["build", "--help"])
    assert f"{{{','.join(FORMS)}}}" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["wrapped", "raw"])
@pytest.mark.parametrize("damage", ["changed", "missing", "cut short"])
def test_a_damaged_script_says_so_in_one_line(tmp_path: Path, form: str, damage: str) -> None:
    script = bytearray(pack("quickstart", {}, form))
    middle = script.index(b"a", len(script) // 2)
    if damage == "changed":
        script[middle : middle + 1] = b"b"
    elif damage == "missing":
        del script[middle]
    else:
        del script[middle : script.rindex(b"\n try:") - (1 if form == "wrapped" else 3)]
    (tmp_path / "train_gpt.py").write_bytes(script)
    command = [sys.executable, "-I", "train_gpt.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    message = "error: train_gpt.py is damaged: copy or build it again\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


@pytest.mark.parametrize("form", ["wrapped", "raw"])
def test_a_script_that_was_cut_off_is_no_python(form: str) -> None:
    script = pack("quickstart", {}, form)
    begin, payload, tail = script.index(b"import"), script.index(b"P=") + 4, script.rindex(b"try:S=") - 4
    # but for the line break at its end
    for end in (*range(begin + 6, payload), len(script) // 2, *range(tail, len(script) - 1)):
        with pytest.raises(SyntaxError):
            compile(script[:end], "train_gpt.py", "exec")
    compile(script, "train_gpt.py", "exec")


@pytest.mark.parametrize(
    "source", ["x = 1\n", "'''a'''\n", "a = '''b''' + \"\"\"c\"\"\"\n", "r = r'\\n'  # \\", "", "é = 'ü\\x00'\n"]
)
def test_any_source_survives_its_quotes(source: str) -> None:
    assert ast.literal_eval(single_file._literal(source)) == source


@given(st.binary(max_size=300) | st.lists(st.sampled_from(b"'\\\r\n\0\x1a1\"\xe9")).map(bytes))
@example(bytes(range(256)))
def test_any_bytes_survive_a_latin1_source(data: bytes) -> None:
    source = single_file.LATIN1 + b"P=" + single_file._latin1_literal(data) + b"\n"
    # a file's lines are read so, whatever ends them
    assert io.TextIOWrapper(io.BytesIO(source), encoding="latin-1").read().encode("latin-1") == source
    names: dict[str, str] = {}
    exec(compile(source, "train_gpt.py", "exec"), names)
    assert names["P"].encode("latin-1") == data


def test_minifying_keeps_what_programs_read() -> None:
    source = (
        '"""doc"""\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    first: int = 3\n\n'
        "def public(argument: int) -> int:\n    # comment\n    intermediate_value = argument + 1\n    return intermediate_value\n"
    )
    small = minify("train/x.py", source)
    assert "doc" not in small and "comment" not in small and "intermediate_value" not in small
    values: dict[str, object] = {}
    exec(small, values)
    assert values["A"](4).first == 4 and values["public"](argument=4) == 5
    flags = "def setting(default, help, low=0):\n    return default\nx = setting(7, 'what it is', low=3)\nf(y, help='what', low=4)\n"
    assert minify("train/y.py", flags).splitlines()[1:] == ["x=setting(7,'',low=3)", "f(y,low=4)"]
    kernel = "def kernel(x_ptr, BLOCK: tl.constexpr):\n    offsets = BLOCK\n    return offsets\n"
    assert minify("golf_kernels/x_triton.py", kernel).count("BLOCK:tl.constexpr") == 1
    assert "offsets" in minify("golf_kernels/x_triton.py", kernel)


def test_a_minified_module_is_kept_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "golf_kernels"
    made = []
    monkeypatch.setattr(single_file, "_minified", lambda _, name, source: made.append(name) or f"small {name} {source}")

    def small(name: str, source: str) -> str:
        minify.cache_clear()
        return minify(name, source)

    assert [small("a", "x"), small("a", "x"), small("a", "y"), small("b", "x")] == [
        "small a x", "small a x", "small a y", "small b x",
    ]  # fmt: skip
    assert made == ["a", "a", "b"] and len(list(cache.iterdir())) == 3
    # a damaged file is made again, and a folder that cannot be written keeps nothing
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes().replace(b"small", b"smell"))
    assert small("a", "x") == small("a", "x") == "small a x" and made == ["a", "a", "b", "a"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert small("a", "x") == small("a", "x") == "small a x" and len(made) == 6
    minify.cache_clear()


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="form: expected one of plain, wrapped, raw, got 'tiny'"):
        pack("quickstart", {}, "tiny")
    with pytest.raises(UserError, match="recipe: no recipe 'nothing'"):
        pack("nothing", {}, "plain")
    minify.cache_clear()
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    with pytest.raises(UserError, match="python-minifier: not installed: pip install"):
        pack("quickstart", {}, "wrapped")


def test_settings_of_the_script_are_text(run: Path) -> None:
    settings = recipe_settings(RunFolder(run).read_config())
    text = pack("quickstart", {name.upper(): format_value(value) for name, value in settings.items()}, "plain").decode()
    assert "'RECUR_LAYERS': '1,2'" in text and "'MODEL_DIM': '32'" in text
    assert json.dumps(settings["recur_layers"]) == "[1, 2]"
