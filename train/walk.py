"""The walk from text to record: the stages in order, their seconds, and the summary at the end."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from golf_kernels import dispatch
from train.artifact import package_code_bytes, read_artifact
from train.config import Config
from train.data.build import read_manifest
from train.distributed import Ranks, start_ranks
from train.files import atomic_write
from train.logger import RunLogger
from train.run import RunFolder, create_run_folder, new_run_id
from train.scores import read_evaluation
from train.settings import Override, override_line
from train.stages import artifact_stage, evaluate_stage, prepare_data, quantize_stage, train_stage
from train.submission.record import write_record
from train.submission.summary import Summary, group_bytes, summary_text


class StageClock:
    """Seconds per stage, kept in the run folder so that a resumed walk still knows what its first part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.path: Path | None = None

    def keep_in(self, path: Path) -> None:
        """From now on keep the seconds in a file; what it holds already is added to."""
        earlier = json.loads(path.read_text()) if path.exists() else {}
        for name, seconds in earlier.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.path = path
        self._save()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self._save()

    def _save(self) -> None:
        if self.path is not None:
            atomic_write(self.path, json.dumps(self.seconds) + "\n")


def walk(config: Config, overrides: Sequence[Override] = ()) -> RunFolder:
    """Go from text to record; under torchrun all ranks share the work and the first one writes.

    Args:
        config: the settings.
        overrides: where settings differ from the recipe, for the log.

    Returns:
        The run's folder.

    Raises:
        UserError: anything in settings, data or on the disk that the user can mend.
    """
    # a back end that cannot run should fail now and not at the end of training
    dispatch.validate()
    with start_ranks(config.device) as ranks:
        clock = StageClock()
        with clock("data"):
            prepare_data(config, ranks)
        config = config.replace(run_id=ranks.broadcast(new_run_id(config)))
        folder = ranks.on_main(lambda: create_run_folder(config))
        if ranks.is_main:
            clock.keep_in(folder.path / "stages.json")
        with RunLogger(folder.path, config.seed, ranks.rank) as log:
            log.header(_sources())
            log.line(f"run_id:{config.run_id} recipe:{config.recipe} device:{ranks.device}")
            for override in overrides:
                log.line(override_line(override))
            with clock("train"):
                model = train_stage(config, folder, ranks, log)
            with clock("quantize"):
                tensors = quantize_stage(folder.trained_config(), model, ranks, log)
            with clock("artifact"):
                model = artifact_stage(folder.trained_config(), folder.artifact, model, tensors, ranks, log)
            with clock("evaluate"):
                evaluate_stage(folder, model, ranks, log)
            if ranks.is_main:
                summary = summarize(folder, clock.seconds, ranks)
                summary.write(folder.summary)
                write_record(folder.path, summary)
                log.line(summary_text(summary, folder.path))
    return folder


def summarize(folder: RunFolder, stage_seconds: dict[str, float], ranks: Ranks) -> Summary:
    """Gather a finished run's numbers from what its stages left."""
    config, training = folder.read_config(), folder.read_training()
    scores = [entry for entry in read_evaluation(folder).values() if entry["weights"] == "artifact"]
    score = next(entry for entry in scores if entry["stride"] == config.eval_stride)
    flat = next(entry for entry in scores if entry["stride"] == 0)
    artifact = read_artifact(folder.artifact)
    bytes_code = package_code_bytes().plain_bytes
    manifest = read_manifest(config.data_path)
    return Summary(
        run_id=config.run_id,
        recipe=config.recipe,
        seed=config.seed,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        steps=training["steps"],
        step_avg_ms=1000 * training["seconds"] / max(training["steps"], 1),
        train_seconds=training["seconds"],
        stage_seconds=dict(stage_seconds),
        val_loss=score["val_loss"],
        val_bpb=score["val_bpb"],
        eval_seconds=score["seconds"],
        tokens=score["tokens"],
        bytes=score["bytes"],
        bytes_code=bytes_code,
        bytes_model=artifact.info.model_bytes,
        bytes_total=bytes_code + artifact.info.model_bytes,
        max_bytes=config.max_artifact_bytes,
        parameters=sum(tensor.shape.numel() for tensor in artifact.tensors.values()),
        hardware=hardware(ranks),
        torch=torch.__version__,
        python=platform.python_version(),
        step0_val_bpb=training["first"]["val_bpb"],
        prequant_val_bpb=training["last"]["val_bpb"],
        flat_val_bpb=flat["val_bpb"],
        yardsticks=manifest.yardsticks if manifest else {},
        model_groups=group_bytes(artifact.info.rows()),
    )


def hardware(ranks: Ranks) -> str:
    """What the run computed on, as the record names it."""
    if ranks.device.type == "cuda":
        return f"{ranks.world_size} x {torch.cuda.get_device_name(ranks.device)}"
    return (
        f"{os.cpu_count()} CPU cores ({_cpu_name()}), {ranks.world_size} process{'es' if ranks.world_size > 1 else ''}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _sources() -> str:
    """The code that trains, as the log's head holds it: the package's files, one after the other."""
    here = Path(__file__).resolve().parent
    return "\n".join(f"# train/{path.relative_to(here)}\n{path.read_text()}" for path in sorted(here.rglob("*.py")))
