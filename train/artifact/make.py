"""Makes the artifact of a trained model: calibrates, quantizes, writes the artifact, and reads it back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from golf_kernels import dispatch
from train.artifact.storage import EncodedArtifact, load_model, write_artifact
from train.common.distributed import Ranks
from train.config import Config
from train.data.dataset import Dataset
from train.data.paid_prefix import prefix_bytes
from train.model.gpt import GPT
from train.quantize.quantize_model import quantize_model
from train.quantize.tensors import StoredTensors, dequantize_state, matrices_to_calibrate
from train.run.logger import RunLogger


def quantize(
    config: Config, model: GPT, data: Dataset, ranks: Ranks, log: RunLogger, *, code_bytes: int
) -> tuple[StoredTensors, EncodedArtifact | None]:
    """Calibrate and quantize a trained model. If `target_bytes` is set, search row clips that meet it.

    Every rank must call this. `data` is read only to calibrate on training batches or to search row clips. `code_bytes`
    is the size of the submission's code.

    Returns:
        The stored tensors, the same on every rank, and their artifact if `target_bytes` is set, otherwise None.
    """
    names = matrices_to_calibrate(model, config)
    hessians: dict[str, Tensor] = {}
    if config.quantizer == "gptq":
        from train.quantize.calibrate import calibrate

        hessians = calibrate(config, model, names, data, ranks, log.line) if names else {}
    seconds: list[float] = []

    def rounded(sigmas: Mapping[str, float]) -> StoredTensors:
        started = time.perf_counter()
        made = quantize_model(model, config, hessians, ranks=ranks, note=log.line, sigmas=sigmas)
        seconds.append(time.perf_counter() - started)
        return made

    encoded = None
    if config.target_bytes:
        from train.artifact.fit_to_target import fit_to_target

        counted_bytes = code_bytes + prefix_bytes(config)
        tensors, encoded = fit_to_target(
            config, model, hessians, rounded, data, ranks, log, counted_bytes=counted_bytes
        )
    else:
        tensors = rounded({})
    rounds = f", in {len(seconds)} rounds" if len(seconds) > 1 else ""
    log.line(f"gptq:quantized {len(tensors)} tensors, {len(names)} of them by GPTQ, in {sum(seconds):.1f}s{rounds}")
    if names:
        backend, reason = dispatch.choose("gptq_block", device=ranks.device.type)
        log.line(f"gptq:inner loop computed by backend {backend} ({reason})")
    return tensors, encoded


def make_artifact(
    path: Path,
    config: Config,
    model: GPT,
    tensors: StoredTensors,
    encoded: EncodedArtifact | None,
    ranks: Ranks,
    log: RunLogger,
    *,
    code_bytes: int,
    before_replacing: Callable[[], object] = lambda: None,
) -> GPT:
    """Prune if the settings ask for it, write the artifact, and read the model back. Every rank must call this.

    Args:
        path: the file to write.
        config: the settings.
        model: the trained model, whose size is logged.
        tensors, encoded: result of `quantize`.
        ranks: the ranks of the run.
        log: receives the sizes.
        code_bytes: size of the submission's code.
        before_replacing: function that rank 0 calls before the artifact replaces an earlier file.

    Returns:
        The model that was read back, on the ranks' device.

    Raises:
        BudgetError: the submission is larger than the cap. Nothing is written.
        RuntimeError: a weight of the model that was read back differs from the quantized tensor.
    """
    paid = prefix_bytes(config)
    if config.target_mb or config.prune_excess:
        from train.artifact.prune_to_target import prune

        tensors, encoded = prune(config, tensors, encoded, ranks, log, counted_bytes=code_bytes + paid)

    def write() -> None:
        info = write_artifact(
            path,
            tensors,
            config,
            code_bytes=code_bytes,
            prefix_bytes=paid,
            max_bytes=min(config.target_bytes or config.max_artifact_bytes, config.max_artifact_bytes),
            encoded=encoded,
            before_replacing=before_replacing,
        )
        log.sizes(
            raw_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
            code_bytes=code_bytes,
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
