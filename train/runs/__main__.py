"""`python -m train.runs` lists runs, shows one, compares two, deletes runs, or opens the dashboard."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import webbrowser
from pathlib import Path

from train.common.argument_types import add_command
from train.common.errors import UserError, main_guard
from train.common.files import read_json
from train.common.wording import counted
from train.run.folder import RunFolder, default_runs_dir, find_run
from train.runs.read import find_folders, need_folder, read_run


def _list(arguments: argparse.Namespace) -> None:
    from train.runs.table import runs_table

    path = arguments.folder or default_runs_dir()
    folders, sweeps, others = find_folders(path)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(runs_table(folders, width) if folders else f"{path}: no run in it")
    for sweep in sweeps:
        print(f"sweep {sweep}: python -m train.runs list {path / sweep}")
    if others:
        print(f"folders without a config.json: {', '.join(others)}")


def _show(arguments: argparse.Namespace) -> None:
    from train.runs.table import run_page

    print(run_page(read_run(_find(arguments.name))))


def _compare(arguments: argparse.Namespace) -> None:
    from train.runs.compare import compare_runs

    a, b = _find(arguments.a), _find(arguments.b)
    picture = arguments.out or a.path.parent / f"{a.path.name}_vs_{b.path.name}.png"
    if not picture.parent.is_dir():
        raise UserError(f"--out: the folder {picture.parent} does not exist: create it first")
    print(compare_runs(read_run(a), read_run(b), picture))


def _remove(arguments: argparse.Namespace) -> None:
    folders = [_find(name) for name in arguments.names]
    for folder in folders:
        if not _is_run(folder):
            raise UserError(f"{folder.config}: no recipe in it, so {folder.path} is no run folder: delete it yourself")
        if folder.path.is_symlink():
            raise UserError(f"{folder.path}: is a link: delete the link and the folder that it names yourself")
        # lock the run, so that no process trains or scores it meanwhile
        with folder.held():
            sizes = [path.lstat().st_size for path in folder.path.rglob("*") if not path.is_dir()]
            question = f"delete {folder.path} ({counted(len(sizes), 'file')}, {sum(sizes):,} bytes)? [y/N] "
            if not arguments.yes and not _confirmed(question):
                print(f"kept {folder.path}")
                continue
            # rename the folder before deleting it: if this process is killed, no run with half of its files is left.
            # Resolve the path, because "." has no name.
            path = folder.path.resolve()
            gone = path.with_name(f".{path.name}.{os.getpid()}.part")
            os.rename(path, gone)
            shutil.rmtree(gone)
        print(f"deleted {folder.path}")


def _is_run(folder: RunFolder) -> bool:
    """Whether the folder is a run folder. A damaged config.json is allowed; another program's config.json is not."""
    try:
        return "recipe" in read_json(folder.config, "")
    except UserError:
        return not folder.config.is_dir()


def _open(arguments: argparse.Namespace) -> None:
    from train.submission.dashboard import write_dashboard

    folder = arguments.folder or default_runs_dir()
    need_folder(folder)
    out = folder / "dashboard.html"
    runs, problems = write_dashboard([folder], out)
    for problem in problems:
        print(f"not shown: {problem}")
    url = out.resolve().as_uri()
    print(f"{counted(len(runs), 'run')}: {url}" if webbrowser.open(url) else f"no browser found: open {url} in one")


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except (EOFError, UnicodeDecodeError):
        print()
        return False


def _find(name: str) -> RunFolder:
    folder = RunFolder(find_run(name))
    folder.need_run()
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.runs",
        description="List runs; without a command, those of runs/ (or RUNS_DIR).",
        epilog="examples:\n"
        "  python -m train.runs\n"
        "  python -m train.runs show mine\n"
        "  python -m train.runs compare mine seed42\n\n"
        "`python -m train.runs COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_list, folder=None)
    command = functools.partial(add_command, parser.add_subparsers(metavar="COMMAND"), parser.prog)
    a_run = "run folder, or its name in runs/ (or RUNS_DIR)"
    about = "print score, text, steps, seconds, bytes and what differs from the recipe"
    one = command("list", about, "runs/sweep", _list)
    one.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="folder with run folders [runs]")

    about = "print a run's numbers, the settings that differ from its recipe, and its files"
    one = command("show", about, "mine", _show)
    one.add_argument("name", metavar="RUN", help=a_run)

    about = "print what differs between two runs, and draw their curves into a PNG"
    one = command("compare", about, "mine seed42", _compare)
    one.add_argument("a", metavar="A", help=a_run)
    one.add_argument("b", metavar="B", help=a_run)
    one.add_argument("--out", type=Path, help="the PNG [A_vs_B.png beside A]")

    one = command("rm", "delete runs after a question; a run that a process uses is refused", "mine", _remove)
    one.add_argument("names", metavar="RUN", nargs="+", help=a_run)
    one.add_argument("--yes", action="store_true", help="do not ask")

    one = command("open", "write the dashboard of all runs and open it in a browser", "", _open)
    one.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="folder with run folders [runs]")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)
    return 0


if __name__ == "__main__":
    main_guard(main)
