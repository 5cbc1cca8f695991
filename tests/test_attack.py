"""tests/attack: a short cut of each campaign, and a runner that counts what breaks, crashes and hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
from attack import __main__ as runner
from attack.campaign import Broke, Campaign, command, damage, damage_json, refuses

from train.common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "names", [["artifact", "run-files", "record", "settings"], ["checkpoint", "shards", "text", "kill", "native"]]
)
def test_the_first_cases_of_each_campaign_hold(names: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "attack", "--cases", "3", "--only", *names, "--json", tmp_path / "counts.json"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'helpers'}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert {name: count["tried"] for name, count in counts.items()} == dict.fromkeys(names, 3)


class Made(Campaign):
    """Cases of each outcome, in turn."""

    name: ClassVar[str] = "made"
    tries: ClassVar[str] = "each outcome"
    promise: ClassVar[str] = "nothing"

    def attack(self, random: Random, folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "left").touch()
        number = self.number = getattr(self, "number", -1) + 1
        self.tried = f"outcome {number}"
        if number == 1:
            raise Broke("as it was made")
        if number == 2:
            raise KeyError("not a user's error")
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class Hangs(Made):
    def attack(self, random: Random, folder: Path) -> None:
        time.sleep(60)


def test_what_breaks_or_crashes_is_counted_and_the_rest_goes_on() -> None:
    # the worker that follows a crash begins with outcome 0 again
    count = runner.run(Made, 0, 7, 0)
    assert count.tried == 7
    assert count.broken[1] == "outcome 1: as it was made"
    assert (
        count.broken[2].startswith("""outcome 2: KeyError: "'not a user's error'" at test_attack.py:""")
        or "KeyError" in count.broken[2]
    )
    assert count.broken[3] == "ended the process (exit code -9)"
    assert count.broken[5] == "outcome 1: as it was made" and set(count.broken) == {1, 2, 3, 5, 6}
    assert "| made |" not in runner.table({"artifact": count}) and "| 7 | 2 | 5 |" in runner.table({"artifact": count})


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PATIENCE_S", 2)
    assert runner.run(Hangs, 5, 6, 0).broken == {5: ": took longer than 1 s"}


def test_a_command_ends_in_one_line_or_breaks() -> None:
    def fails(error: Exception) -> int:
        raise error

    assert command(lambda: 0) == 0
    assert command(lambda: fails(UserError("x: expected y"))) == 2
    for broken in (lambda: 1, lambda: 2, lambda: fails(KeyError("x")), lambda: fails(MemoryError("no room"))):
        with pytest.raises(Broke):
            command(broken)
    assert refuses(lambda: fails(UserError("one line"))) and not refuses(lambda: None)
    with pytest.raises(Broke):
        refuses(lambda: fails(UserError("two\nlines")))


def test_damage_changes_something_of_every_kind() -> None:
    data, text = bytes(range(200)), '{"a": {"b": [1, 2]}, "c": "d", "crc32": "00"}'
    changed = [damage(data, Random(number)) for number in range(200)]
    assert len({what.split()[0] for _, what in changed}) == 10
    assert sum(found == data for found, _ in changed) < 20
    tables = [damage_json(text, Random(number))[0] for number in range(100)]
    assert len(set(tables)) > 50 and not any("crc32" in table for table in tables)
