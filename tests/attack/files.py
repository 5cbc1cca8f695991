"""Damaged files: artifacts, run folders, checkpoints, shards and record folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from attack.campaign import Broke, Campaign, command, damage, damage_json, odd_place, refuses
from foreign_records import make_foreign
from fuzz_artifact import one_input, seeds
from submission_runs import make_dataset, narrow

from train.artifact.requantize import main as quantize
from train.artifact.storage import read_artifact
from train.checkpoint import read_tensors
from train.common.distributed import Ranks
from train.data.dataset import Dataset
from train.evaluate.__main__ import main as evaluate
from train.evaluate.scores import read_evaluation
from train.export.__main__ import main as export
from train.generate.__main__ import main as generate
from train.pipeline import run_pipeline
from train.quantize.tensors import QuantizedTensor
from train.run.folder import RunFolder
from train.runs.__main__ import main as runs
from train.submission.__main__ import main as submission


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two dictionaries hold the same tensors, to the last bit."""
    if found.keys() != expected.keys():
        return False
    for name, value in expected.items():
        other = found[name]
        if type(other) is not type(value):
            return False
        pairs = (
            [(value.codes, other.codes), (value.scales, other.scales)]
            if isinstance(value, QuantizedTensor)
            else [(value, other)]
        )
        if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
            return False
    return True


class Artifacts(Campaign):
    name: ClassVar[str] = "artifact"
    tries: ClassVar[str] = "one damage to an artifact of each codec; half of them with checksums made right again"
    promise: ClassVar[str] = "refused in one line, or read as the same tensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # first byte 0: a file; 1: its header and sections, whose checksums are corrected; 2: a codec's stream
        self.seeds = seeds()
        self.tensors = []
        for number, data in enumerate(self.seeds):
            path = folder / f"{number}.golf"
            path.write_bytes(data[1:])
            self.tensors.append(read_artifact(path).tensors if data[0] == 0 else {})

    def attack(self, random: Random, folder: Path) -> None:
        number = random.randrange(len(self.seeds))
        seed = self.seeds[number]
        data, what = damage(seed[1:], random)
        self.tried = f"seed {number}, {what}"
        path = folder / "model.golf"
        if seed[0]:
            one_input(seed[:1] + data, path)
            return
        path.write_bytes(data)
        found: list[dict[str, Any]] = []
        if not refuses(lambda: found.append(dict(read_artifact(path).tensors))) and not same(
            found[0], self.tensors[number]
        ):
            raise Broke("read as other tensors")


def finished_run(folder: Path) -> RunFolder:
    """Make a dataset `folder`/small and train a narrow quickstart in `folder`/runs/seed42."""
    dataset = make_dataset(folder / "small", 60_000, 6_000)
    return run_pipeline(narrow(dataset, folder / "runs", 42))


class RunFiles(Campaign):
    name: ClassVar[str] = "run-files"
    tries: ClassVar[str] = "one damaged, odd or missing file in a run folder, then one command on the run"
    promise: ClassVar[str] = "one line of error, or success; a score that is given is the right one"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.run = finished_run(folder).path
        evaluated = read_evaluation(RunFolder(self.run))
        self.scores = {key: value["val_bpb"] for key, value in evaluated.items()}
        self.files = sorted(path.name for path in self.run.iterdir() if path.is_file())

    def attack(self, random: Random, folder: Path) -> None:
        run = folder / "runs" / "seed42"
        shutil.copytree(self.run, run)
        name = random.choice(self.files)
        path = run / name
        if random.random() < 0.3:
            what = odd_place(path, random)
        elif name.endswith(".json") and random.random() < 0.7:
            text, what = damage_json(path.read_text(), random)
            path.write_text(text)
        else:
            data, what = damage(path.read_bytes(), random)
            path.write_bytes(data)
        commands: dict[str, tuple[Callable[[], int | None], list[object]]] = {
            "evaluate": (evaluate, [run]),
            "quantize": (quantize, [run, "--quantizer", "rtn"]),
            "record": (submission, ["record", run]),
            "dashboard": (submission, ["dashboard", run.parent, "--out", folder / "page.html"]),
            "runs": (runs, ["--runs_dir", run.parent]),
            "show": (runs, ["show", "seed42", "--runs_dir", run.parent]),
            "generate": (generate, [run, "--prompt", "def ", "--tokens", "4"]),
            "export": (export, [run, "--to", "state_dict", "--out", folder / "export"]),
        }
        verb = random.choice(list(commands))
        self.tried = f"{name}: {what}; {verb}"
        main, arguments = commands[verb]
        code = command(main, arguments, codes=(0, 1, 2))
        if verb == "evaluate" and code == 0 and name != "config.json":
            for key, value in read_evaluation(RunFolder(run)).items():
                if key in self.scores and value["val_bpb"] != self.scores[key]:
                    raise Broke(f"score {value['val_bpb']}, expected {self.scores[key]}")
        if list(run.glob(".*.part")):
            raise Broke("a temporary file stayed")


class Checkpoints(Campaign):
    name: ClassVar[str] = "checkpoint"
    tries: ClassVar[str] = "one damage to a checkpoint's bytes or values, then --resume auto"
    promise: ClassVar[str] = (
        "refused in one line with the file unchanged, or resumed (damaged bytes: to the same weights)"
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)

        class Killed(BaseException):
            pass

        dataset = make_dataset(folder / "small", 60_000, 6_000)
        self.config = narrow(dataset, folder / "runs", 42, checkpoint_every=2, iterations=4)
        whole = run_pipeline(self.config.replace(run_id="whole"))
        self.weights = read_tensors(whole.weights)
        from train import pipeline

        write = pipeline.write_training

        def kill(*_: object) -> None:
            raise Killed

        pipeline.write_training = kill  # type: ignore[assignment]
        try:
            run_pipeline(self.config)
        except Killed:
            pass
        finally:
            pipeline.write_training = write
        self.run = folder / "runs" / "seed42"
        self.saved = read_tensors(self.run / "checkpoint.pt")

    def attack(self, random: Random, folder: Path) -> None:
        run = folder / "runs" / "seed42"
        shutil.copytree(self.run, run)
        path = run / "checkpoint.pt"
        bytes_only = random.random() < 0.5
        if bytes_only:
            data, what = damage(path.read_bytes(), random)
            path.write_bytes(data)
        else:
            saved = read_tensors(path)
            what = damage_state(saved, random)
            torch.save(saved, path)
        self.tried = what
        before = path.read_bytes()
        config = self.config.replace(runs_dir=str(run.parent), resume="auto")
        code = command(lambda: (run_pipeline(config), 0)[1])
        if code == 2 and path.read_bytes() != before:
            raise Broke("refused, but the checkpoint was changed")
        if code == 0 and bytes_only and not same(read_tensors(run / "weights.pt"), self.weights):
            raise Broke("resumed to other weights")


def damage_state(saved: dict[Any, Any], random: Random) -> str:
    """Change one value somewhere in a checkpoint, and say what was changed."""
    node: Any = saved
    trail = []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            saved.clear()
            return "all entries removed"
        key = random.choice(keys)
        trail.append(str(key))
        value = node[key]
        if not isinstance(value, dict | list) or not value or random.random() < 0.1:
            break
        node = value
    kind = random.choice(["remove", "text", "none", "negative", "huge", "nan", "shape", "dtype", "list"])
    if kind == "remove" and isinstance(node, dict):
        del node[key]
    elif isinstance(value, torch.Tensor) and kind in ("nan", "shape", "dtype", "huge"):
        node[key] = {
            "nan": value.float() * float("nan"),
            "shape": value.flatten()[:-1],
            "dtype": value.to(torch.int16),
            "huge": value.double() * 1e300,
        }[kind]
    else:
        node[key] = {"text": "x", "none": None, "negative": -1, "huge": 2**70, "nan": float("nan")}.get(kind, [value])
    return f"{kind} at {'.'.join(trail)}"


class Shards(Campaign):
    name: ClassVar[str] = "shards"
    tries: ClassVar[str] = "one damaged, odd or missing file in a dataset, then data and validation text are read"
    promise: ClassVar[str] = "refused in one line, or read with all tokens inside the vocabulary"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.data = make_dataset(folder / "small", 60_000, 6_000)
        self.files = sorted(path.name for path in self.data.iterdir() if path.is_file())

    def attack(self, random: Random, folder: Path) -> None:
        data = Path(shutil.copytree(self.data, folder / "small"))
        name = random.choice(self.files)
        path = data / name
        if random.random() < 0.3:
            what = odd_place(path, random)
        elif name.endswith(".json") and random.random() < 0.7:
            text, what = damage_json(path.read_text(), random)
            path.write_text(text)
        else:
            content, what = damage(path.read_bytes(), random)
            path.write_bytes(content)
        self.tried = f"{name}: {what}"
        config = narrow(data, folder / "runs", 42)

        def read() -> int:
            dataset = Dataset(config)
            dataset.check()
            loader = dataset.loader(Ranks())
            for _ in range(3):
                for inputs, _ in loader.next_batch():
                    if int(inputs.max()) >= config.vocab_size:
                        raise Broke("a token beyond the vocabulary")
            if int(dataset.validation.tokens.max()) >= config.vocab_size:
                raise Broke("a validation token beyond the vocabulary")
            return 0

        command(read)


class Records(Campaign):
    name: ClassVar[str] = "record"
    tries: ClassVar[str] = "one to three damages to a record folder of another program, then submission check"
    promise: ClassVar[str] = "judged without a traceback"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.record = make_foreign(folder / "record")
        self.files = sorted(path.name for path in self.record.iterdir())

    def attack(self, random: Random, folder: Path) -> None:
        record = Path(shutil.copytree(self.record, folder / "record"))
        whats = []
        for name in random.sample(self.files, random.choice([1, 1, 2, 3])):
            path = record / name
            if random.random() < 0.2:
                what = odd_place(path, random)
            elif name.endswith(".json") and random.random() < 0.8:
                text, what = damage_json(path.read_text(), random)
                path.write_text(text)
            else:
                data, what = damage(path.read_bytes(), random)
                path.write_bytes(data)
            whats.append(f"{name}: {what}")
        self.tried = "; ".join(whats)
        command(submission, ["check", record, *(["--json"] if random.random() < 0.5 else [])], codes=(0, 1, 2))
