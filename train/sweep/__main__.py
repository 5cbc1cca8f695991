"""`python -m train.sweep` trains a recipe with many values of some settings, and with several seeds per combination."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from train.common.errors import UserError, main_guard
from train.common.wording import counted
from train.sweep.plan import Plan, make_plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.sweep",
        description="Train a recipe at many points of its settings, with several seeds each. The sweep's folder is "
        "runs/RUN_ID; it holds an ordinary run folder for each run, and the table and plot sweep.txt, sweep.json and "
        "sweep.png. After a kill, type the same command again: finished runs are kept, an interrupted one is resumed. "
        "All other flags are settings of python -m train, for all runs.",
        epilog="examples:\n"
        "  python -m train.sweep --recipe quickstart --set matrix_lr=0.02,0.04 --set mlp_mult=3,4 --seeds 3\n"
        "  python -m train.sweep --set matrix_lr=0.01..0.1:log --sampler tpe --trials 20 --jobs 8 --gpus 0-7\n\n"
        "It needs Optuna, and --launcher slurm needs submitit: pip install 'golf-kernels[sweep]'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUES",
        help="a setting to vary: values A,B,C, or a range LOW..HIGH or LOW..HIGH:log; may be repeated",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="runs of each point, with seeds SEED, SEED + 1, … [1]")
    parser.add_argument(
        "--sampler",
        choices=("grid", "random", "tpe"),
        default="grid",
        help="how points are chosen [grid: all combinations]",
    )
    parser.add_argument("--trials", type=int, default=0, help="points that random or tpe choose; may be raised later")
    parser.add_argument("--jobs", type=int, default=0, help="runs at the same time [as many as --gpus allows, or 1]")
    parser.add_argument("--gpus", default="", help="GPUs to use, such as 0-7 or 0,2 [those that a run sees]")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of each run, with a GPU each, by torchrun [1]"
    )
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local",
        help="slurm: start --jobs workers by submitit; on a machine without Slurm, as local processes",
    )  # fmt: skip
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="NAME=VALUE",
        help="a parameter of submitit, such as slurm_partition=gpu, gpus_per_node=1 or timeout_min=600; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")
    return parser


def read_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan, list[str]]:
    """Read the command line. Return the arguments, the checked plan, and the GPUs of each job."""
    arguments, flags = _parser().parse_known_args(argv)
    plan = make_plan(flags, arguments.set, arguments.seeds, arguments.sampler, arguments.trials, os.environ)
    # start at most as many jobs as runs, because further jobs would have nothing to do
    groups = _gpu_groups(arguments.gpus, arguments.jobs, arguments.processes, plan.total * len(plan.seeds))
    return arguments, plan, groups


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep and print its table. Return the exit code: 1 if no point finished, else 0."""
    arguments, plan, groups = read_arguments(argv)
    # imported after the check of the settings, because importing Optuna and Matplotlib takes seconds
    from train.common import hardware
    from train.common.distributed import Ranks
    from train.data.dataset import prepare_data
    from train.sweep.report import report, table, write_report
    from train.sweep.work import open_study, points

    shared = len(groups) > 1 and not arguments.gpus and arguments.launcher == "local"
    if shared and plan.config.device != "cpu" and hardware.auto_device() == "cuda":
        raise UserError(
            f"--jobs: {len(groups)} runs would share GPU 0: give each its own, such as --gpus 0-{len(groups) - 1}"
        )
    if not {"recipe", "data_path"} & plan.varied.keys():
        # build the dataset before the first runs start: each of them would build it
        prepare_data(plan.config, Ranks())
    study = open_study(plan)
    print(
        f"{plan.folder}: {counted(plan.total, 'point')} with {counted(len(plan.seeds), 'seed')}, {counted(len(groups), 'job')}",
        file=sys.stderr,
    )
    try:
        if arguments.launcher == "slurm":
            from train.sweep.slurm import run_jobs

            run_jobs(plan, len(groups), arguments.processes, arguments.slurm)
        else:
            _run_here(plan, groups, arguments.processes)
    finally:
        found = points(plan, study)
        write_report(plan, found)
    print(json.dumps(report(plan, found), indent=1) if arguments.json else table(plan, found))
    return int(not any(point["state"] == "finished" for point in found))


def _run_here(plan: Plan, groups: list[str], processes: int) -> None:
    from train.sweep.work import work

    stop = threading.Event()
    with ThreadPoolExecutor(len(groups)) as pool:
        workers = [pool.submit(work, plan, processes, gpus, stop) for gpus in groups]
        try:
            for ended in wait(workers, return_when=FIRST_EXCEPTION).done:
                ended.result()
        finally:
            stop.set()


def _gpu_groups(text: str, jobs: int, processes: int, most: int) -> list[str]:
    """Divide the GPUs in `text` among at most `most` jobs, such as ["0,1", "2,3"]. Without GPUs, each job gets ""."""
    gpus: list[int] = []
    for item in text.split(",") if text else ():
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", item)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise UserError(f"--gpus: expected numbers such as 0-7 or 0,2, got {text!r}")
        gpus += range(first, last + 1)
    if jobs < 0 or processes < 1:
        raise UserError(f"--jobs, --processes: expected at least 1, got {jobs} and {processes}")
    if not gpus:
        return [""] * min(jobs or 1, most)
    jobs = jobs or len(gpus) // processes
    if not jobs or jobs * processes > len(gpus) or len(set(gpus)) < len(gpus):
        raise UserError(
            f"--gpus: {jobs or 1} × {processes} processes need {(jobs or 1) * processes} different GPUs, got {text!r}"
        )
    return [",".join(map(str, gpus[job * processes : (job + 1) * processes])) for job in range(min(jobs, most))]


if __name__ == "__main__":
    main_guard(main)
