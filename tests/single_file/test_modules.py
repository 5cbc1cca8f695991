"""What a script carries: all that its settings may import, no more, and a sentence for what they do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from submission_runs import narrow

from train.common.errors import UserError
from train.config import Config
from train.recipes import load_recipe, recipe_names
from train.run.folder import RunFolder
from train.run.log_grammar import parse_log
from train.single_file.conditions import holds
from train.single_file.modules import find_modules, imports, module_path
from train.single_file.pack import pack, script_modules, script_settings
from train.submission.runs import read_run

KERNELS = {path.stem for path in Path(__file__).parents[2].glob("golf_kernels/*_triton.py")}
# trains under the settings given and prints what of this project it has imported
TRACE = """
import sys
from train.command_line import resolve
from train.pipeline import run_pipeline
config, overrides = resolve(sys.argv[1:], {})
run_pipeline(config, overrides)
print("\\nimported", *(name for name in sys.modules if name.partition(".")[0] in ("train", "golf_kernels")))
"""


def module_names(sources: dict[str, str]) -> set[str]:
    return {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources}


def run_alone(arguments: list[str], folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GOLF_BACKEND")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**inherited, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


VARIANTS = {
    "rare": {
        "codec": "ans", "gptq_calib_source": "generated", "target_mb": 15.0, "golf_backend": "gptq_block=torch,window_nll=triton",
        "profile_steps": "1:2", "loggers": "tensorboard", "iterations": 2, "warmup_steps": 0, "recur_start_step": 0,
        "samples": "end",
    },
    "plain": {"quantizer": "rtn", "codec": "zlib", "target_bytes": 2_000_000, "corpus": ""},
}  # fmt: skip
RARE = {
    "golf_kernels.softcapped_cross_entropy_triton",
    "train.artifact.ans",
    "train.artifact.prune_to_target",
    "train.generate.samples",
    "train.quantize.generate",
    "train.run.profiling",
    "train.run.sinks",
}


@pytest.fixture(scope="module")
def traced(narrow_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, set[str]]]:
    """Settings → the run's configuration and the modules that it imported."""
    found = {}
    dataset = Path(RunFolder(narrow_runs[0]).read_config().data_path)
    for name, changes in VARIANTS.items():
        config = narrow(dataset, tmp_path_factory.mktemp("runs"), 7, **changes)
        base = load_recipe("quickstart").config().to_dict()
        flags = [
            f"--{key}={','.join(map(str, v)) if isinstance(v, list) else v}" for key, v in config.to_dict().items()
        ]
        flags = [flag for flag, (key, v) in zip(flags, config.to_dict().items(), strict=True) if v != base[key]]
        root = str(Path(__file__).parents[2])
        flags += ["--code_form=plain"]
        done = run_alone(["-c", TRACE, *flags], Path(config.runs_dir), PYTHONPATH=root, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stderr
        found[name] = config, set(done.stdout.rpartition("\nimported ")[2].split())
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_imports_nothing_that_its_script_lacks(traced: dict[str, tuple[Config, set[str]]], name: str) -> None:
    config, imported = traced[name]
    # the record and the packing, which counts the code, are no part of a script
    absent = ("train.submission", "train.single_file.pack", "train.single_file.modules", "golf_kernels._")
    run = {module for module in imported if not module.startswith(absent)}
    carried = module_names(find_modules(config).sources)
    assert run <= carried
    # a run that is not told otherwise needs none of what only these settings import
    assert (carried >= run >= RARE) if name == "rare" else not (RARE & (run | carried))
    assert {"train.artifact.fit_to_target"} & run == ({"train.artifact.fit_to_target"} if name == "plain" else set())


def test_a_backend_that_the_settings_force_is_forced(traced: dict[str, tuple[Config, set[str]]]) -> None:
    config, _ = traced["rare"]
    log = (Path(config.runs_dir) / config.run_id / f"train_seed{config.seed}.log").read_text()
    assert "gptq:inner loop computed by backend torch (forced by GOLF_BACKEND)" in log


def test_a_script_with_rare_settings_trains_as_the_package_did(
    traced: dict[str, tuple[Config, set[str]]], tmp_path: Path
) -> None:
    config, _ = traced["rare"]
    (tmp_path / "train_gpt.py").write_bytes(pack("quickstart", script_settings(config), "wrapped"))
    flags = ["--data_path", config.data_path, "--run_id", config.run_id, "--seed", str(config.seed), "--device=cpu"]
    done = run_alone(["train_gpt.py", *flags], tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    name = f"{config.run_id}/train_seed{config.seed}.log"
    alone, before = parse_log(tmp_path / "runs" / name), parse_log(Path(config.runs_dir) / name)
    assert {kind: final["val_bpb"] for kind, final in alone["finals"].items()} == {
        kind: final["val_bpb"] for kind, final in before["finals"].items()
    }
    assert "gptq:inner loop computed by backend torch (forced by GOLF_BACKEND)" in alone["lines"]


def test_every_recipe_carries_all_it_imports_and_no_kernel() -> None:
    for recipe in recipe_names():
        settings = script_settings(load_recipe(recipe).config())
        made_of = script_modules(recipe, settings)
        carried = module_names(made_of.sources)
        assert {"train.loop", f"train.recipes.{recipe}", "golf_kernels.muon", "train.train_gpt"} <= carried
        assert not [
            name for name in carried if name.startswith(("train.submission", "train.data.hub", "train.describe"))
        ]
        assert [name for name in carried if name.startswith("train.recipes.")] == [f"train.recipes.{recipe}"]
        assert not carried & {f"golf_kernels.{kernel}" for kernel in KERNELS}
        assert ("train.data.build" in carried) == bool(load_recipe(recipe).config().corpus)
        for source in made_of.sources.values():
            reachable = {name for name, _ in imports(source, {}) if module_path(name)}
            assert reachable <= carried | made_of.left_out.keys()


@pytest.mark.parametrize(
    ("forced", "kernels"),
    [
        ("triton", KERNELS),
        ("torch,xsa=triton", {"xsa_triton"}),
        ("muon_step=triton", {"muon_triton", "newton_schulz_triton"}),
        ("window_nll=triton,int6=cpp", {"softcapped_cross_entropy_triton"}),
        ("torch", set()),
    ],
)
def test_kernels_are_carried_where_the_settings_force_them(forced: str, kernels: set[str]) -> None:
    config = load_recipe("quickstart").config(golf_backend=forced)
    carried = find_modules(config)
    assert {path.stem for path in map(Path, carried.sources) if path.stem in KERNELS} == kernels
    assert {f"golf_kernels.{kernel}" for kernel in KERNELS - kernels} <= carried.left_out.keys()
    # and the script says so itself
    assert f"'GOLF_BACKEND': '{forced}'" in pack("quickstart", script_settings(config), "plain").decode()


def test_settings_rule_imports_out_and_nothing_else_does() -> None:
    source = (
        "import a\n"
        "if TYPE_CHECKING:\n    import never\nelse:\n    import b\n"
        "def f(config, other):\n"
        "    if config.loggers and not config.seed > 3:\n        import c\n    elif other:\n        import d\n"
        "    if config.window:\n        import e\n"
        "    if other.codec == 'ans':\n        import f\n"
        "    if config.replace(codec='ans'):\n        import g\n"
        "def table():\n    importlib.import_module('h')\n"
        "IMPORTED_IF = {'coded': 'config.qat'}\n"
        "def coded():\n    from i import j\n"
    )
    # window is no setting, other no configuration, and a call may do anything
    logging = "config.loggers and (not config.seed > 3)"
    assert dict(imports(source, {"table": "config.trigram"})) == {
        "a": (), "b": (), "c": (logging,), "d": (f"not ({logging})",), "e": (), "f": (), "g": (), "h": ("config.trigram",),
        "i": ("config.qat",), "i.j": ("config.qat",),
    }  # fmt: skip


def test_conditions_hold_for_settings() -> None:
    assert holds("config.codec == 'ans' or config.trigram", Config(codec="ans"))
    assert not holds("config.codec == 'ans' or config.trigram", Config())
    assert not holds("may_run('xsa', 'triton', config.golf_backend)", Config(golf_backend="torch,int6=cpp"))
    assert holds("may_run('xsa', 'triton', config.golf_backend)", Config(golf_backend="torch,xsa=triton"))
    assert holds("may_run('xsa', 'torch', config.golf_backend)", Config())
    with pytest.raises(UserError, match="unknown operator 'xso'; did you mean 'xsa'"):
        holds("may_run('xsa', 'triton', config.golf_backend)", Config(golf_backend="xso=triton"))


@pytest.fixture(scope="module")
def script(narrow_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    settings = script_settings(RunFolder(narrow_runs[0]).read_config())
    (folder / "train_gpt.py").write_bytes(pack("quickstart", settings, "wrapped"))
    return folder


@pytest.mark.parametrize(
    ("flags", "missing", "setting"),
    [
        (["--codec=ans"], "train.artifact.ans", "CODEC"),
        (["--profile_steps", "1:2"], "train.run.profile_parts", "PROFILE_STEPS"),
        (["--golf_backend", "xsa=triton"], "golf_kernels.xsa_triton", "GOLF_BACKEND"),
        (["--target_mb=3"], "train.artifact.prune_to_target", "TARGET_MB, PRUNE_EXCESS"),
    ],
)
def test_settings_that_need_what_was_left_out_are_refused_at_once(
    script: Path, tmp_path: Path, flags: list[str], missing: str, setting: str
) -> None:
    done = run_alone([str(script / "train_gpt.py"), *flags], tmp_path)
    assert done.returncode == 2
    first, error = done.stderr.split("\n", 1)
    assert first == "train_gpt.py: recipe quickstart; loading PyTorch"
    assert error == (
        f"error: {missing}: not part of this train_gpt.py, because its settings do not need it: leave {setting} as it was packed, "
        "or run the package itself: python -m train\n"
    )
    assert not list(tmp_path.iterdir())


def test_an_artifact_that_needs_what_was_left_out_is_refused(
    script: Path, traced: dict[str, tuple[Config, set[str]]], tmp_path: Path
) -> None:
    config, _ = traced["rare"]
    run = read_run(Path(config.runs_dir) / config.run_id).folder.path
    done = run_alone([str(script / "train_gpt.py"), "evaluate", str(run)], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: train.artifact.ans: not part of this train_gpt.py")


def test_help_needs_nothing_that_was_left_out(script: Path, tmp_path: Path) -> None:
    done = run_alone([str(script / "train_gpt.py"), "--help"], tmp_path)
    assert done.returncode == 0 and "--SETTING VALUE" in done.stdout and "golf_backend" in done.stdout
