"""What the documents name exists: paths, links, settings, versions; and each document has its form."""

import os
import re
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, TEXTS, fences

import golf_kernels
from benchmarks.report.results import RESULTS, read_results
from train.config import field_names


def test_every_document_with_code_is_executed() -> None:
    with_code = {name for name, text in TEXTS.items() if fences(text, "python")}
    assert with_code == {"docs/kernels.md", "README.md", "docs/library.md", "docs/recipes.md"}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {
        Path(name).name for name in DOCUMENTS if "docs/" in name
    }
    known = {"sh", "python", ""}
    for text in TEXTS.values():
        assert set(re.findall(r"^```(\w*)\n", text, re.MULTILINE)) <= known


PLACES = r"`((?:train|tests|golf_kernels|benchmarks|examples|csrc|docs|\.github)/[\w./*-]+|[\w]+\.(?:py|toml|md|yaml))`"
# what a reader makes, what a run leaves, and what has no rows yet
MADE = {
    "train/recipes/mine.py",
    "tests/kernels/test_X_triton.py",
    "benchmarks/results/",
    "benchmarks/plots/",
    "train_gpt.py",
    "summary.md",
    "single.py",
}


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in ("docs/log.md", "CHANGELOG.md")])
def test_paths_in_a_document_exist(name: str) -> None:
    paths = set(re.findall(PLACES, TEXTS[name])) - MADE
    found = {
        path
        for path in paths
        if any(next(folder.glob(path), None) for folder in (ROOT, ROOT / "golf_kernels", ROOT / "csrc"))
    }
    assert paths - found == set()


# names in capitals that are no settings: tables of the code, and variables of other programs
OTHERS = {
    "CODECS", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "CXX", "GOLF_CUDA_ARCHS", "GOLF_FORCE_CUDA", "GOLF_SKIP_CUDA", "LOADERS",
    "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "MATCHED_FINEWEB_REPO_ID", "GOLF_CACHE", "XDG_CACHE_HOME", "OMP_NUM_THREADS", "PUBLISHED", "REACHED", "ROW_SCALES",
    "SETTINGS", "TORCHINDUCTOR_CACHE_DIR", "TRITON_INTERPRET", "WANDB_MODE", "WANDB_PROJECT",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name not in ("docs/log.md", "CHANGELOG.md")])
def test_settings_in_a_document_exist(name: str) -> None:
    named = set(re.findall(r"`([A-Z][A-Z0-9_]{2,})(?:=[^`]*)?`", TEXTS[name]))
    assert named - OTHERS - {field.upper() for field in field_names()} == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_in_a_document_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", TEXTS[name])
    near = [link for link in links if not link.startswith("http")]
    assert [link for link in near if not ((ROOT / name).parent / link).exists()] == []


def test_the_front_page_is_short_and_its_picture_small() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 80
    (picture,) = re.findall(r"!\[[^]]+\]\((.+?)\)", TEXTS["README.md"])
    assert os.path.getsize(ROOT / picture) < 100_000
    # the sentence goes with the first measurement
    assert ("No kernel has been measured on a GPU yet" in TEXTS["README.md"]) == (not read_results(RESULTS))
    for name in DOCUMENTS:
        if name.startswith("docs/") or name == "CONTRIBUTING.md":
            assert f"({name})" in TEXTS["README.md"]


def test_the_log_is_dated_and_newest_first() -> None:
    entries = re.split(r"^## ", TEXTS["docs/log.md"], flags=re.MULTILINE)[1:]
    heads = [re.fullmatch(r"(\d{4}-\d\d-\d\d): [^\n]+", entry.splitlines()[0]) for entry in entries]
    dates = [head[1] for head in heads if head]
    assert len(dates) == len(entries) >= 100 and dates == sorted(dates, reverse=True)
    for entry in entries:
        assert re.findall(r"^- (Why|What|Result)\b", entry, re.MULTILINE) == ["Why", "What", "Result"], entry


def test_versions_agree_and_the_workflow_calls_make() -> None:
    pinned = re.findall(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert [f"v{version}" for version in pinned] == re.findall(
        r"rev: (v\S+)", (ROOT / ".pre-commit-config.yaml").read_text()
    )
    assert re.findall(r"^## (\d\S+)", TEXTS["CHANGELOG.md"], re.MULTILINE)[0] == golf_kernels.__version__
    (targets,) = re.findall(r"command: \[(.*)\]", (ROOT / ".github/workflows/tests.yml").read_text())
    assert targets.split(", ") == ["lint", "test"]
    assert all(
        re.search(f"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets.split(", ")
    )
