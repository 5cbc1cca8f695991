"""`python -m benchmarks`: compute a step's time or compile without a GPU, or make tables and plots of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train.common.progress import announce

if __name__ == "__main__":
    announce("python -m benchmarks: loading PyTorch")

from benchmarks import aot
from benchmarks.computed import fake_cuda
from benchmarks.report import tables as report
from benchmarks.report.results import RESULTS, ResultsError, read_results, relative
from train.common.errors import main_guard

EPILOG = """examples:
  python -m benchmarks schedule --recipe sp8192_sdclip   ms/step by kernel, computed without a GPU
  python -m benchmarks aot --arch 80,90       compile every kernel for these GPUs, without one, and check it
  python -m benchmarks report                 write the newest results to docs/benchmarks.md and benchmarks/plots/

Single benchmarks: python -m benchmarks.bench_step, bench_newton_schulz, bench_leaky_relu2_mlp, … (each has --help);
python -m golf_kernels tune measures which kernels to use on this GPU.
"""


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, epilog=EPILOG, formatter_class=formatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    verbs = parser.add_subparsers(dest="verb", required=True)
    reporting = verbs.add_parser(
        "report", help="write the tables and plots of docs/benchmarks.md from the newest results"
    )
    reporting.add_argument("--page", type=Path, default=report.PAGE)
    reporting.add_argument("--plots", type=Path, default=RESULTS.parent / "plots")
    verbs.add_parser(
        "schedule", add_help=False, help="list the kernels of a training step with computed times; needs no GPU"
    )
    verbs.add_parser("aot", add_help=False, help="compile every kernel and check the machine code; needs no GPU")
    arguments, rest = parser.parse_known_args()
    if arguments.verb == "aot":
        return aot.main(rest)
    if arguments.verb == "schedule":
        return fake_cuda.run_module("benchmarks.computed.step_schedule", rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        measurements = read_results(arguments.results)
        changed = report.write(measurements, arguments.page, arguments.plots)
        print(f"written: {', '.join(map(relative, changed)) or 'nothing (everything is up to date)'}")
    except (ResultsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    main_guard(main)
