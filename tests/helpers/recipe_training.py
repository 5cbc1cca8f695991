"""Trains a narrow copy of a recipe on made-up tokens, without clock, files and validation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.common.distributed import Ranks
from train.config import Config
from train.data.dataset import Dataset
from train.data.loaders import Loader
from train.data.shards import write_shard
from train.loop import training_step
from train.model.gpt import GPT
from train.optimize.averaging import EMA, SWA
from train.optimize.groups import Optimizers, build_optimizers
from train.optimize.schedules import ContextGrowth, lr_scale, muon_momentum, recurrence_on
from train.recipes import load_recipe

STEPS = 20
SEQ_LEN = 32


def write_tokens(folder: Path) -> Path:
    """Write two shards with a Markov chain over 64 of the 1,024 ids. In 20 steps a model can learn a little of it."""
    generator = np.random.default_rng(0)
    following = generator.integers(4, 68, size=(68, 2))
    for shard in range(2):
        ids = [1]
        for coin in generator.integers(0, 2, size=20_000):
            ids.append(int(following[ids[-1], coin]))
        write_shard(folder / f"made_train_{shard:06d}.bin", np.array(ids, dtype=np.uint16))
    return folder


def narrow_recipe(name: str, tokens: Path, **changes: object) -> Config:
    """The recipe at width 64.

    `rope_train_seq_len` keeps its ratio to the training length, so that the rotary base grows as in the recipe (NTK
    rule).
    """
    full = load_recipe(name).config()
    values: dict[str, object] = {
        "data_path": str(tokens),
        "vocab_size": 1024,
        "model_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "rope_dims": 8 if full.rope_dims else 0,
        "rope_train_seq_len": SEQ_LEN * full.rope_train_seq_len // full.train_seq_len,
        "train_seq_len": SEQ_LEN,
        "train_seq_schedule": "16@0.1,32@0.7,64@1" if full.train_seq_schedule else "",
        "train_batch_tokens": 16 * SEQ_LEN,
        "bigram_vocab_size": min(full.bigram_vocab_size, 128),
        "bigram_dim": 16,
        "ve_dim": 16 if full.ve_dim else 0,
        "recur_start_step": STEPS // 2,
        "iterations": STEPS,
        "max_wallclock_seconds": 0.0,
        "gptq_reserve_seconds": 0.0,
        "warmdown_iters": STEPS // 2,
        "swa_every": 2,
        "device": "cpu",
    }
    return load_recipe(name).config(**{**values, **changes})


@dataclass
class Training:
    """A training run that a test advances step by step. It has no clock, files or validation."""

    config: Config
    ranks: Ranks
    model: GPT
    optimizers: Optimizers
    loader: Loader
    average: EMA | SWA | None
    loss_of: Callable[..., Tensor]
    context: ContextGrowth
    step: int = 0

    @classmethod
    def begin(cls, config: Config, ranks: Ranks | None = None, *, double: bool = False) -> "Training":
        ranks = ranks or Ranks()
        torch.manual_seed(config.seed)
        model = GPT(config)
        if double:
            model.double().compute_dtype = torch.float64
        average = EMA(model, config.ema_decay) if config.ema_decay else None
        swa = SWA(model, config.swa_every, config.swa_start_frac) if config.swa_enabled else None
        loader = Dataset(config).loader(ranks)
        return cls(
            config,
            ranks,
            model,
            build_optimizers(model, config, ranks.group),
            loader,
            average or swa,
            model,
            ContextGrowth(config),
        )

    @property
    def parts(self) -> dict[str, object]:
        parts = {"model": self.model, "optimizers": self.optimizers, "loader": self.loader, "average": self.average}
        return {**parts, "context": self.context}

    def run(self, until: int) -> list[float]:
        losses = []
        while self.step < until:
            self.context.grow(self.step, 0.0)
            scale = lr_scale(self.step, 0.0, self.config) * self.context.lr_factor(self.step)
            momentum = muon_momentum(self.step, self.config)
            on = recurrence_on(self.step, 0.0, self.config)
            length, packed = self.context.length, self.config.loader == "packed"
            losses.append(
                float(
                    training_step(
                        self.optimizers, self.loss_of, self.loader, on, scale, momentum, length=length, packed=packed
                    )
                )
            )
            self.step += 1
            if isinstance(self.average, EMA):
                self.average.update()
            elif self.average:
                self.average.update(self.step, scale)
        return losses

    def weights(self) -> dict[str, Tensor]:
        averaged = self.average.average() if self.average else {}
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return state | {f"average {name}": tensor.clone() for name, tensor in averaged.items()}
