"""Odd input: settings and texts."""

from __future__ import annotations

import gzip
import json
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import ClassVar

from attack.campaign import Broke, Campaign, command, refuses

from train.command_line import resolve
from train.config import Config
from train.data.__main__ import main as data
from train.data.shards import check_shard
from train.recipes import load_recipe

ODD_TEXTS = (
    "", " ", "0", "-1", "1", "2", "3", "-0", "+5", "1e3", "1e999", "-1e999", "nan", "NaN", "inf", "-inf", "1_000", "0x10", "1.5", "1,5", "1,,2",
    ",", "true", "False", "yes", "none", "None", "null", "[]", "{}", "é", "٣", "a\nb", "\x1b[31m", "%s", "{x}", "../..", "/", "/dev/zero", "~",
    "x" * 5000, "9" * 5000, "1" + "0" * 400, "2147483648", "-9223372036854775809", "0.1.2", "1 2", "--seed", "=", "a=b", "auto", "cuda:99", "meta",
)  # fmt: skip
RECIPES = ("quickstart", "baseline", "sp1024_bigram", "sp4096_recurrence", "sp8192_sdclip")


class Settings(Campaign):
    name: ClassVar[str] = "settings"
    tries: ClassVar[str] = "an odd value for one or two settings, as a flag or an environment variable"
    promise: ClassVar[str] = "refused in one line that names a setting, or accepted and the same after JSON"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.names = [field.name for field in fields(Config)]

    def attack(self, random: Random, folder: Path) -> None:
        flags, environ, chosen = [], {}, []
        for _ in range(random.choice([1, 1, 1, 2])):
            name, value = random.choice(self.names), random.choice(ODD_TEXTS)
            chosen.append(name)
            form = random.choice(["equals", "two", "dashes", "environment"])
            if form == "environment":
                environ[name.upper()] = value
            elif form == "two":
                flags += [f"--{name}", value]
            else:
                flags.append(f"--{name.replace('_', '-') if form == 'dashes' else name}={value}")
        recipe = random.choice(["", *known_recipes()])
        if recipe and "recipe" not in chosen:
            flags += ["--recipe", recipe]
        self.tried = f"{[text[:60] for text in flags]} { ({key: value[:60] for key, value in environ.items()}) }"
        found: list[Config] = []

        def read() -> None:
            found.append(resolve(flags, environ)[0])

        if refuses(read):
            return
        config = found[0]
        again = Config.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
        if again != config:
            raise Broke("other settings after JSON")


def known_recipes() -> list[str]:
    return [name for name in RECIPES if _exists(name)]


def _exists(name: str) -> bool:
    try:
        load_recipe(name)
    except Exception:
        return False
    return True


class Texts(Campaign):
    name: ClassVar[str] = "text"
    tries: ClassVar[str] = "a folder of odd texts (encodings, names, formats, sizes), then train.data text"
    promise: ClassVar[str] = "refused in one line with nothing left behind, or whole shards"

    def attack(self, random: Random, folder: Path) -> None:
        source, out = folder / "source", folder / "out"
        source.mkdir()
        whats = [odd_text(source, random) for _ in range(random.choice([1, 1, 2, 5]))]
        if random.random() < 0.6:
            (source / "plain.txt").write_text("Some words that a vocabulary can be made of, line by line.\n" * 400)
        self.tried = "; ".join(whats)
        vocabulary = random.choice([258, 300, 512])
        code = command(lambda: data() or 0, ["text", source, "--out", out, "--vocab", vocabulary])
        if code == 2 and (left := [path.name for path in folder.iterdir() if path != source]):
            raise Broke(f"refused, but left {left}")
        if code == 0:
            shards = sorted(out.glob("*.bin"))
            if len(shards) < 2 or not all(check_shard(path) for path in shards):
                raise Broke(f"shards: {[path.name for path in shards]}")


WORDS = (
    "the",
    "quick",
    "naïve",
    "日本語",
    "🙂",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\x00",
    "\x1b[0m",
    "\ue001",
    "a" * 3000,
    "\r",
    "\t",
    "<s>",
    "</s>",
    "▁",
)


def odd_text(folder: Path, random: Random) -> str:
    """Write one odd file, and say what it is."""
    text = "".join(
        random.choice(WORDS) + random.choice([" ", "\n", "", "\r\n"]) for _ in range(random.choice([0, 1, 30, 3000]))
    )
    encoding = random.choice(["utf-8", "utf-8", "utf-8", "utf-16", "utf-32", "utf-8-sig", "latin-1", "noise"])
    content = random.randbytes(len(text)) if encoding == "noise" else text.encode(encoding, "replace")
    suffix = random.choice(
        [
            ".txt",
            ".txt",
            ".py",
            ".md",
            ".jsonl",
            ".jsonl",
            "",
            ".gz",
            ".txt.gz",
            ".jsonl.xz",
            ".jsonl.zst",
            ".parquet",
            ".PY",
        ]
    )
    if ".jsonl" in suffix and random.random() < 0.7:
        values = [{"text": text}, {"text": 5}, {}, [], "x", None, {"text": ""}, {"text": "more words here " * 50}]
        lines = [json.dumps(random.choice(values)) for _ in range(random.choice([1, 3, 40]))]
        content = "\n".join(
            random.choice([line, line, "", "{"]) if random.random() < 0.2 else line for line in lines
        ).encode()
        encoding = "JSON lines"
    if suffix.endswith(".gz") and random.random() < 0.7:
        content = gzip.compress(content)[: random.choice([None, None, -5, 12])]
    name = (
        random.choice(["a", "é", "with space", "new\nline", "%s", "-x", ".hidden", "日本"])
        + str(random.randrange(1000))
        + suffix
    )
    (folder / name).write_bytes(content)
    return f"{name!r} ({encoding}, {len(content):,} bytes)"
