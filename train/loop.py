"""The training loop: warm-up, clock, steps, validation, checkpoints, and averages of the weights."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from train.checkpoint import Parts, Reached, load_checkpoint, save_checkpoint
from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.hardware import datasheet_tflops, keep_freed_memory
from train.common.progress import Progress
from train.common.values import parse_steps
from train.common.wording import counted, duration, stopped_early
from train.config import Config
from train.data.dataset import Dataset
from train.data.loaders import BatchSource, Loader, join_micro_batches, micro_batch_sequences
from train.evaluate.scores import EvalResult
from train.evaluate.scoring import flat_evaluation
from train.model.attention_choice import choose_attention, use_attention
from train.model.compile import compiled_loss, compiles, write_out
from train.model.gpt import GPT
from train.model.parameters import mflop_per_token
from train.optimize.averaging import EMA, SWA
from train.optimize.groups import Optimizers, build_optimizers
from train.optimize.schedules import ContextGrowth, lr_scale, muon_momentum, recurrence_on, training_graphs
from train.run.clocks import StartUp, WallClock
from train.run.folder import RunFolder
from train.run.logger import RunLogger

# each of the first steps is logged, as in the published logs
FIRST_LOGGED_STEPS = 10
# if the loss of a first step exceeds the initial validation loss by more than this (nats per token), a log line
# explains the rise
SHOCK_NATS = 0.1
# steps that #2014 has prefetched when its training sequences grow
PREFETCHED_STEPS = 2


@dataclass(frozen=True)
class TrainResult:
    """The result of training."""

    model: GPT  # has the averaged weights, if the settings average weights
    steps: int  # number of finished steps
    seconds: float  # training time
    recurrence: bool  # whether recurrence was on in the last step
    first: EvalResult  # validation before the first step
    last: EvalResult  # validation of `model`


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def train(config: Config, data: Dataset, folder: RunFolder, ranks: Ranks, log: RunLogger) -> TrainResult:
    """Train a model. If the setting `resume` is "auto", continue from the run folder's checkpoint.

    Returns:
        The trained model, with the same weights on every rank, and the numbers of the training.

    Raises:
        UserError: the data does not fit the settings, or the loss is infinite or not a number.
    """
    start = StartUp(ranks.device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    seed_everything(config.seed)
    model = GPT(config).to(ranks.device)
    # copy rank 0's weights to all ranks, because initial weights may depend on a process's number of threads
    ranks.copy_from(0, model.parameters())
    optimizers = build_optimizers(model, config, ranks.group)
    log.line(f"compute dtype: {str(model.compute_dtype).removeprefix('torch.')}")
    log.line(f"CUDA graph of the optimizer: {optimizers.graph}")
    loader = data.loader(ranks)
    start.end("data and model")
    attention = ranks.on_main(lambda: choose_attention(config, ranks.device, micro_batch_sequences(config)))
    use_attention(model, attention.name)
    log.line(f"attention: {attention.name} ({attention.reason})")
    start.end("choice of attention")
    if config.profile_steps:
        from train.run.profile_parts import name_compiled_kernels

        if compiles(config, ranks.device) and (problem := name_compiled_kernels(ranks.device.type)):
            log.line(f"profile:the model's parts have no ranges, {problem}")
    loss_of = compiled_loss(model, config, ranks.device)
    log.facts(
        dataset=config.data_path,
        train_shards=len(data.training.paths),
        model_params=sum(parameter.numel() for parameter in model.parameters()),
        world_size=ranks.world_size,
        grad_accum_steps=ranks.accumulation,
        seed=config.seed,
    )
    if config.warmup_steps:
        warm_up(model, optimizers, loss_of, loader, config, log)
        loader = data.loader(ranks)
    start.end("compilation and warm-up")
    ema = EMA(model, config.ema_decay) if config.ema_decay else None
    swa = SWA(model, config.swa_every, config.swa_start_frac) if config.swa_enabled else None
    context, packed = ContextGrowth(config), config.loader == "packed"
    grown = context if config.train_seq_schedule else None
    parts: Parts = {
        "model": model,
        "optimizers": optimizers,
        "loader": loader,
        "ema": ema,
        "swa": swa,
        "context": grown,
    }

    resumed = load_checkpoint(folder.checkpoint, parts, ranks, config.iterations) if config.resume == "auto" else None
    step, seconds, before = (resumed.step, resumed.seconds, resumed.world_size) if resumed else (0, 0.0, None)
    first = EvalResult.read(resumed.first, f"{folder.checkpoint}, first validation") if resumed else None
    # log this even without a checkpoint: the run starts again at step 0, and what a killed process logged is void
    if log.resumed:
        log.resume(step, seconds * 1000)
    if before not in (None, ranks.world_size):
        log.line(
            f"training: resumed on {counted(ranks.world_size, 'rank')}, the checkpoint was written on {before}: the result "
            "differs from that of an unbroken run"
        )
    clock = WallClock(
        config.training_seconds, group=ranks.group, device=ranks.device, elapsed_seconds=seconds, steps=step
    )

    def validate(recurrence: bool) -> EvalResult:
        text = data.validation
        result = flat_evaluation(
            model,
            text.tokens,
            text.target_bytes,
            config,
            recurrence=recurrence,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        log.val_step(step, config.iterations, result.val_loss, result.val_bpb, seconds * 1000)
        if config.samples == "validations":
            from train.generate.samples import write_samples

            ranks.on_main(
                lambda: write_samples(folder, config, model, f"sample text at step {step}", recurrence=recurrence)
            )
        return result

    if first is None:
        first = validate(recurrence_on(step, seconds, config))
        start.end("validation")
    log.line(str(start))
    clock.resume()
    stop = config.training_seconds > 0 and seconds >= config.training_seconds
    profiler = None
    if config.profile_steps:
        from train.run.profiling import StepProfiler

        profiled = parse_steps(config.profile_steps)
        profiler = StepProfiler(profiled, folder.path, ranks, log, clock, model if loss_of is model else None)
    bar = Progress(
        config.iterations, "training", "steps", enabled=ranks.is_main, done=step, now=lambda: clock.elapsed_seconds,
        limit=config.training_seconds,
    )  # fmt: skip
    speed, seconds_before = Speed(config, ranks), seconds
    # shown: the last logged training loss, for the progress bar
    shown, rose = "", False
    # whether recurrence was on in the last step. Once on, it stays on, even if the clock's estimate falls again.
    recurrence = step > 0 and recurrence_on(step - 1, seconds, config)
    while True:
        last = stop or step == config.iterations
        if not last and not recurrence and recurrence_on(step, clock.elapsed_seconds, config):
            recurrence = True
            log.line(
                f"recurrence:activated at step {step}, layers {','.join(str(s.layer) for s in model.recurrent_plan)}"
                " (the loss may rise for some steps: this is normal)"
            )
        if not last and context.grow(step, clock.elapsed_seconds):
            note = ""
            if packed:
                # as published: the script drops the batches that it has prefetched
                note = f" ({loader.skip(PREFETCHED_STEPS):,} tokens are skipped, as in the published script)"
            log.line(f"training: sequences of {context.length} tokens from step {step} on{note}")
        # not at step 0, which was validated before the clock started
        if not last and step and config.val_loss_every and step % config.val_loss_every == 0:
            seconds = clock.pause()
            if profiler:
                profiler.end(step, "validation follows")
            validate(recurrence)
            clock.resume()
        if last:
            break
        scale = lr_scale(step, clock.elapsed_seconds, config) * context.lr_factor(step)
        if profiler:
            profiler.before(step, recurrence=recurrence)
        momentum = muon_momentum(step, config)
        batch_loss = training_step(
            optimizers, loss_of, loader, recurrence, scale, momentum, length=context.length, packed=packed
        )
        step += 1
        log.step = step
        with record_function("average"):
            if ema:
                ema.update()
            if swa:
                swa.update(step, scale)
        stop = clock.tick()
        if profiler:
            profiler.after(step)
        if step <= FIRST_LOGGED_STEPS or step % config.train_log_every == 0 or stop or step == config.iterations:
            loss = log_step(log, config, ranks, step, batch_loss, clock, scale, folder.checkpoint)
            shown = f", loss {loss:.4f}"
            if not rose and step <= FIRST_LOGGED_STEPS and loss > first.val_loss + SHOCK_NATS:
                rose = True
                log.line("training: the loss rises in the first steps: this is normal at a high learning rate")
        graph = recurrence, context.length
        speed.count(graph)
        bar.advance(1, lambda: f"{speed.text(bar.rate, graph)}{shown}")  # noqa: B023
        if config.checkpoint_every and step % config.checkpoint_every == 0 and not stop:
            seconds = clock.pause()
            if profiler:
                profiler.end(step, "a checkpoint follows")
            check_finite(model, batch_loss, ranks, step, folder.checkpoint)
            save_checkpoint(folder.checkpoint, parts, ranks, Reached(step, seconds, vars(first), ranks.world_size))
            clock.resume()
    seconds = clock.pause()
    if profiler:
        profiler.finish(step)
    bar.close()
    if speed.steps:
        log.line(f"training: {speed.of_run(seconds - seconds_before)}")
    if stop:
        log.stopping_early(step, config.iterations, seconds * 1000)
        if config.warmdown_by == "steps" and step < config.iterations:
            log.line(f"training: {stopped_early(step, config.iterations)}")
    if ranks.device.type == "cuda":
        log.peak_memory(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    # give the model the averaged weights. Like #198, do not use SWA if it has added the weights of one step only.
    average = ema or (swa if swa and swa.count > 1 else None)
    if average:
        average.apply()
    check_finite(model, torch.zeros((), device=ranks.device), ranks, step, folder.checkpoint)
    # call all operators again, so that quantization computes the same numbers in this process as in a later process
    write_out(model, frozenset())
    return TrainResult(model, step, seconds, recurrence, first, validate(recurrence))


def training_step(
    optimizers: Optimizers,
    loss_of: Callable[..., Tensor],
    loader: BatchSource,
    recurrence: bool,
    scale: float,
    momentum: float,
    *,
    length: int | None = None,
    packed: bool = False,
) -> Tensor:
    """Compute the gradients of this rank's micro-batches, and step the optimizers.

    With `length`, the consecutive tokens of each micro-batch are divided into sequences of this length. With `packed`
    they stay in one row, and each document is cut to this length.

    Returns:
        The mean loss of the micro-batches, a scalar on the device.
    """
    losses = []
    batches = join_micro_batches(loader.next_batch())
    for inputs, targets in batches:
        if length and not packed:
            inputs, targets = inputs.view(-1, length), targets.view(-1, length)
        with record_function("forward"):
            options = {"longest": length} if packed else {}
            loss = loss_of(inputs, targets, recurrence=recurrence, **options)
        with record_function("backward"):
            (loss / len(batches)).backward()
        losses.append(loss.detach())
    with record_function("optimizers"):
        optimizers.step(scale, momentum)
    optimizers.zero_grad()
    return torch.stack(losses).mean()


def warm_up(
    model: GPT,
    optimizers: Optimizers,
    loss_of: Callable[..., Tensor],
    loader: Loader,
    config: Config,
    log: RunLogger,
) -> None:
    """Run warm-up steps with every graph of the model, then restore the weights and reset the optimizers.

    The warm-up compiles all graphs: with and without recurrence, and for each length of the sequences. So no
    compilation counts as training time.
    """
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    graphs, packed = training_graphs(config), config.loader == "packed"
    total = config.warmup_steps * len(graphs)
    compiling = (
        ", each graph compiles first, which may take minutes" if compiles(config, model.embedding.weight.device) else ""
    )
    log.line(f"warm-up: {counted(total, 'step')}, not counted as training time{compiling}")
    note = f" ({config.warmup_steps} without recurrence, {config.warmup_steps} with it)" if len(graphs) > 1 else ""
    if len(config.seq_lengths) > 1:
        note = f" ({config.warmup_steps} with each of {len(graphs)} graphs)"
    for number in range(total):
        recurrence, length = graphs[number // config.warmup_steps]
        training_step(optimizers, loss_of, loader, recurrence, 1.0, 0.0, length=length, packed=packed)
        if number < FIRST_LOGGED_STEPS or number + 1 == total:
            log.warmup_step(number + 1, total, note)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])
    optimizers.reset()


class Speed:
    """Computes the tokens per second and, on a known GPU, the model FLOPs utilization (MFU) of training."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        graphs = [(flag, length) for flag in (False, True) for length, _ in config.seq_lengths]
        self.mflop = {
            (flag, length): mflop_per_token(config, recurrence=flag, length=length) for flag, length in graphs
        }
        self.peak = datasheet_tflops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self.steps, self.mflop_of_steps = 0, 0.0

    def count(self, graph: tuple[bool, int]) -> None:
        """Count a finished step. `graph` is the pair (whether recurrence was on, length of the sequences)."""
        self.steps += 1
        self.mflop_of_steps += self.mflop[graph]

    def text(self, steps_per_second: float, graph: tuple[bool, int]) -> str:
        """Describe the speed at `steps_per_second`. For `graph` see `count`."""
        return self._text(steps_per_second * self.config.train_batch_tokens, self.mflop[graph])

    def of_run(self, seconds: float) -> str:
        """Describe the counted steps, which took `seconds`, and their mean speed."""
        tokens = self.steps * self.config.train_batch_tokens / max(seconds, 1e-9)
        speed = self._text(tokens, self.mflop_of_steps / self.steps)
        return f"{counted(self.steps, 'step')} in {duration(seconds)}, {speed}"

    def _text(self, tokens: float, mflop: float) -> str:
        text = f"{tokens:,.0f} tokens/s"
        if self.peak is None:
            return text
        reached = tokens * mflop / 1e6 / self.ranks.world_size
        return f"{text}, MFU {100 * reached / self.peak:.1f} % of {self.peak:,.0f} TFLOP/s"


def log_step(
    log: RunLogger,
    config: Config,
    ranks: Ranks,
    step: int,
    loss: Tensor,
    clock: WallClock,
    scale: float,
    checkpoint: Path,
) -> float:
    """Log the mean training loss of all ranks, and return it.

    Raises:
        UserError: the mean loss is infinite or not a number.
    """
    mean = float(ranks.sum(loss.float())) / ranks.world_size
    # the sum has waited for the step, so reading the clock costs no further wait
    log.train_step(step, config.iterations, mean, clock.read() * 1000, lr_scale=scale)
    if not math.isfinite(mean):
        raise diverged(f"the loss is {mean}", step, checkpoint)
    return mean


@torch.no_grad()
def check_finite(model: GPT, loss: Tensor, ranks: Ranks, step: int, checkpoint: Path) -> None:
    """Raise a UserError on every rank if a weight, or the loss of a rank, is infinite or not a number."""
    largest = torch.nn.utils.get_total_norm(list(model.parameters()), math.inf)
    values = ranks.sum(torch.stack([largest.float(), loss.float()])).tolist()
    for name, value in zip(("largest weight", "loss"), values, strict=True):
        if not math.isfinite(value):
            raise diverged(f"the {name} is {value}", step, checkpoint)


def diverged(what: str, step: int, checkpoint: Path) -> UserError:
    kept = f" ({checkpoint} of an earlier step is kept)" if checkpoint.exists() else ""
    return UserError(
        f"training diverged: {what} at step {step}{kept}: lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR, or set "
        "GRAD_CLIP_NORM"
    )
