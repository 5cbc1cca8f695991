"""`python -m train.submission` makes records of finished runs, checks records and compares them."""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from train.command_line import note_unread
from train.common.argument_types import add_command
from train.common.errors import UserError, main_guard
from train.common.progress import announce
from train.common.wording import counted
from train.run.folder import RunFolder, find_run

if TYPE_CHECKING:
    from train.submission.record import RecordDetails

_A_RUN = "run folder, or its name in runs/ (or RUNS_DIR)"

# each command imports only what it needs, because importing PyTorch, SciPy or Plotly takes seconds


def _record(arguments: argparse.Namespace) -> int:
    from train.submission.record import summarize, write_record
    from train.submission.summary import summary_text

    folder, details = RunFolder(arguments.run_folder), _details(arguments)
    # the locks keep other processes from replacing the artifact or writing another record meanwhile
    with folder.held(shared=True), folder.writing():
        note_unread(folder.read_config(), os.environ, lambda line: print(line, file=sys.stderr))
        # make the summary again: the user may have repeated stages since the run wrote it
        summary = summarize(folder)
        paths = write_record(folder, summary, details)
    print(summary_text(summary, folder.path))
    for key, option in (("author", "--author NAME"), ("github_id", "--github-id NAME")):
        if not getattr(details, key):
            print(f"note: {key} is empty in submission.json: give {option}")
    print(f"wrote {', '.join(path.name for path in paths)}")
    return 0


def _code(arguments: argparse.Namespace) -> int:
    from train.single_file.pack import form_bytes

    for form, size in form_bytes(arguments.recipe).items():
        print(f"{form:<9} {size:>9,} bytes")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from train.submission.bases import find_scores
    from train.submission.statistics import compare

    found = compare(find_scores(arguments.a), find_scores(arguments.b))
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found.text())
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from train.submission.bases import find_base
    from train.submission.build import build_record
    from train.submission.check import apply_rules, exit_code
    from train.submission.record_folder import read_record_folder
    from train.submission.report import summary_lines

    base, out = find_base(arguments.base) if arguments.base else None, arguments.out
    proof = build_record(arguments.runs, out, _details(arguments), single_file=arguments.single_file, base=base)
    record = read_record_folder(out)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    print(f"code: {record.claims.values['bytes_code']:,} bytes. {proof}")
    findings = apply_rules(record)
    print("\n".join(summary_lines(findings)))
    return exit_code(findings)


def _check(arguments: argparse.Namespace) -> int:
    from train.submission.check import apply_rules, exit_code
    from train.submission.record_folder import found_folders, is_record, read_record_folder
    from train.submission.report import screen, table, to_dict

    # an unreadable record must not prevent the check of the other records
    checked, code, several = [], 0, False
    folders = [folder for given in arguments.folder for folder in found_folders(given, is_record) or [given]]
    for folder in folders:
        try:
            record = read_record_folder(folder)
        except UserError as error:
            if len(folders) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            code = 1
            continue
        findings = apply_rules(record)
        code = max(code, exit_code(findings, strict=arguments.strict))
        if not arguments.json:
            print("\n" * several + screen(record, findings))
        several = True
        checked.append((record, findings))
    if arguments.json:
        print(json.dumps([to_dict(*pair) for pair in checked], indent=1))
    elif len(checked) > 1:
        print(f"\n{table(checked)}")
    return code


def _dashboard(arguments: argparse.Namespace) -> int:
    from train.submission.dashboard import default_out, write_dashboard
    from train.submission.report import printable

    out = arguments.out or default_out(arguments.folders)
    rows, problems = write_dashboard(arguments.folders, out)
    names = list(dict.fromkeys(row["id"] for row in rows))
    print(f"{out}: {out.stat().st_size:,} bytes, {counted(len(rows), 'run')}: {printable(', '.join(names))}")
    for problem in problems:
        print(f"not shown: {printable(problem)}")
    return 0


def _details(arguments: argparse.Namespace) -> RecordDetails:
    from train.submission.record import RecordDetails

    given = {name: getattr(arguments, name) for name in ("author", "github_id", "name", "blurb", "track")}
    return RecordDetails(**{name: value for name, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.submission",
        description="Make records of finished runs, check and compare records.",
        epilog="examples:\n  python -m train.submission record runs/quickstart_20260101-120000\n"
        "  python -m train.submission compare records/mine 1019\n\n"
        "`python -m train.submission COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = functools.partial(add_command, commands, parser.prog)
    one = command(
        "record",
        "write a run's submission.json, README.md and plots",
        'runs/quickstart_20260101-120000 --author "Ada Lovelace" --github-id ada',
        _record,
        "The plots are loss.png, bpb.png and size_budget.png. The files that are there are replaced.",
    )
    one.add_argument("run_folder", metavar="RUN", type=find_run, help=_A_RUN)
    _add_details(one)

    one = command(
        "build",
        "make a record folder from one run per seed",
        "runs/seed1 runs/seed2 runs/seed3 --out records/mine --single-file wrapped --base 1019",
        _build,
        "It has README.md, submission.json, logs, requirements.txt and train_gpt.py. Before the folder appears, "
        "the script must score the artifact exactly as this package does, on a CPU and from an empty folder. Then the record is "
        "checked. Exit code: 0 if it passes, 1 if it fails a rule, 2 if no folder was made.",
    )
    one.add_argument("runs", metavar="RUN", type=find_run, nargs="+", help=f"one finished run per seed: {_A_RUN}")
    one.add_argument("--out", type=Path, required=True, help="the record folder to make")
    one.add_argument(
        "--single-file",
        nargs="?",
        const="wrapped",
        default="",
        choices=("plain", "wrapped", "raw"),
        help="pack all code into train_gpt.py, in this form [wrapped]; default: train_gpt.py beside its modules",
    )
    one.add_argument("--base", help="recipe, run, record or published record to compare with [the recipe]")
    _add_details(one)

    one = command(
        "code",
        "print the size of a recipe's code in each form",
        "sp8192_sdclip",
        _code,
        "The code is one train_gpt.py with the modules that the recipe uses.",
    )
    one.add_argument("recipe", metavar="RECIPE", help="a name in train/recipes")

    one = command(
        "compare",
        "test whether record A is better than B, and by the 0.005 nats that a new record needs",
        "records/mine 1019",
        _compare,
        "The test is Welch's t-test on the seeds, or a one-sample t-test if B is one number. A and B are record folders, submission.json files, or published records "
        "(122, 549, 1019, 1392, 1471); B may be a val_bpb, such as 1.2193657. Exit code: 0 if they were compared, even if A is "
        "not better; 2 if they cannot be: different texts, fewer than two seeds of A, no scores.",
    )
    one.add_argument("a", metavar="A", help="the new record")
    one.add_argument("b", metavar="B", help="the record or the val_bpb to beat")
    one.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    one = command(
        "check",
        "check record folders against the rules",
        "records/mine",
        _check,
        "Print a screen per record: the score and where it was read, size, clock, evaluation, seeds, and what the record "
        "breaks, what cannot be seen, and notes. Several records get a table at the end. Works on anyone's record folders, "
        "which are only read. Exit code: 0 if no rule is broken, 1 if one is.",
    )
    one.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        nargs="+",
        help="record folder, with README.md, submission.json, logs and script; or a folder of record folders",
    )
    one.add_argument("--strict", action="store_true", help="exit with 1 on notes, too")
    one.add_argument("--json", action="store_true", help="print a JSON list with one object per record instead of text")

    one = command(
        "dashboard",
        "make an HTML page of runs and records",
        "runs records --out runs.html",
        _dashboard,
        "The page is one file, which needs no network: leaderboard, curves, step times, sizes, and scores before quantization, "
        "after it and after test-time training, of runs and of anyone's record folders. Record folders are only read.",
    )
    one.add_argument(
        "folders",
        metavar="FOLDER",
        type=Path,
        nargs="+",
        help="run folders, record folders, or folders that contain them",
    )
    one.add_argument(
        "--out", type=Path, help="the file to write [dashboard.html in the first folder with runs, or here]"
    )
    return parser


def _add_details(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--author", help="who submits [git config user.name]")
    parser.add_argument("--github-id", help="their GitHub name [git config github.user]")
    parser.add_argument("--name", help="title of the record [the recipe's name]")
    parser.add_argument("--blurb", help="one sentence about it [made from the numbers]")
    parser.add_argument(
        "--track", choices=("10min_16mb", "non-record-16mb"), help="track of the record [non-record-16mb]"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # files of other authors may contain characters that the terminal cannot encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    announce(f"python -m train.submission {arguments.command}: loading libraries")
    return int(arguments.run(arguments))


if __name__ == "__main__":
    main_guard(main)
