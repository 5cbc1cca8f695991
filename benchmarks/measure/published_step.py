"""The variant `published` of `benchmarks.bench_step`: a training step like those of the published scripts.

The model is `benchmarks.measure.published_model` under torch.compile. As in the scripts, batches are int64 in
pageable memory, and Muon updates one matrix at a time (in some scripts all matrices of one shape at once). Every
step makes a new state_dict, updates the moving average tensor by tensor, and reads with `.item()` if the time is up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from golf_kernels.newton_schulz import Triple, coefficient_set
from train.config import Config
from train.model.gpt import GPT
from train.optimize.groups import split_parameters

# recipes whose published script stacked the matrices of one shape in a bank and orthogonalized each bank at once
BANKED = ("sp4096_recurrence", "sp8192_frontier", "sp8192_ngram_tilt")


def orthogonalize(gradient: Tensor, coefficients: Sequence[Triple], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Newton-Schulz in `dtype` on a matrix `(m, n)` or k matrices `(k, m, n)`, with (a, b, c) of each iteration."""
    x = gradient.to(dtype)
    norm: Tensor = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class PlainMuon:
    """Muon, MuonEq-R or NorMuon, depending on the config.

    Orthogonalizes one matrix at a time or, if `banked`, all matrices of one shape at once.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], config: Config, *, banked: bool, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.dtype = dtype
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for number, matrix in enumerate(matrices):
            shapes.setdefault(tuple(matrix.shape) if banked else (number,), []).append(matrix)
        self.banks = list(shapes.values())
        self.config = config
        self.momentum = [[torch.zeros_like(matrix) for matrix in bank] for bank in self.banks]
        self.second = [[torch.zeros(len(matrix), 1, device=matrix.device) for matrix in bank] for bank in self.banks]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        config, beta = self.config, self.config.muon_momentum
        for bank, buffers, seconds in zip(self.banks, self.momentum, self.second, strict=True):
            updates = []
            for matrix, buffer in zip(bank, buffers, strict=True):
                gradient, weight = matrix.grad, 1 - beta if config.normuon else 1.0
                assert gradient is not None
                buffer.mul_(beta).add_(gradient, alpha=weight)
                update = gradient.mul(weight).add(buffer, alpha=beta)
                if config.muon_eq_r:
                    update = update / (update.square().sum(-1, keepdim=True) + config.muon_row_eps).sqrt()
                updates.append(update)
            triples = coefficient_set(config.muon_coefficients).schedule(config.muon_backend_steps)
            results = orthogonalize(torch.stack(updates), triples, self.dtype).unbind() if len(bank) > 1 else None
            for number, (matrix, second) in enumerate(zip(bank, seconds, strict=True)):
                result = (results[number] if results else orthogonalize(updates[number], triples, self.dtype)).float()
                if config.normuon:
                    before = result.norm()
                    second.lerp_(result.square().mean(-1, keepdim=True), 0.05)
                    result = result / (second.sqrt() + 1e-10)
                    result = result * (before / (result.norm() + 1e-10))
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - lr * config.muon_wd).add_(result, alpha=-lr * scale)


class PublishedStep:
    """One rank's training step of a recipe.

    `model` comes from `published_model`. `compiled` is its compiled loss function. Muon updates the matrices whose
    indices are in `owned`.
    """

    def __init__(self, model: GPT, config: Config, owned: Sequence[int], compiled: Callable[..., Tensor]) -> None:
        kinds = split_parameters(model, config)
        matrices = list(kinds["matrix"].values())
        self.model, self.config, self.compiled = model, config, compiled
        self.muon = PlainMuon([matrices[number] for number in owned], config, banked=config.recipe in BANKED)
        betas = (0.9, config.beta2)
        self.adamw = [
            torch.optim.AdamW(list(kinds[kind].values()), lr, betas, 1e-8, decay, fused=True)
            for kind, lr, decay in (
                ("embedding", config.tied_embed_lr, config.embedding_decay),
                ("scalar", config.scalar_lr, config.adam_wd),
            )
            if kinds[kind]
        ]
        self.average = (
            {k: v.detach().float().clone() for k, v in model.state_dict().items()} if config.ema_decay else {}
        )
        self.started = time.perf_counter()

    def __call__(self, tokens: np.ndarray, recurrence: bool) -> Tensor:
        """Run one step on token ids `(sequences, length + 1)`. Returns the loss."""
        config, device = self.config, self.model.embedding.weight.device
        batch = torch.from_numpy(tokens.astype(np.int64))
        inputs, targets = (part.to(device, non_blocking=True) for part in (batch[:, :-1], batch[:, 1:]))
        self.model.zero_grad(set_to_none=True)
        loss = self.compiled(inputs, targets, recurrence=recurrence)
        loss.backward()
        if config.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip_norm)
        for optimizer in self.adamw:
            optimizer.step()
        self.muon.step(config.matrix_lr)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items() if self.average else ():
                self.average[name].mul_(config.ema_decay).add_(tensor.detach().float(), alpha=1 - config.ema_decay)
        # like the scripts, check whether the time is up; the host waits for the device
        torch.tensor(int(time.perf_counter() - self.started > config.max_wallclock_seconds), device=device).item()
        return loss.detach()
