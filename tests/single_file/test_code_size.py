"""What of the code counts, and how much it is."""

import importlib.util
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.config import Config
from train.recipes import load_recipe
from train.single_file.code_size import check_code_form, counted_code_bytes
from train.single_file.pack import pack, script_settings
from train.single_file.sources import package_code_bytes

ROOT = Path(__file__).resolve().parents[2]


def test_code_is_counted_in_utf8_bytes(tmp_path: Path) -> None:
    sources = {
        "csrc/a.cu": "// é\n",
        "golf_kernels/b.py": "x = 1\n",
        "train/deep/c.py": "",
        "train/d.py": "y = 'ü'\n",
    }
    others = {"train/e.json": "{}", "tests/f.py": "z = 3\n", "train/__pycache__/g.pyc": "no"}
    for name, source in (sources | others).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert package_code_bytes(tmp_path) == 6 + 6 + 0 + 9


def test_this_projects_code_is_found() -> None:
    size = package_code_bytes()
    assert size == package_code_bytes(ROOT)
    assert size > (ROOT / "train/config.py").stat().st_size + (ROOT / "csrc/int6.cu").stat().st_size


def test_code_that_cannot_be_counted_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a folder golf_kernels in it"):
        package_code_bytes(tmp_path)
    for folder in ("golf_kernels", "train"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train/latin.py").write_bytes(b"# \xe9")
    with pytest.raises(UserError, match=r"latin\.py: expected UTF-8 source, found byte 0xe9 at 2"):
        package_code_bytes(tmp_path)


def test_the_code_that_counts_is_the_script_that_a_record_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe("quickstart").config(seed=7, matrix_lr=0.03)
    sizes = {
        form: counted_code_bytes(config.replace(code_form=form))
        for form in ("raw", "wrapped", "minified", "plain", "sources")
    }
    assert sorted(sizes, key=sizes.__getitem__) == ["raw", "wrapped", "minified", "plain", "sources"]
    shipped = pack("quickstart", script_settings(config), "wrapped")
    assert sizes["wrapped"] == len(shipped)
    assert sizes["sources"] == package_code_bytes()


def test_a_form_that_cannot_be_made_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"code_form: wrapped needs python-minifier.*CODE_FORM=plain"):
        check_code_form(Config())
    check_code_form(Config(code_form="plain"))
