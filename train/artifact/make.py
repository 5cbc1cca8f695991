"""From a trained model to its artifact: calibrate, round, write, and read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from golf_kernels import dispatch
from train.artifact import Encoder, load_model, write_artifact
from train.common.distributed import Ranks
from train.config import Config
from train.data.paid_prefix import prefix_bytes
from train.model.gpt import GPT
from train.quantize.quantize_model import quantize_model
from train.quantize.tensors import StoredTensors, dequantize_state, matrices_to_calibrate
from train.run.logger import RunLogger
from train.single_file.code_size import counted_code_bytes


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
