"""The training loop: warm-up, the clock, steps, validation, checkpoints, averaged weights at the end."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from train.config import Config
from train.data.loaders import Loader, make_loader
from train.data.shards import load_validation_tokens
from train.data.tokenizer import ByteTables
from train.distributed import Ranks
from train.evaluate import EvalResult, evaluate_model
from train.files import atomic_writer
from train.logger import RunLogger
from train.model.gpt import GPT
from train.optimize.averaging import EMA, SWA
from train.optimize.groups import Optimizers, build_optimizers
from train.optimize.reduction import average_gradients
from train.optimize.schedules import WallClock, lr_scale, muon_momentum
from train.run import RunFolder


@dataclass(frozen=True)
class TrainResult:
    """What training leaves for the next stages.

    Attributes:
        model: the model, holding the averaged weights if the recipe averages.
        steps: optimizer steps taken.
        seconds: time inside the clock.
        first: validation before the first step.
        last: validation of the averaged weights, before quantization.
    """

    model: GPT
    steps: int
    seconds: float
    first: EvalResult
    last: EvalResult
