"""`python -m train.submission`: the record of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from train.errors import main_guard
from train.run import RunFolder
from train.submission.gather import summarize
from train.submission.record import TRACKS, write_record
from train.submission.summary import summary_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.submission",
        description="Turn finished runs into records.",
        epilog="example:\n  python -m train.submission record runs/quickstart_20260101-120000\n\n"
        "`python -m train.submission COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    record = commands.add_parser(
        "record",
        help="write submission.json, README.md and plots into a run's folder",
        description="Write (again) submission.json, README.md, loss.png, bpb.png and size_budget.png into the folder of a "
        "finished run, from what its stages left there.",
        epilog='example:\n  python -m train.submission record runs/quickstart_20260101-120000 --author "Ada Lovelace" --github-id ada',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    record.add_argument("run", metavar="RUN", type=Path, help="run folder of python -m train")
    record.add_argument("--author", help="who submits [git config user.name]")
    record.add_argument("--github-id", help="their GitHub name [git config github.user]")
    record.add_argument("--name", help="title of the submission [the recipe's name]")
    record.add_argument("--blurb", help="one sentence about it [one made of the numbers]")
    record.add_argument(
        "--track", choices=TRACKS, default="non-record-16mb", help="track it is meant for [%(default)s]"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    arguments = _parser().parse_args(argv)
    options = {name: getattr(arguments, name) for name in ("author", "github_id", "name", "blurb", "track")}
    folder = RunFolder(arguments.run)
    # gathered anew, so that a stage done again alone is in the record
    summary = summarize(folder)
    summary.write(folder.summary)
    paths = write_record(arguments.run, summary, **options)
    print(summary_text(summary, arguments.run))
    submission = json.loads((arguments.run / "submission.json").read_text())
    for key, remedy in (("author", "--author NAME"), ("github_id", "--github-id NAME")):
        if not submission[key]:
            print(f"note: {key} is empty in submission.json: give {remedy}")
    print(f"wrote {', '.join(path.name for path in paths)}")
    return 0


if __name__ == "__main__":
    main_guard(main)
