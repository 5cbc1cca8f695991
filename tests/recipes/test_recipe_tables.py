"""What is said twice, said alike: choices and tables, README and recipes."""

import re
from pathlib import Path

import pytest

from golf_kernels import COEFFICIENTS
from golf_kernels.window_nll import LOGITS_ROUNDINGS
from train.artifact.codecs import CODECS
from train.config import Config
from train.data.orders import LOADERS
from train.describe import describe
from train.evaluate.windows import RULES
from train.model.rope import ntk_base
from train.quantize.row_scales import ROW_SCALES
from train.recipes import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("codec", CODECS),
        ("loader", LOADERS),
        ("matrix_clip", ROW_SCALES),
        ("eval_rule", RULES),
        ("logits_rounding", LOGITS_ROUNDINGS),
    ],
)
def test_a_settings_choices_are_its_table(field: str, table: object) -> None:
    assert set(Config.__dataclass_fields__[field].metadata["choices"]) == set(table)  # type: ignore[call-overload]


def test_the_default_coefficients_exist() -> None:
    assert Config().muon_coefficients in COEFFICIENTS


@pytest.mark.parametrize(
    ("name", "base", "parts"),
    [
        ("baseline", 10_000, {"qk_gain_init": 1.5, "mlp_slope": 0.0, "xsa_last_n": 0, "ln_scale": False}),
        (
            "sp1024_smear_bigram",
            20_452.2287,
            {"qk_gain_init": 1.5, "mlp_slope": 0.0, "xsa_last_n": 0, "ln_scale": False},
        ),
        ("sp2048_normuon", 10_000, {"qk_gain_init": 1.5, "mlp_slope": 0.0, "xsa_last_n": 0, "orthogonal_init": False}),
        ("sp4096_recurrence", 22_081.7903, {"qk_gain_init": 5.0, "mlp_slope": 0.5, "xsa_last_n": 11, "ln_scale": True}),
        ("sp8192_sdclip", 10_000, {"qk_gain_init": 5.0, "mlp_slope": 0.5, "xsa_last_n": 11, "ln_scale": True}),
    ],
)
def test_what_no_count_shows_is_as_published(name: str, base: float, parts: dict[str, object]) -> None:
    config = load_recipe(name).config()
    rotary_dims = config.rope_dims or config.head_dim
    found = ntk_base(config.rope_base, rotary_dims, config.train_seq_len, config.rope_train_seq_len)
    assert found == pytest.approx(base, abs=1e-4)
    assert {part: getattr(config, part) for part in parts} == parts


@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if load_recipe(name).published or f"| `{name}`" in README]
)
def test_the_readme_has_every_published_recipe_with_its_parameters(name: str) -> None:
    recipe = load_recipe(name)
    for text in (README, (ROOT / "docs/recipes.md").read_text()):
        row = re.search(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert row, f"no row for {name}"
        assert f"| {describe(recipe.config(), {})['parameters']:,} |" in row[0]
        if "val_bpb" in recipe.published:
            assert f"| {recipe.published['val_bpb']:.4f} |" in row[0]


def test_the_readme_names_every_operator() -> None:
    import torch

    operators = {
        name.removeprefix("golf::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("golf::")
    }
    assert {name for name in operators if not name.endswith("_backward") and f"{name}`" not in README} == set()
