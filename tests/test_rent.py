"""examples/rent_8xh100.sh with stubs for the GPUs, for make and for Python; the Dockerfile; once, the whole script on a CPU."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from documents import commands
from pipeline_runs import flags
from submission_runs import narrow

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "examples/rent_8xh100.sh"
TORCHRUN = "python -m torch.distributed.run"
STAGES = ["driver", "venv", "attention", "data", "tune", "seed42", "seed314", "seed999", "build", "check"]
# what a stub does besides noting its words: end with the exit code in a file `fail_WORD`, or sleep if there is `hang_WORD`
STUB = """#!/bin/bash
echo "{name} $*" >> {root}/calls
for word in "$@"; do
  if [ -e "{root}/hang_$word" ]; then echo $$ > {root}/hanging; exec sleep 60; fi
  if [ -e "{root}/fail_$word" ]; then exit "$(cat "{root}/fail_$word")"; fi
  [ -z "$out" ] || {{ [ "$1 $2 $3" != "-m train.submission build" ] || mkdir "$word"; out=; }}
  [ "$word" != --out ] || out=yes
done
"""
ANSWERS = {
    "nvidia-smi": 'for i in 1 2 3 4 5 6 7 8; do echo "NVIDIA H100 80GB HBM3, ${DRIVER:-580.95.05}, 81559 MiB"; done | head -${GPUS:-8}',
    "df": 'case "$*" in *shm*) echo "Avail"; echo " ${SHM:-65536}";; *) echo "Avail"; echo " ${DISK:-500}";; esac',
}


class Node:
    """A checkout with stubs in place of all programs that need a GPU or a network."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "rented/sp8192_sdclip"
        for folder in ("examples", "bin", ".venv/bin"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / SCRIPT, root / SCRIPT)
        for package in ("train", "golf_kernels"):
            (root / package).symlink_to(ROOT / package)
        for name in ("make", ".venv/bin/python"):
            self.program(name, STUB.format(name=Path(name).name, root=root))
        for name, answer in ANSWERS.items():
            self.program(name, f"#!/bin/bash\n{answer}\n")

    def program(self, name: str, text: str) -> None:
        path = self.root / (name if "/" in name else f"bin/{name}")
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *options: str, **environ: str) -> "subprocess.Popen[str]":
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, **environ}
        return subprocess.Popen(
            ["bash", str(self.root / SCRIPT), *options], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *options: str, **environ: str) -> tuple[int, str]:
        process = self.start(*options, **environ)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def calls(self) -> list[str]:
        """The commands since the last call of this method."""
        path = self.root / "calls"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        # Python's own checks are no commands
        return [line for line in re.split(r"\n(?=python|make)", text.strip()) if " -c " not in line and line]

    def finish(self, before: str) -> None:
        """Let all stages before this one be done."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in STAGES[: STAGES.index(before)]:
            (self.out / f"{name}.done").touch()

    def done(self) -> set[str]:
        return {path.stem for path in self.out.glob("*.done")}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def rows(output: str) -> dict[str, list[str]]:
    """The script's table: stage → estimate and dollars, seconds taken and dollars."""
    return {words[0]: words[1:] for words in map(str.split, output.splitlines()) if words[:1] and len(words) in (5, 6)}


def test_the_plan_has_seconds_and_dollars_and_does_nothing(node: Node) -> None:
    code, output = node.run("--dry-run", "--price-per-hour", "36")
    assert code == 0, output
    # 323 + 600 + 77 + 134 seconds; a dollar in 100 seconds
    assert rows(output)["seed314"] == ["1134", "11.34", "0", "0.00"]
    # 81 shards of 200 MB at 100 MB/s
    assert rows(output)["data"][:2] == ["162", "1.62"]
    assert rows(output)["tune"][:2] == ["540", "5.40"]
    assert [name for name in rows(output) if name in STAGES] == STAGES
    total = sum(int(rows(output)[name][0]) for name in STAGES)
    assert rows(output)["total"][:2] == [str(total), f"{total / 100:.2f}"]
    assert "not measured on a GPU" in output
    assert not node.out.exists() and node.calls() == []


def test_the_estimate_follows_the_options(node: Node) -> None:
    options = ("--recipe", "sp4096_recurrence", "--megabytes", "20", "--shards", "9", "--seeds", "7", "--minutes", "1")
    output = node.run("--dry-run", *options, "--", "--max_wallclock_seconds=60")[1]
    # #1392 writes its calibration text: 430 seconds more
    assert rows(output)["seed7"][:2] == [str(323 + 60 + 430 + 77 + 134), "6.83"]
    assert rows(output)["data"][0] == "100" and rows(output)["tune"][0] == "60"
    assert rows(node.run("--dry-run", "--recipe", "quickstart", "--gpus", "0")[1])["data"][0] == "0"


def test_the_stages_run_the_documents_commands_in_order(node: Node) -> None:
    code, output = node.run()
    assert code == 0, output
    # tests/test_docs.py reads the document's commands as they would be read
    shown = commands((ROOT / "docs/8xh100.md").read_text())
    steps = [command for command in shown if command.split()[0] in ("make", "python", "torchrun")]
    train = next(command for command in steps if command.startswith("torchrun"))
    seeds = [train.replace("torchrun", TORCHRUN).replace("42", seed) for seed in ("42", "314", "999")]
    before, after = steps[: steps.index(train)], steps[steps.index(train) + 1 :]
    assert node.calls() == [*before, *seeds, *after] and len(steps) == 6
    assert node.done() == set(STAGES)
    # once more: nothing is done again
    code, output = node.run()
    assert code == 0 and node.calls() == [] and output.count("done before") == len(STAGES)


def test_settings_and_names_are_handed_on(node: Node) -> None:
    node.finish("seed999")
    assert node.run("--github-id", "NAME", "--", "--muon_wd", "0.09")[0] == 0
    train, build, _ = node.calls()
    assert " --recipe sp8192_sdclip --muon_wd 0.09 --seed 999 " in train and build.endswith(" --github-id NAME")


def test_a_stage_that_failed_is_done_again_and_the_next_ones_follow(node: Node) -> None:
    node.finish("seed42")
    (node.root / "fail_314").write_text("3")
    code, output = node.run()
    assert code == 1 and "error: stage seed314 ended with exit code 3" in output
    assert node.done() == set(STAGES[: STAGES.index("seed314")])
    node.calls()
    (node.root / "fail_314").unlink()
    assert node.run()[0] == 0
    assert [re.findall(r"--seed (\d+)|submission (\w+)", call)[0] for call in node.calls()] == [
        ("314", ""), ("999", ""), ("", "build"), ("", "check"),
    ]  # fmt: skip
    attempts = [line.split("\t") for line in (node.out / "attempts.tsv").read_text().splitlines()]
    assert [(name, code) for name, _, code in attempts if "314" in name] == [("seed314", "3"), ("seed314", "0")]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_kill_inside_a_stage_leaves_a_node_that_goes_on(node: Node, by: signal.Signals) -> None:
    node.finish("seed999")
    (node.root / "hang_999").touch()
    process = node.start()
    hanging = node.root / "hanging"
    for _ in range(300):
        if hanging.exists() and hanging.read_text():
            break
        time.sleep(0.1)
    inside = int(hanging.read_text())
    process.send_signal(by)
    if by == signal.SIGKILL:
        process.wait(timeout=20)
        # the stage lives on and holds the folder, so that nobody trains the same run twice
        code, output = node.run()
        assert code == 2 and "another process is at work there" in output
        os.kill(inside, signal.SIGTERM)
    else:
        assert "type the same command to go on" in process.communicate(timeout=20)[0]
        assert process.returncode == 130
    for _ in range(100):
        if not Path(f"/proc/{inside}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the stage outlives the script")
    (node.root / "hang_999").unlink()
    node.calls()
    code, output = node.run()
    assert code == 0, output
    assert [call.split()[2] for call in node.calls()] == [
        "torch.distributed.run",
        "train.submission",
        "train.submission",
    ]


def test_only_and_from_do_stages_again(node: Node) -> None:
    node.finish("check")
    (node.out / "record").mkdir()
    assert node.run("--only", "data")[0] == 0
    assert [call.split()[2] for call in node.calls()] == ["train.data"]
    assert node.run("--from", "build")[0] == 0
    assert [call.split()[3] for call in node.calls()] == ["build", "check"]
    # the first record is kept
    assert len(list(node.out.glob("record.*"))) == 1 and (node.out / "record").is_dir()


def test_a_record_that_breaks_a_rule_is_there_and_the_script_fails(node: Node) -> None:
    node.finish("build")
    (node.root / "fail_check").write_text("1")
    code, output = node.run()
    assert code == 1 and "rented/sp8192_sdclip/record breaks a rule" in output
    assert node.done() == set(STAGES) - {"check"}
    # 2: no record was made
    (node.root / "fail_build").write_text("2")
    code, output = node.run("--from", "build")
    assert code == 1 and "error: stage build ended" in output


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"DRIVER": "570.86.15"}, "driver 570.86.15: torch for CUDA 13 needs 580 or newer"),
        ({"GPUS": "4"}, "--gpus 8: the node has 4"),
        ({"DISK": "30"}, "30 GB are free, 36 are needed"),
        ({"SHM": "64"}, "/dev/shm: 64 MB are free, 1000 are needed: start the container with --shm-size=16g"),
    ],
)
def test_a_node_that_does_not_do_is_refused_at_once(node: Node, environ: dict[str, str], message: str) -> None:
    node.program(
        "python_without_torch", f'#!/bin/bash\ncase "$2" in *torch*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    code, output = node.run(PYTHON=str(node.root / "bin/python_without_torch"), **environ)
    assert code == 1 and message in output
    assert node.calls() == [] and node.done() == set()


def test_a_node_without_flash_attention_or_measurements_still_trains(node: Node) -> None:
    (node.root / "fail_-c").write_text("1")
    (node.root / "fail_tune").write_text("1")
    # venv's own check of the GPUs is another use of -c
    node.program("make", "#!/bin/bash\n")
    code, output = node.run("--only", "attention")
    assert code == 0 and "training takes the fastest of PyTorch's own backends" in output
    assert "python -m pip install --quiet kernels" in node.calls()
    code, output = node.run("--only", "tune")
    assert code == 0 and "tune --show says why" in output
    code, output = node.run("--only", "venv")
    assert code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "3"], "--gpus: expected 0, 1, 2, 4 or 8, got 3"),
        (["--seeds", "42,42"], "a seed is there twice"),
        (["--seeds", "forty"], "--seeds: expected numbers"),
        (["--price-per-hour", "cheap"], "--price-per-hour: expected dollars"),
        (["--recipe", "quickstrat"], "did you mean quickstart?"),
        (["--from", "train"], "train: no such stage; there are: driver venv"),
        (["--from", "data", "--only", "data"], "give one of them"),
        (["--muon_wd", "1"], "--muon_wd: no such option"),
        (["--out"], "--out: expected a value"),
    ],
)
def test_a_wrong_option_is_named(node: Node, options: list[str], message: str) -> None:
    code, output = node.run(*options)
    assert code == 2 and message in output and not (node.root / "rented").exists()


def test_a_folder_that_was_begun_otherwise_is_refused(node: Node) -> None:
    assert node.run("--only", "data")[0] == 0
    code, output = node.run("--seeds", "1,2,3")
    assert code == 2 and "was begun with other options" in output and "seeds 42,314,999" in output


def test_shellcheck_finds_nothing() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", ROOT / SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their words."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]  # type: ignore[misc]


def image(folder: Path) -> None:
    """Copy the files that the Dockerfile copies."""
    for *sources, target in (words.split() for name, words in instructions() if name == "COPY"):
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "_C*.so", "_build_info.json", "results", "plots")
                shutil.copytree(ROOT / source, folder / target, ignore=ignored)
            else:
                shutil.copy(ROOT / source, folder / target)


def test_the_dockerfile_copies_all_that_its_commands_need(tmp_path: Path) -> None:
    folder = tmp_path
    image(folder)
    commands = [words for name, words in instructions() if name == "RUN"]
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    makes = [command for command in commands if command.startswith("make ")]
    assert makes == ["make .venv/.ready", "make doctor"]
    for command in makes:
        planned = subprocess.run([*shlex.split(command), "-n"], cwd=folder, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
    # the wheel's build, as far as it goes without compiling
    version = [sys.executable, "setup.py", "--version"]
    assert subprocess.run(version, cwd=folder, capture_output=True, text=True).stdout.strip()
    assert (folder / SCRIPT).exists()
    # the image's CUDA is that of the torch which make installs
    ((_, base),) = [pair for pair in instructions() if pair[0] == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-devel-ubuntu\d\d\.\d\d", base)


@pytest.mark.slow  # installs into a .venv of its own, and trains twice: minutes
def test_the_whole_script_on_a_cpu(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    image(folder)
    settings = [
        flag for flag in flags(narrow(dataset, tmp_path, 1)) if not re.match(r"--(seed|run_id|runs_dir|device)=", flag)
    ]
    command = [
        "bash",
        SCRIPT,
        "--gpus",
        "0",
        "--recipe",
        "quickstart",
        "--seeds",
        "1,2",
        "--github-id",
        "NAME",
        "--",
        *settings,
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CODE_FORM")}
    done = subprocess.run(
        command, cwd=folder, env={**environment, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=900
    )
    # a record made on a CPU fails the rule of hardware, and no other stage fails
    assert done.returncode == 1 and "record breaks a rule" in done.stdout, done.stdout + done.stderr
    out = folder / "rented/quickstart"
    assert (out / "record/train_gpt.py").exists() and (out / "record/submission.json").exists()
    assert {path.stem for path in out.glob("*.done")} == {*STAGES[:5], "seed1", "seed2", "build"}
    assert [line.split("\t")[2] for line in (out / "attempts.tsv").read_text().splitlines()] == ["0"] * 8 + ["2"]
