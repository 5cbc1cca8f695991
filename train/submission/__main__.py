"""`python -m train.submission`: from finished runs to a record that stands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from train.command_line import note_unread
from train.common.errors import main_guard
from train.common.wording import counted
from train.run.folder import RunFolder
from train.submission.record import TRACKS

# each command imports its own parts, so that none waits for another's libraries


def _record(arguments: argparse.Namespace) -> int:
    from train.submission.record import summarize, write_record
    from train.submission.summary import summary_text

    options = {name: getattr(arguments, name) for name in ("author", "github_id", "name", "blurb", "track")}
    folder = RunFolder(arguments.run_folder)
    # no other artifact may take the place of the one that is told of, and no file that of another record's
    with folder.held(shared=True), folder.writing():
        note_unread(folder.read_config(), os.environ, lambda line: print(line, file=sys.stderr))
        # gathered anew, so that a stage done again alone is in the record
        summary = summarize(folder)
        summary.write(folder.summary)
        paths = write_record(folder.path, summary, **options)
    print(summary_text(summary, folder.path))
    submission = json.loads((folder.path / "submission.json").read_text())
    for key, remedy in (("author", "--author NAME"), ("github_id", "--github-id NAME")):
        if not submission[key]:
            print(f"note: {key} is empty in submission.json: give {remedy}")
    print(f"wrote {', '.join(path.name for path in paths)}")
    return 0


def _code(arguments: argparse.Namespace) -> int:
    from train.single_file.pack import form_bytes

    for form, size in form_bytes(arguments.recipe).items():
        print(f"{form:<9} {size:>9,} bytes")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from train.submission.record_scores import find_scores
    from train.submission.statistics import comparison_text

    print(comparison_text(find_scores(arguments.a), find_scores(arguments.b)))
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from train.submission.build import RecordDetails, build_record
    from train.submission.check import apply_rules, exit_code, summary_lines
    from train.submission.record import git_setting
    from train.submission.record_folder import read_record_folder
    from train.submission.record_scores import find_base

    author = git_setting("user.name") if arguments.author is None else arguments.author
    github_id = git_setting("github.user") if arguments.github_id is None else arguments.github_id
    details = RecordDetails(author, github_id, arguments.name or "", arguments.blurb or "", arguments.track)
    base = find_base(arguments.base) if arguments.base else None
    proof = build_record(arguments.runs, arguments.out, details, single_file=arguments.single_file or "", base=base)
    size = json.loads((arguments.out / "submission.json").read_text())["bytes_code"]
    print(f"{arguments.out}: {', '.join(sorted(path.name for path in arguments.out.iterdir()))}")
    print(f"code: {size:,} bytes; {proof}")
    findings = apply_rules(read_record_folder(arguments.out))
    print("\n".join(summary_lines(findings)))
    return exit_code(findings)


def _check(arguments: argparse.Namespace) -> int:
    from train.submission.check import apply_rules, check_text, exit_code
    from train.submission.record_folder import read_record_folder

    findings = apply_rules(read_record_folder(arguments.folder))
    print(check_text(findings))
    return exit_code(findings)


def _dashboard(arguments: argparse.Namespace) -> int:
    from train.submission.dashboard import write_dashboard

    out = arguments.out or arguments.runs[0] / "dashboard.html"
    runs, problems = write_dashboard(arguments.runs, out)
    print(f"{out}: {out.stat().st_size:,} bytes, {counted(len(runs), 'run')}: {', '.join(run['id'] for run in runs)}")
    for problem in problems:
        print(f"not shown: {problem}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.submission",
        description="Turn finished runs into records, and apply_rules them.",
        epilog="examples:\n  python -m train.submission record runs/quickstart_20260101-120000\n"
        "  python -m train.submission compare records/mine 1019\n\n"
        "`python -m train.submission COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help: str, description: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=f"example:\n  python -m train.submission {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    record = command(
        "record",
        "write submission.json, README.md and plots into a run's folder",
        "Write (again) submission.json, README.md, loss.png, bpb.png and size_budget.png into the folder of a finished run, "
        "from what its stages left there.",
        'record runs/quickstart_20260101-120000 --author "Ada Lovelace" --github-id ada',
    )
    record.add_argument("run_folder", metavar="RUN", type=Path, help="run folder of python -m train")
    _add_author(record)
    record.set_defaults(run=_record)

    build = command(
        "build",
        "a complete record folder from one run per seed",
        "Write README.md, submission.json, logs, requirements.txt and train_gpt.py of a record, and say which rules it breaks. "
        "The script is scored on a CPU, from an empty folder, against the package before the folder appears. Exit code 1 if the "
        "folder is made but fails a rule, as `check` would have it; 2 if there is none.",
        "build runs/seed1 runs/seed2 runs/seed3 --out records/mine --single-file wrapped --base 1019",
    )
    build.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="finished run folder of python -m train, one per seed"
    )
    build.add_argument("--out", type=Path, required=True, help="the record folder to make")
    build.add_argument(
        "--single-file",
        nargs="?",
        const="wrapped",
        choices=("plain", "wrapped", "raw"),
        help="all code in one train_gpt.py, in this form [wrapped]; without the option the modules stand beside it",
    )
    build.add_argument("--base", help="recipe, run, record or published record to compare with [the recipe]")
    _add_author(build)
    build.set_defaults(run=_build)

    code = command(
        "code",
        "what the code of a recipe costs in each form",
        "Pack the modules that a run of a recipe imports into one train_gpt.py, plain, and minified and compressed to text or bytes, "
        "and count its bytes.",
        "code sp8192_sdclip",
    )
    code.add_argument("recipe", metavar="RECIPE", help="a name in train/recipes")
    code.set_defaults(run=_code)

    compare = command(
        "compare",
        "is A better than B, and by the 0.005 nats that a record needs?",
        "Welch's test between the seeds of two records, in all three readings of 0.005 nats. A and B are a record's folder, "
        "its submission.json, or a published record (122, 549, 1019, 1392, 1471). Exit code 0 if they were compared, "
        "also where A is not better; 2 if they cannot be: scored on different texts, fewer than two seeds, no scores.",
        "compare records/mine 1019",
    )
    compare.add_argument("a", metavar="A", help="the new record")
    compare.add_argument("b", metavar="B", help="the one it wants to beat")
    compare.set_defaults(run=_compare)

    check = command(
        "check",
        "apply_rules a record folder, ours or another's, by the rules",
        "Each rule as a line: verdict, rule, what was found, limit. Exit code 0 if none fails, 1 if one does. What the "
        "README, the json and the logs do not show is said, not guessed.",
        "check records/mine",
    )
    check.add_argument(
        "folder", metavar="FOLDER", type=Path, help="README.md, submission.json, logs and script of a record"
    )
    check.set_defaults(run=_check)

    dashboard = command(
        "dashboard",
        "one page over all runs of a folder",
        "Write one HTML file that needs no network: curves, speed, bytes against the limit, seeds side by side, filter and sort, "
        "light and dark.",
        "dashboard runs --out runs.html",
    )
    dashboard.add_argument("runs", metavar="RUNS", type=Path, nargs="+", help="folder of run folders, or run folders")
    dashboard.add_argument("--out", type=Path, help="the file to write [RUNS/dashboard.html]")
    dashboard.set_defaults(run=_dashboard)
    return parser


def _add_author(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--author", help="who submits [git config user.name]")
    parser.add_argument("--github-id", help="their GitHub name [git config github.user]")
    parser.add_argument("--name", help="title of the submission [the recipe's name]")
    parser.add_argument("--blurb", help="one sentence about it [one made of the numbers]")
    parser.add_argument(
        "--track", choices=TRACKS, default="non-record-16mb", help="track it is meant for [%(default)s]"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    main_guard(main)
