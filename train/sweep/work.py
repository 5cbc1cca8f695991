"""Trains the runs of a sweep.

Any number of workers may share the runs, on all machines that share the sweep's folder.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from train.command_line import resolve
from train.common.errors import UserError
from train.common.files import open_lock, read_file
from train.run.folder import RunFolder, changed_settings
from train.submission.summary import Summary
from train.sweep.plan import Plan, Point, Values, point_text
from train.sweep.report import write_report

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# exit codes of a run that was stopped from outside; such a run has not failed and will be resumed
_INTERRUPTED = {code for number in _SIGNALS for code in (-number, 128 + number)}


@dataclass(frozen=True)
class Claim:
    """A run that this worker trains. While the file `lock` is open, no other worker trains this run."""

    number: int
    seed: int
    point: Point
    lock: BinaryIO


def open_study(plan: Plan) -> optuna.Study:
    """Open the sweep's Optuna study, or create it.

    Raises:
        UserError: the folder holds another sweep, or its journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = plan.folder / "sweep.journal"
    if RunFolder(plan.folder).config.exists():
        raise UserError(f"{plan.folder}: is the folder of a run: choose another --run_id for the sweep")
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(plan):
            if journal.exists():
                _drop_torn_line(journal)
            storage = JournalStorage(JournalFileBackend(str(journal)))
            study = optuna.create_study(storage=storage, study_name="sweep", direction="minimize", load_if_exists=True)
            known = study.user_attrs.get("plan")
            if known is None:
                study.set_user_attr("plan", plan.identity)
        changed = _changed(known, plan.identity) if known is not None else []
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{journal}: not readable ({error}): delete it and start again; finished runs of the same settings are kept"
        ) from error
    if changed:
        raise UserError(
            f"{plan.folder}: holds a sweep with other {', '.join(changed)}: type the same command, or choose another --run_id"
        )
    return study


def _drop_torn_line(journal: Path) -> None:
    """Remove an incomplete last line, which a full disk or a kill left in Optuna's journal.

    Optuna would append to this line and could not read the journal any more.
    """
    data = read_file(journal)
    if not data.endswith(b"\n"):
        os.truncate(journal, data.rfind(b"\n") + 1)


def _changed(known: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Return the names of the parts that differ between two values of `Plan.identity`."""
    changed = [name for name in identity if known[name] != identity[name]]
    if "settings" in changed:
        old, new = known["settings"], identity["settings"]
        differ = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
        changed[changed.index("settings")] = f"settings ({', '.join(sorted(differ))})"
    return changed


def work(plan: Plan, processes: int, gpus: str, stop: threading.Event) -> None:
    """Train the sweep's runs, one after another, until all runs are done or `stop` is set.

    While other workers train the last runs, this worker waits. If one of them is killed, this worker resumes its run.

    Args:
        plan: the sweep.
        processes: number of processes of each run.
        gpus: numbers of the GPUs that this worker's runs may use, separated by commas; empty: all GPUs.
        stop: event that ends this worker and its run.

    Raises:
        UserError: a run was interrupted.
    """
    study = open_study(plan)
    while not stop.is_set():
        claim, done = _claim(plan, study)
        if done:
            return
        if claim is None:
            stop.wait(1.0)
            continue
        run = plan.run(claim.number, claim.seed)
        place = f"{run.path.name}: {point_text(claim.point)}"
        print(f"{place}: training begins; its output is in {_output(run)}", file=sys.stderr, flush=True)
        with claim.lock:
            code = _train(plan, claim, processes, gpus, stop)
        score = _score(plan, claim.number, claim.seed, claim.point)
        if score is not None:
            result = f"val_bpb {score:.8f}"
        elif code in _INTERRUPTED or stop.is_set():
            raise UserError(f"{run.path.name}: interrupted: type the same command to continue")
        else:
            error = _error_line(_output(run).read_text(errors="replace").splitlines())
            with _locked(plan):
                _fail(study, claim.number, f"{run.path.name}: {error}")
            result = f"failed: {error}"
        print(f"{place}: {result}", file=sys.stderr, flush=True)
        with _locked(plan):
            write_report(plan, points(plan, study))


def points(plan: Plan, study: optuna.Study) -> list[dict[str, Any]]:
    """Return the points that were started so far: number, settings, state, and val_bpb per seed."""
    found = []
    states = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed"}
    for trial in study.get_trials(deepcopy=False):
        scores = {str(seed): _score(plan, trial.number, seed, trial.params) for seed in plan.seeds}
        known = {seed: score for seed, score in scores.items() if score is not None and math.isfinite(score)}
        found.append(
            {
                "number": trial.number,
                "settings": dict(trial.params),
                "state": states.get(trial.state, "not finished"),
                "val_bpb": known,
                "mean": statistics.fmean(known.values()) if known else None,
                "std": statistics.stdev(known.values()) if len(known) > 1 else None,
                "error": study.user_attrs.get(f"error {trial.number}"),
            }
        )
    return found


def _claim(plan: Plan, study: optuna.Study) -> tuple[Claim | None, bool]:
    """Claim the next run that no worker trains. Return it, or None, and whether all runs are done.

    A point whose runs have all finished gets its mean score in the study.
    """
    with _locked(plan):
        trials = study.get_trials(deepcopy=False)
        done = len(trials) >= plan.total
        for trial in trials:
            if trial.state != TrialState.RUNNING:
                continue
            scores = [_score(plan, trial.number, seed, trial.params) for seed in plan.seeds]
            known = [score for score in scores if score is not None]
            if len(known) < len(scores):
                done = False
            elif all(map(math.isfinite, known)):
                study.tell(trial.number, statistics.fmean(known))
            else:
                _fail(study, trial.number, "val_bpb is not a number")
            for seed, score in zip(plan.seeds, scores, strict=True):
                lock = _try_lock(plan, trial.number, seed) if score is None else None
                if lock:
                    return Claim(trial.number, seed, trial.params, lock), False
        if len(trials) < plan.total:
            # add the trial with its settings in one write, so that a kill leaves no trial without settings
            trial = _next_trial(plan, trials)
            study.add_trial(trial)
            lock = _try_lock(plan, len(trials), plan.seeds[0])
            return Claim(len(trials), plan.seeds[0], trial.params, lock) if lock else None, False
    return None, done


def _next_trial(plan: Plan, trials: list[FrozenTrial]) -> FrozenTrial:
    distributions = {name: _distribution(values) for name, values in plan.varied.items()}
    if plan.sampler == "grid":
        params: dict[str, Any] = dict(plan.grid()[len(trials)])
    else:
        # each trial has a seed of its own, so "random" draws the same points with any number of workers and after a
        # kill. The points of "tpe" also depend on the scores that are known when a point is drawn.
        seed = plan.config.seed + len(trials)
        sampler = TPESampler(seed=seed, constant_liar=True) if plan.sampler == "tpe" else RandomSampler(seed=seed)
        drawn = optuna.create_study(sampler=sampler)
        drawn.add_trials(trials)
        params = drawn.ask(distributions).params
    return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)


def _distribution(values: Values) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution(values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _fail(study: optuna.Study, number: int, error: str) -> None:
    study.set_user_attr(f"error {number}", error)
    study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _score(plan: Plan, number: int, seed: int, point: Point) -> float | None:
    """Return the val_bpb of a run, or None if it has not finished with these settings."""
    run = plan.run(number, seed)
    if not run.summary.exists():
        return None
    config, _ = resolve(plan.run_flags(number, seed, point), os.environ)
    return None if changed_settings(run.read_config(), config) else Summary.read(run.summary).val_bpb


def _train(plan: Plan, claim: Claim, processes: int, gpus: str, stop: threading.Event) -> int:
    """Train or resume a run. Return its exit code. Its output goes to a file beside the run folder."""
    program = ["golf", "run", f"--processes={processes}"] if processes > 1 else ["train"]
    command = [sys.executable, "-m", *program, *plan.run_flags(claim.number, claim.seed, claim.point)]
    # setpriv ends the run when this worker ends, even if the worker is killed
    ending = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    # keep python from importing files of the current folder instead of the trainer
    python_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": python_path}
    if gpus:
        environ["CUDA_VISIBLE_DEVICES"] = gpus
    with open(_output(plan.run(claim.number, claim.seed)), "ab") as file:
        # the run inherits the lock, so that no worker starts it a second time before it has ended
        process = subprocess.Popen(
            [*ending, *command], env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=[claim.lock.fileno()]
        )  # fmt: skip
    while True:
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if stop.is_set():
                process.terminate()


def _error_line(lines: list[str]) -> str:
    """Return the line of a run's output that says why the run failed."""
    said = [line for line in lines if line.startswith("error: ")]
    # take the first exception, because torchrun's last exception only reports that a process failed
    raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    last = [line for line in lines if line.strip()]
    return [*said[-1:], *raised[:1], *last[-1:], "no output"][0].removeprefix("error: ")


def _output(run: RunFolder) -> Path:
    return run.path.with_name(f"{run.path.name}.txt")


@contextmanager
def _locked(plan: Plan) -> Iterator[None]:
    with open_lock(plan.folder / ".sweep.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(plan: Plan, number: int, seed: int) -> BinaryIO | None:
    run = plan.run(number, seed)
    file = open_lock(run.path.with_name(f".{run.path.name}.lock"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
