"""Runs the stages of a run in order: data, train, quantize, artifact, evaluate, record."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from golf_kernels import dispatch, tuned
from golf_kernels.newton_schulz import coefficient_set
from train.artifact.budget import check_room
from train.artifact.codecs import CODECS
from train.artifact.make import make_artifact, quantize
from train.checkpoint import load_weights, write_tensors
from train.command_line import Override, check_backends, override_line
from train.common.distributed import Ranks, start_ranks
from train.common.errors import UserError
from train.common.files import atomic_write, write_json
from train.common.hardware import hardware
from train.common.wording import counted, duration
from train.config import Config
from train.data.dataset import Dataset, prepare_data, start_compressors
from train.data.loaders import check_batch
from train.data.paid_prefix import prefix_bytes
from train.evaluate.scores import write_evaluation
from train.evaluate.scoring import BATCH_SEQS, score
from train.loop import TrainResult, train
from train.model.attention_choice import check_attention, choose_attention, use_attention
from train.model.gpt import GPT
from train.optimize.cuda_graph import choose_graph
from train.run.clocks import StageClock
from train.run.folder import RunFolder, new_run_id, open_run_folder
from train.run.logger import RunLogger
from train.single_file.code_size import check_code_form, counted_code_bytes
from train.single_file.sources import package_source

if TYPE_CHECKING:
    from train.run.sinks import Sink


def run_pipeline(config: Config, overrides: Sequence[Override] = ()) -> RunFolder:
    """Run all stages. Under torchrun the ranks divide the work, and rank 0 writes the files. `overrides` are logged.

    Raises:
        UserError: the user must change the settings, the data or the disk.
    """
    preflight(config)
    with start_ranks(config.device) as ranks, ExitStack() as held:
        kernels, lines = ranks.on_main(lambda: tuned_kernels(config, ranks.device))
        config = config.replace(golf_backend=kernels)
        held.enter_context(dispatch.forced(kernels))
        clock = StageClock()
        with clock("data", found=Path(config.data_path).exists()):
            prepare_data(config, ranks)
        config = config.replace(run_id=ranks.broadcast(new_run_id(config)))
        compressors = start_compressors(config) if ranks.is_main else None
        data = Dataset(config)
        # check all inputs before creating the run folder
        ranks.on_main(data.check)
        ranks.on_main(lambda: check_attention(config, ranks.device))
        ranks.on_main(lambda: choose_graph(config, ranks.device))
        code_bytes = ranks.on_main(lambda: counted_code_bytes(config))
        check_room(config, code_bytes + prefix_bytes(config))
        folder = ranks.on_main(lambda: held.enter_context(open_run_folder(config)))
        if ranks.is_main:
            clock.keep_in(folder.stages)
        sinks: list[Sink] = []
        if config.loggers:
            from train.run.sinks import open_sinks

            ranks.on_main(lambda: sinks.extend(open_sinks(config.loggers, folder.path, config.to_dict())))
        with RunLogger(folder.path, config.seed, ranks.rank, sinks=sinks) as log, say_how_to_resume(folder, ranks, log):
            log.header()
            if ranks.is_main and not log.resumed:
                atomic_write(folder.source, package_source() + "\n")
            log.line(f"run_id:{config.run_id} recipe:{config.recipe} device:{ranks.device}")
            if config.resume == "auto" and ranks.is_main and not log.resumed:
                log.line(f"resume: there was no run {config.run_id} in {config.runs_dir}, so a new one begins")
            for line in [*map(override_line, overrides), *lines]:
                log.line(line)
            with clock("train", found=folder.is_trained):
                if folder.is_trained:
                    log.line("training: finished before; using weights.pt")
                    model = load_weights(folder).to(ranks.device)
                else:
                    log.line(training_plan(config, data))
                    model = write_training(folder, train(config, data, folder, ranks, log), ranks)
            trained = folder.trained_config()
            with clock("quantize"):
                log.line(quantization_plan(config))
                tensors, encoded = quantize(trained, model, data, ranks, log, code_bytes=code_bytes)
            with clock("artifact"):
                log.line(
                    f"artifact: codec {config.codec}, at most {config.max_artifact_bytes:,} bytes including the code"
                )
                model = make_artifact(
                    folder.artifact, trained, model, tensors, encoded, ranks, log,
                    code_bytes=code_bytes, before_replacing=folder.drop_scores,
                )  # fmt: skip
            with clock("evaluate"):
                evaluate(folder, trained, model, data, ranks, log)
            if config.samples != "off":
                from train.generate.samples import write_samples

                ranks.on_main(lambda: write_samples(folder, config, model, "sample text of the artifact"))
            if ranks.is_main and importlib.util.find_spec("train.submission"):
                from train.submission.record import record_run

                log.line("record: writing plots, README.md and submission.json")
                if compressors:
                    compressors.wait()
                log.line(record_run(folder))
        # wait until the record is written: if another rank exits before, torchrun takes that rank as finished
        ranks.barrier()
    return folder


def tuned_kernels(config: Config, device: torch.device) -> tuple[str, list[str]]:
    """Add the kernels that `python -m golf_kernels tune` chose for a training step to the setting `golf_backend`.

    The kernels that the setting names are kept. The result is stored with the run, so a resumed run, single stages and
    the run's script use the same kernels.

    Returns:
        The setting's new value, and a log line for each added kernel.
    """
    found = tuned.load() if device.type == "cuda" else None
    if found is None:
        return config.golf_backend, []
    chosen = found.preferences("step")
    kernels = dispatch.with_preferences(config.golf_backend, chosen)
    added = [op for op, backend in chosen.items() if f"{op}={backend}?" in kernels.split(",")]
    return kernels, [f"kernel: {found.line(op, 'step')}" for op in added]


def preflight(config: Config) -> None:
    """Before training, find errors that would otherwise be raised during or after training.

    Raises:
        UserError: a setting has no effect or contradicts another setting, a forced backend cannot run, the
            Newton-Schulz coefficients do not fit `muon_backend_steps`, or the package of the codec or of a logger is
            not installed.
        ModuleNotFoundError: a package that the record needs is not installed.
    """
    if config.resume == "auto" and not config.run_id:
        raise UserError("resume: which run? set RUN_ID to its folder's name, or RESUME=never")
    check_batch(config)
    if config.eval_stride > config.window:
        raise UserError(
            f"eval_stride: {config.eval_stride} is longer than the window of {config.window} tokens, so some tokens would never be "
            "scored: lower EVAL_STRIDE, or raise EVAL_SEQ_LEN"
        )
    try:
        with dispatch.forced(config.golf_backend):
            check_backends()
        coefficient_set(config.muon_coefficients).schedule(config.muon_backend_steps)
    except ValueError as error:
        raise UserError(f"muon_coefficients, muon_backend_steps: {error}") from error
    CODECS[config.codec].encode(b"")
    check_code_form(config)
    if config.loggers:
        from train.run.sinks import check_sinks

        check_sinks(config.loggers)
    # a packed script does not contain train.submission
    if importlib.util.find_spec("train.submission"):
        importlib.import_module("train.submission.record")


@contextmanager
def say_how_to_resume(folder: RunFolder, ranks: Ranks, log: RunLogger) -> Iterator[None]:
    """Inside the context, give a KeyboardInterrupt a message: the step, and the command that resumes the run."""
    try:
        yield
    except KeyboardInterrupt:
        # a packed script does not contain train.submission
        program = "-m train" if importlib.util.find_spec("train.submission") else "train_gpt.py"
        launcher = "python"
        if ranks.world_size > 1:
            one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
            launcher = (
                f"torchrun {f'--standalone --nproc_per_node={ranks.world_size}' if one_machine else '(as before)'}"
            )
        command = f"{launcher} {program} --run_id {shlex.quote(folder.path.name)} --resume auto"
        runs_dir = str(folder.path.parent)
        if runs_dir != Config.runs_dir:
            command += f" --runs_dir {shlex.quote(runs_dir)}"
        where = "after training" if folder.is_trained else f"at step {log.step}"
        saved = folder.is_trained or folder.checkpoint.exists()
        again = "resume" if saved else "without a checkpoint (CHECKPOINT_EVERY) it begins again at step 0"
        raise KeyboardInterrupt(f"interrupted {where}; {again}: {command}") from None


def training_plan(config: Config, data: Dataset) -> str:
    """Return a log line: steps, tokens, time limit and validation text of the training."""
    steps = f"{counted(config.iterations, 'step')} of {counted(config.train_batch_tokens, 'token')}"
    limit = f", at most {duration(config.training_seconds)}" if config.training_seconds else ""
    text = counted(len(data.validation.tokens) - 1, "token")
    every = f"every {counted(config.val_loss_every, 'step')}" if config.val_loss_every else "before and after"
    return f"training: {steps}{limit}; validation: {text}, {every}"


def quantization_plan(config: Config) -> str:
    """Return a log line: quantizer, bits and calibration text of the quantization."""
    how = f"quantization: {config.quantizer}, int{config.matrix_bits} matrices and int{config.embed_bits} embeddings"
    if config.quantizer == "rtn":
        return how
    number = config.gptq_calib_batches
    if config.gptq_calib_source == "generated":
        return f"{how}, calibrated on {counted(number, 'generated sequence')}"
    return f"{how}, calibrated on {counted(number, 'training batch', 'training batches')}"


def write_training(folder: RunFolder, result: TrainResult, ranks: Ranks) -> GPT:
    """Write weights.pt and training.json, remove the checkpoint, and return the trained model."""
    if ranks.is_main:
        write_tensors(folder.weights, result.model.state_dict())
        measured = {
            "steps": result.steps,
            "seconds": result.seconds,
            "recurrence": result.recurrence,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "hardware": hardware(ranks.device, ranks.world_size),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "first": asdict(result.first),
            "last": asdict(result.last),
        }
        write_json(folder.training, measured)
        folder.checkpoint.unlink(missing_ok=True)
    ranks.barrier()
    return result.model


def evaluate(folder: RunFolder, config: Config, model: GPT, data: Dataset, ranks: Ranks, log: RunLogger) -> None:
    """Score the artifact's model with non-overlapping windows and, if `eval_stride` is set, with a sliding window."""
    use_attention(model, ranks.on_main(lambda: choose_attention(config, ranks.device, BATCH_SEQS)).name)
    text = counted(len(data.validation.tokens) - 1, "token")
    for stride in sorted({0, config.eval_stride}):
        log.line(f"evaluation: {text}, {f'stride {stride}' if stride else 'windows without overlap'}")
        scored = config.replace(eval_stride=stride)
        description = f"evaluate, stride {stride}" if stride else "evaluate, no overlap"
        result, entry = score(model, data, scored, ranks, weights="artifact", description=description)
        if not ranks.is_main:
            continue
        write_evaluation(folder, entry)
        log.line(result.layer0_line)
        log.final(entry["name"], result.val_loss, result.val_bpb, result.seconds, stride=stride, facts=entry)
        if "label" in entry:
            log.line(entry["label"])
