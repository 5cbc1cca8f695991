"""Attacks golf_kernels and train for some minutes, and counts the cases that held and broke.

    make attack MINUTES=20
    PYTHONPATH=.:tests:tests/helpers python -m attack --only artifact --case 17

Each campaign runs in processes of its own: a crash or a hang costs one case, and is reported. The exit code is 1 if a case broke.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import FrameType
from typing import NoReturn

import torch
from attack.campaign import Broke, Campaign, told
from attack.files import Artifacts, Checkpoints, Records, RunFiles, Shards
from attack.inputs import Settings, Texts
from attack.kills import Kills
from attack.native import Native

CAMPAIGNS: tuple[type[Campaign], ...] = (
    Artifacts, RunFiles, Checkpoints, Shards, Records, Settings, Texts, Kills, Native,
)  # fmt: skip
# a case takes at most a few seconds; a busy machine needs more
PATIENCE_S = 120
# beyond what a process has when it begins: artifacts and texts of these sizes need far less
MEMORY = 2 << 30


@dataclass
class Count:
    """The cases of one campaign so far."""

    tried: int = 0
    seconds: float = 0.0
    broken: dict[int, str] = field(default_factory=dict)


def work(campaign: type[Campaign], first: int, last: int | None, seconds: float, pipe: Connection) -> None:
    """Try cases from `first` on. Sends the number of each before it begins, and (number, what broke or "") after it."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    # what a case prints past the redirection, such as the lines of a child, is not the report's
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    root = Path(tempfile.mkdtemp(prefix="golf_attack_"))
    try:
        (root / "base").mkdir()
        tries = campaign(root / "base")
        # data, not address space, which the heaps of a library's threads reserve without using it
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
        signal.signal(signal.SIGALRM, _too_slow)
        begin, number = time.monotonic(), first
        while number != last and (last is not None or time.monotonic() - begin < seconds):
            pipe.send(number)
            pipe.send((number, _one(tries, number, root / "case")))
            number += 1
    except Exception as error:
        pipe.send((first, f"the campaign cannot begin: {told(error)}"))
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _one(campaign: Campaign, number: int, folder: Path) -> str:
    """Try one case. Returns what broke, or an empty text."""
    folder.mkdir()
    before = Path.cwd()
    signal.alarm(PATIENCE_S // 2)
    try:
        campaign.tried = ""
        campaign.attack(Random(f"{campaign.name} {number}"), folder)
        return ""
    except Broke as broke:
        return f"{campaign.tried}: {broke}"
    except Exception as error:
        return f"{campaign.tried}: {told(error)}"
    finally:
        signal.alarm(0)
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def _too_slow(_: int, __: FrameType | None) -> NoReturn:
    raise Broke(f"took longer than {PATIENCE_S // 2} s")


def run(campaign: type[Campaign], first: int, last: int | None, seconds: float) -> Count:
    """Try cases in worker processes. A worker that dies or hangs is replaced by one that begins with the next case."""
    count, begin = Count(), time.monotonic()
    fork = multiprocessing.get_context("fork")
    while first != last and (last is not None or time.monotonic() - begin < seconds):
        receive, send = fork.Pipe(duplex=False)
        worker = fork.Process(target=work, args=(campaign, first, last, seconds - (time.monotonic() - begin), send))
        worker.start()
        send.close()
        begun = None
        for number, what in _reports(receive):
            begun = number if what is None else None
            if what is None:
                continue
            count.tried += 1
            first = number + 1
            if what:
                count.broken[number] = what
        worker.join(5)
        hung = worker.is_alive()
        if hung:
            os.killpg(worker.pid or 0, signal.SIGKILL)
            worker.join()
        if begun is None and (worker.exitcode == 0 or count.broken):
            break
        ended = f"did not end in {PATIENCE_S} s" if hung else f"ended the process (exit code {worker.exitcode})"
        count.tried += 1
        count.broken[begun if begun is not None else first] = ended
        if begun is None:
            break
        first = begun + 1
    count.seconds = time.monotonic() - begin
    return count


def _reports(pipe: Connection) -> Iterator[tuple[int, str | None]]:
    """Yield (number, None) when a case begins and (number, what broke) when it ends, until the worker says no more."""
    try:
        while pipe.poll(PATIENCE_S):
            message = pipe.recv()
            yield message if isinstance(message, tuple) else (message, None)
    except EOFError:
        pass


def table(counts: dict[str, Count]) -> str:
    lines = ["| campaign | what a case tries | what must hold | tried | held | broke |", "|---|---|---|--:|--:|--:|"]
    for campaign in CAMPAIGNS:
        if (count := counts.get(campaign.name)) is not None:
            broke = len(count.broken)
            lines.append(
                f"| {campaign.name} | {campaign.tries} | {campaign.promise} | {count.tried:,} | {count.tried - broke:,} | {broke:,} |"
            )
    tried, broke = (sum(n) for n in zip(*((c.tried, len(c.broken)) for c in counts.values()), strict=True))
    return "\n".join([*lines, f"| all | | | {tried:,} | {tried - broke:,} | {broke:,} |"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m attack", description="Attack this package and count what held.")
    names = [campaign.name for campaign in CAMPAIGNS]
    parser.add_argument("--minutes", type=float, default=5.0, help="time for all campaigns together (default 5)")
    parser.add_argument("--cases", type=int, metavar="N", help="try the first N cases of each campaign instead")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--case", type=int, metavar="NUMBER", help="repeat one case")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="begin with this case (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file, too")
    given = parser.parse_args()
    first = given.first if given.case is None else given.case
    cases = 1 if given.case is not None else given.cases
    counts: dict[str, Count] = {}
    for campaign in CAMPAIGNS:
        if campaign.name in given.only:
            share = given.minutes * 60 / len(given.only)
            limit = f"{share:.0f} s" if cases is None else f"{cases} cases"
            print(f"{campaign.name}: {campaign.tries}, {limit}", file=sys.stderr, flush=True)
            counts[campaign.name] = run(campaign, first, None if cases is None else first + cases, share)
    print(table(counts))
    for name, count in counts.items():
        for number, what in count.broken.items():
            print(f"\n{name} {number} (repeat: --only {name} --case {number}): {what}")
    if given.json:
        given.json.write_text(json.dumps({name: vars(count) for name, count in counts.items()}, indent=1) + "\n")
    return int(any(count.broken for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
