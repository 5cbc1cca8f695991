"""What of the code counts, and how much it is."""

import importlib.util
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.config import Config
from train.recipes import load_recipe
from train.single_file import code_size, sources
from train.single_file.code_size import check_code_form, counted_code_bytes
from train.single_file.pack import pack, script_settings
from train.single_file.sources import package_source, read_source

ROOT = Path(__file__).resolve().parents[2]


def test_a_packed_script_counts_itself_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train_gpt.py"
    script.write_text("y = 'ü'\n")
    for module in (code_size, sources):
        monkeypatch.setattr(module, "SCRIPT", script)
    assert counted_code_bytes(Config()) == 9
    assert package_source() == "# train_gpt.py\ny = 'ü'\n"


def test_a_log_begins_with_all_sources() -> None:
    text = package_source()
    for name in ("csrc/int6.cu", "golf_kernels/muon.py", "train/config/settings.py"):
        assert f"# {name}\n{(ROOT / name).read_text()}" in text
    assert "\n# tests/" not in text and "\n# benchmarks/" not in text


def test_code_that_cannot_be_counted_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.py: no such file"):
        read_source(tmp_path / "none.py")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    with pytest.raises(UserError, match=r"latin\.py: expected UTF-8 source, found byte 0xe9 at 2"):
        read_source(tmp_path / "latin.py")


def test_the_code_that_counts_is_the_script_that_a_record_ships() -> None:
    config = load_recipe("quickstart").config(seed=7, matrix_lr=0.03)
    sizes = {form: counted_code_bytes(config.replace(code_form=form)) for form in ("raw", "wrapped", "plain")}
    assert sorted(sizes, key=sizes.__getitem__) == ["raw", "wrapped", "plain"]
    assert sizes["wrapped"] == len(pack("quickstart", script_settings(config), "wrapped"))


def test_a_form_that_cannot_be_made_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"code_form: wrapped needs python-minifier.*CODE_FORM=plain"):
        check_code_form(Config())
    check_code_form(Config(code_form="plain"))


@pytest.mark.parametrize("form", ["minified", "sources"])
def test_a_form_of_an_earlier_version_is_read_as_the_compressed_one(form: str) -> None:
    assert Config.from_dict({**Config().to_dict(), "code_form": form}).code_form == "wrapped"
