"""The stages of a run, each of which needs only what the ones before it left in the run folder."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from golf_kernels import dispatch
from train.artifact import Encoder, load_model, write_artifact
from train.checkpoint import load_weights, write_tensors
from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.files import write_json
from train.common.hardware import hardware
from train.config import Config
from train.data.paid_prefix import known_targets, prefix_bytes
from train.data.validation import load_validation
from train.evaluate.scores import evaluation_entry, write_evaluation
from train.evaluate.scoring import BATCH_SEQS, evaluate_model
from train.loop import train
from train.model.attention_choice import choose_attention, use_attention
from train.model.gpt import GPT
from train.quantize.tensors import StoredTensors, dequantize_state, matrices_to_calibrate, quantize_model
from train.run.folder import RunFolder
from train.run.logger import RunLogger
from train.single_file.code_size import counted_code_bytes


def prepare_data(config: Config, ranks: Ranks) -> None:
    """Build the embedded corpus's shards if the recipe has one and they are not there yet.

    Raises:
        UserError: the data is missing and the recipe has no embedded text to make it from.
    """
    path = Path(config.data_path)
    if not config.data_path:
        raise UserError("data_path: not set: give a folder of shards (python -m train.data makes one)")

    def build() -> None:
        if path.exists():
            return
        if config.corpus:
            from train.data.build import build_dataset
            from train.data.corpus import split_documents, stdlib_documents

            print(
                "text: the Python standard library's own sources and documentation (nothing is downloaded)", flush=True
            )
            parts = split_documents(stdlib_documents())
            build_dataset(*parts, path, config.vocab_size, name="stdlib", source="Python standard library")
        else:
            raise UserError(
                f"data_path: {path} does not exist: make it with python -m train.data (fineweb --variant "
                f"sp{config.vocab_size}, see its --help for repositories; or text PATH… for your own), or set DATA_PATH"
            )

    ranks.on_main(build)


def train_stage(config: Config, folder: RunFolder, ranks: Ranks, log: RunLogger) -> GPT:
    """Train, and leave weights.pt and training.json; a run that has them already is not trained again."""
    if folder.is_trained:
        log.line("training: finished before, weights.pt is taken")
        return load_weights(folder).to(ranks.device)
    result = train(config, folder, ranks, log)
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


def quantize_stage(
    config: Config,
    model: GPT,
    ranks: Ranks,
    log: RunLogger,
    encoder: Encoder | None = None,
    *,
    packed: Config | None = None,
) -> StoredTensors:
    """Calibrate, round, and return what the artifact stores; the same on every rank.

    `encoder` keeps, for `artifact_stage`, what a fit to `target_bytes` encoded; `packed` as there.
    """
    encoder = encoder or Encoder()
    names = matrices_to_calibrate(model, config)
    hessians: dict[str, Tensor] = {}
    if config.quantizer == "gptq":
        from train.quantize.calibrate import calibrate

        hessians = calibrate(config, model, names, ranks, log.line) if names else {}
    started = time.perf_counter()

    def quantize(sigmas: Mapping[str, float]) -> StoredTensors:
        return quantize_model(model, config, hessians, ranks=ranks, note=log.line, sigmas=sigmas)

    if config.target_bytes:
        from train.artifact.fit_to_target import fit_target

        tensors = fit_target(config, packed or config, model, hessians, quantize, ranks, log, encoder)
    else:
        tensors = quantize({})
    log.line(f"gptq:quantized {len(tensors)} tensors in {time.perf_counter() - started:.1f}s")
    if names:
        backend, reason = dispatch.choose("gptq_block", device=ranks.device.type)
        log.line(f"gptq:column loop in {backend} ({reason})")
    return tensors


def artifact_stage(
    config: Config,
    path: Path,
    model: GPT,
    tensors: StoredTensors,
    ranks: Ranks,
    log: RunLogger,
    *,
    encoder: Encoder,
    packed: Config | None = None,
    before_replacing: Callable[[], object] = lambda: None,
) -> GPT:
    """Prune if the settings say so, write the artifact, read it back from its bytes, and make sure that nothing was lost.

    Args:
        config: the settings.
        path: of the artifact.
        model: as it was trained.
        tensors: of `quantize_stage`.
        ranks: this process among the others, all of which must call.
        log: is told the sizes.
        encoder: of `quantize_stage`.
        packed: the settings that the script carries and its code is counted with; None: `config`.
        before_replacing: called on the first rank when the artifact fits, before it stands at `path`.

    Returns:
        The model that the artifact's bytes hold.
    """
    code, paid = ranks.on_main(lambda: counted_code_bytes(packed or config)), prefix_bytes(config)
    if config.target_mb or config.prune_excess:
        from train.artifact.prune_to_target import prune

        tensors = prune(config, tensors, code + paid, ranks, log, encoder)

    def write() -> None:
        cap = min(config.target_bytes or config.max_artifact_bytes, config.max_artifact_bytes)
        info = write_artifact(
            path,
            tensors,
            config,
            code_bytes=code,
            prefix_bytes=paid,
            max_bytes=cap,
            encode=encoder,
            before_replacing=before_replacing,
        )
        log.sizes(
            raw_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
            code_bytes=code,
            model_bytes=info.model_bytes,
            prefix_bytes=paid,
            bits=config.matrix_bits,
            codec=config.codec,
        )

    ranks.on_main(write)
    loaded = load_model(path, config)
    expected = dequantize_state(tensors)
    for name, parameter in loaded.named_parameters():
        if not torch.equal(parameter, expected[name].to(parameter.dtype)):
            raise RuntimeError(f"{path}: {name} differs from the quantized tensor that was written")
    return loaded.to(ranks.device)


def evaluate_stage(folder: RunFolder, model: GPT, ranks: Ranks, log: RunLogger) -> None:
    """Score the artifact's model, flat and with the recipe's sliding window."""
    config = folder.trained_config()
    validation = load_validation(config)
    use_attention(model, ranks.on_main(lambda: choose_attention(config, ranks.device, BATCH_SEQS)).name)
    recurrence = bool(config.recur_layers)
    known = known_targets(config, validation.tokens)
    for stride in sorted({0, config.eval_stride}):
        scored = config.replace(eval_stride=stride)
        result = evaluate_model(
            model,
            validation.tokens,
            validation.tables,
            scored,
            known=known,
            recurrence=recurrence,
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=True,
            description=f"evaluate, stride {stride or 'flat'}",
        )
        if not ranks.is_main:
            continue
        entry = evaluation_entry(
            result, scored, weights="artifact", world_size=ranks.world_size, device=str(ranks.device)
        )
        write_evaluation(folder, entry)
        log.line(result.layer0_line)
        log.final(entry["name"], result.val_loss, result.val_bpb, result.seconds, stride=stride, facts=entry)
        if "label" in entry:
            log.line(entry["label"])
