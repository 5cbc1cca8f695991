"""Settings: types, ranges, contradictions, precedence, misspelt names."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from train.artifact.requantize import main as quantize
from train.command_line import help_text, note_unread, override_line, resolve
from train.common.errors import UserError
from train.common.files import write_json
from train.common.retired import MODEL_RETIRED, RETIRED
from train.config import Config, ConfigError, field_names, parse_value
from train.evaluate.__main__ import main as evaluate
from train.recipes import load_recipe, recipe_names
from train.run.folder import RunFolder


def test_dict_round_trip_keeps_every_field() -> None:
    config = Config(num_layers=6, recur_layers=(2, 3), mlp_mult=3.0, seed=5)
    assert Config.from_dict(config.to_dict()) == config
    assert list(config.to_dict()) == [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"num_layers": 0}, "num_layers: must be at least 1"),
        ({"beta2": 1.5}, "beta2: must be at most"),
        ({"num_layers": 10**8}, "num_layers: must be at most 1024"),
        ({"model_dim": 10**12}, "model_dim: must be at most 65536"),
        ({"iterations": 10**400}, "iterations: expected a finite number"),
        ({"qk_gain_init": float("nan")}, "qk_gain_init: expected a finite number"),
        ({"logit_softcap": float("inf")}, "logit_softcap: expected a finite number"),
        ({"loader": "random"}, "loader: expected one of"),
        ({"seed": "1"}, "seed: expected a whole number"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"muon_eq_r": 1}, "muon_eq_r: expected 0 or 1"),
        ({"ve_dim": 8, "ve_layers": (9,)}, "ve_layers"),
        ({"ve_dim": 8}, "belong together"),
        ({"recur_layers": (3, 2)}, "must rise"),
        ({"recur_layers": (2, 4)}, "consecutive"),
        ({"recur_layers": (2,), "recur_form": "blend", "num_loops": 2}, "num_loops 2 repeats a group"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads"),
        ({"rope_dims": 66}, "rope_dims"),
        ({"train_batch_tokens": 1000}, "train_batch_tokens"),
        ({"mlp_slope": 1.0}, "mlp_slope"),
        ({"gptq_reserve_seconds": 700.0}, "gptq_reserve_seconds"),
        ({"mlp_mult": 0.3333}, "mlp_mult"),
        ({"trigram": True}, "trigram uses the bigram table"),
        ({"embed_wd": -0.5}, "embed_wd -0.5 is negative"),
        ({"swa_enabled": True, "ema_decay": 0.9}, "both average"),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment.replace("(", r"\(")):
        Config(**changes)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "42", 42),
        ("train_batch_tokens", "786_432", 786432),
        ("matrix_lr", "2e-2", 0.02),
        ("muon_eq_r", "1", True),
        ("muon_eq_r", "false", False),
        ("recur_layers", "3,4,5", (3, 4, 5)),
        ("recur_layers", "", ()),
        ("run_id", "a b", "a b"),
    ],
)
def test_text_becomes_the_fields_type(name: str, text: str, value: object) -> None:
    assert parse_value(name, text, "here") == value


@pytest.mark.parametrize(
    ("name", "text"), [("seed", "4.5"), ("matrix_lr", "nan"), ("qat", "2"), ("recur_layers", "3;4")]
)
def test_text_of_the_wrong_type_names_its_source(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--here: expected"):
        parse_value(name, text, "--here")


def test_precedence_is_flag_then_environment_then_recipe_then_default() -> None:
    config, overrides = resolve(
        ["--recipe", "quickstart", "--num-layers=5", "--recur_layers", "", "--ve_layers=4"],
        {"NUM_LAYERS": "7", "SEED": "9", "PATH": "/bin", "XSA_LAST_N": "5"},
    )
    assert (config.num_layers, config.seed, config.model_dim, config.logit_softcap) == (5, 9, 128, 30.0)
    lines = {override_line(override) for override in overrides}
    assert "setting:num_layers=5 from:command line" in lines
    assert "setting:seed=9 from:environment SEED" in lines


def test_other_scripts_names_for_a_setting_are_taken() -> None:
    config, overrides = resolve(["--embed-quantization-bits", "16"], {"WEIGHT_QUANTIZATION_BITS": "5"})
    assert (config.matrix_bits, config.embed_bits) == (5, 16)
    assert override_line(overrides[0]) == "setting:matrix_bits=5 from:environment WEIGHT_QUANTIZATION_BITS"
    # what #2014's command would say of the settings that its recipe has
    command = (
        "VOCAB_SIZE=8192 NUM_LOOPS=2 LOOP_START=3 LOOP_END=5 ENABLE_LOOPING_AT=0.35 PARALLEL_START_LAYER=8 PARALLEL_FINAL_LANE=mean "
        "SPARSE_ATTN_GATE_ENABLED=1 GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 SMEAR_GATE_BOS_FIX=1 SKIP_GATES_ENABLED=1 ROPE_YARN=0 MIN_LR=0.1 "
        "ASYM_LOGIT_RESCALE=1 BETA2=0.99 MUON_ROW_NORMALIZE=1 GPTQ_CALIBRATION_BATCHES=16 TRAIN_SEQ_SCHEDULE=1024@0.1,2048@0.7,3072@1 "
        "SEQ_CHANGE_WARMUP_STEPS=32 QK_GAIN_INIT=5.25 EMBED_BITS=7 GPTQ_RESERVE_SECONDS=4.0 WARMDOWN_FRAC=0.85 EVAL_SEQ_LEN=3072"
    )
    environ = dict(word.split("=") for word in command.split())
    assert resolve(["--recipe", "sp8192_frontier"], environ)[1] == []
    changed, _ = resolve(
        ["--recipe", "sp8192_frontier", "--smear-gate-enabled", "0"], {"LOOP_START": "4", "LOOP_END": "5"}
    )
    assert (changed.smear_gate, changed.recur_layers) == ("off", (4, 5))
    with pytest.raises(ConfigError, match="PARALLEL_FINAL_LANE: expected mean, got 'attn'"):
        resolve([], {"PARALLEL_FINAL_LANE": "attn"})


def test_embeddings_decay_with_the_rest_of_adamw_unless_they_have_their_own() -> None:
    assert Config(adam_wd=0.09).embedding_decay == 0.09
    assert Config(adam_wd=0.09, embed_wd=0.0).embedding_decay == 0.0


def test_overrides_equal_to_the_recipe_are_not_reported() -> None:
    assert resolve(["--recipe", "quickstart", "--model_dim", "128"], {})[1] == []


@pytest.mark.parametrize(
    ("arguments", "environ", "fragment"),
    [
        (["--num_layer", "3"], {}, "did you mean num_layers"),
        ([], {"WARMDWN_ITERS": "1"}, "did you mean WARMDOWN_ITERS"),
        ([], {"MUON_MOMENTM": "1"}, "did you mean MUON_MOMENTUM"),
        ([], {"TTT_EPOCHS": "3"}, "looks like a setting"),
        (["--recipe", "quikstart"], {}, "did you mean quickstart"),
        (["seed", "3"], {}, "expected --NAME VALUE"),
        (["--seed"], {}, "value is missing"),
    ],
)
def test_misspelt_settings_name_the_nearest(arguments: list[str], environ: dict[str, str], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        resolve(arguments, environ)


def test_a_variable_that_a_stage_does_not_read_is_said_where_it_differs() -> None:
    said: list[str] = []
    environ = {"GPTQ_CALIB_BATCHES": "8", "MODEL_DIM": "128", "RUNS_DIR": "elsewhere", "PATH": "/bin", "seed": "3"}
    config = load_recipe("quickstart").config(gptq_calib_batches=4, recur_layers=(1, 2))
    odd = {"RECUR_LAYERS": "x", "WEIGHT_QUANTIZATION_BITS": "5"}
    # this one is read, whatever the run had
    note_unread(config, environ | odd | {"GOLF_BACKEND": "torch"}, said.append, ("gptq_calib_batches", "matrix_bits"))
    assert said == [
        "warning: ignoring GPTQ_CALIB_BATCHES=8; this run was made with 4 (pass --gptq_calib_batches to change it)",
        "warning: ignoring RECUR_LAYERS=x; this run was made with 1,2",
        "warning: ignoring WEIGHT_QUANTIZATION_BITS=5; this run was made with 6 (pass --matrix_bits to change it)",
    ]
    # a flag that says the same has made it so
    note_unread(config.replace(gptq_calib_batches=8), environ, said.append)
    assert len(said) == 3


@pytest.mark.parametrize("stage", [evaluate, quantize])
@pytest.mark.parametrize("forced", ["nonsense", "gptq_block=nonsense", "gptq_blok=torch"])
def test_a_single_stage_refuses_an_unknown_backend(
    stage: Callable[[list[str]], int], forced: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLF_BACKEND", forced)
    with pytest.raises(UserError, match=r"GOLF_BACKEND|gptq_blok"):
        stage([str(tmp_path)])


def test_removed_settings_load_with_the_value_of_today_and_are_refused_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(RETIRED, "old_form", ("after", ""))
    monkeypatch.setitem(RETIRED, "old_layers", ((1, 2),))
    monkeypatch.setattr("train.common.retired.MODEL_RETIRED", {"old_form", "old_layers"})
    monkeypatch.setitem(RETIRED, "old_speed", None)
    config = Config(seed=5)
    for values in ({"old_form": "after", "old_layers": [1, 2]}, {"old_form": "", "old_speed": 9}):
        assert Config.from_dict(config.to_dict() | values) == config
    folder = RunFolder(tmp_path)
    write_json(folder.config, config.to_dict() | {"old_form": "overlapped"})
    with pytest.raises(
        UserError, match=r"config\.json: old_form=overlapped: .* supports only after: use an earlier version"
    ):
        folder.read_config()
    with pytest.raises(ConfigError, match=r"old_layers=1,3: "):
        Config.from_dict({"old_layers": [1, 3]})
    # whoever types it is told, whatever the value
    with pytest.raises(ConfigError, match=r"--old_form: old_form was removed in 0\.2\.0: leave it out"):
        resolve(["--old-form", "after"], {})
    with pytest.raises(ConfigError, match=r"environment variable OLD_FORM: .*leave it out"):
        resolve([], {"OLD_FORM": "after"})
    assert resolve([], {"old_form": "after"})[1] == []


def test_a_removed_setting_that_leaves_the_model_alone_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"val_max_tokens=4096: .* removed in 0\.2\.0, which always uses 0"):
        assert Config.from_dict({"seed": 5, "val_max_tokens": 4096}) == Config(seed=5)
    with pytest.raises(ConfigError, match=r"norm_eps=1e-06: .* supports only"):
        Config.from_dict({"norm_eps": 1e-6})


def test_no_setting_is_retired_and_alive() -> None:
    assert set(RETIRED) >= MODEL_RETIRED
    assert not set(RETIRED) & set(field_names())
    # JSON holds lists
    assert all(values is None or (isinstance(values, tuple) and values) for values in RETIRED.values())


def test_ordinary_environment_is_left_alone() -> None:
    environ = {
        "PATH": "/bin",
        "HOME": "/root",
        "NCCL_IB_DISABLE": "1",
        "OMP_NUM_THREADS": "2",
        "GITHUB_RUN_ID": "5",
        "LANG": "C",
    }
    assert resolve([], environ)[1] == []


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_config_with_a_word_about_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    assert set(recipe.settings) <= set(field_names())
    assert recipe.config().recipe == name


def test_help_names_every_setting_and_recipe_by_section() -> None:
    titles = ["run", "data", "model", "optimization", "quantization and artifact", "validation and evaluation"]
    found: dict[str, list[str]] = {}
    for line in help_text().splitlines():
        if line.endswith(":") and not line.startswith(" "):
            section = found.setdefault(line.removesuffix(":"), [])
        elif line.startswith("  "):
            section.append(line.split()[0])
    *sections, (last, recipes) = found.items()
    assert [title for title, _ in sections] == titles and last.startswith("recipes")
    assert [name for _, names in sections for name in names] == list(field_names())
    assert (sections[1][1][0], sections[3][1][0], sections[5][1][-1]) == ("data_path", "iterations", "logits_rounding")
    assert recipes == recipe_names()
    text = help_text()
    assert "  beta2                      float  decay of AdamW's second moments [0.95]\n" in text
    assert re.search(r"^  resume +text +.* \(never, auto\) \[never\]$", text, re.M)
    assert re.search(r"^  qat +0\|1 .* \[0\]$", text, re.M)


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (["--seed", "1", "--seed", "2"], {}),
        (["--matrix-lr=1", "--matrix_lr=2"], {}),
        (["--matrix_bits=6", "--weight_quantization_bits=5"], {}),
        ([], {"MATRIX_BITS": "6", "WEIGHT_QUANTIZATION_BITS": "5"}),
    ],
)
def test_a_setting_given_twice_is_refused(arguments: list[str], environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"given twice|MATRIX_BITS sets matrix_bits, too"):
        resolve(arguments, environ)
