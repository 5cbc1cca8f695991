"""What a record folder must hold, how many seeds it needs, and on what and how it was run."""

from __future__ import annotations

import ast
import base64
import bz2
import lzma
import re
import zlib

from train.common.wording import counted
from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, pass_if, passes, unknown

KEYS = (
    "author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "val_bpb_std", "seeds", "seed_results",
    "bytes_total", "bytes_code", "hardware",
)  # fmt: skip
SEEDS = 3
_H100 = r"\b8\s*[x×]\s*(?:NVIDIA\s+)?H100"
# variables that are for the launcher and the libraries, not for the script
_FOREIGN_VARIABLES = re.compile(
    r"^(NCCL|CUDA|OMP|MKL|TORCH|TORCHINDUCTOR|PYTORCH|PYTHON|HF|TRITON|MASTER|WORLD|RANK|LOCAL|LD|XDG)(_|$)|^(PATH|NPROC|HOME)$"
)


def files(record: RecordFolder) -> Finding:
    missing = [name for name in ("README.md", "submission.json") if not (record.path / name).is_file()]
    missing += [] if record.logs else ["a training log"]
    missing += [] if record.script else ["train_gpt.py"]
    if record.problem:
        missing.append(f"a readable submission.json ({record.problem})")
    value = (
        f"missing: {', '.join(missing)}"
        if missing
        else f"README.md, submission.json, {counted(len(record.logs), 'log')}, script"
    )
    return pass_if("the files of a record", not missing, value)


def keys(record: RecordFolder) -> Finding:
    rule = "the 14 common keys of submission.json"
    if not record.submission:
        return unknown(rule, "no submission.json")
    missing = [key for key in KEYS if record.submission.get(key) in (None, "", [], {})]
    return pass_if(rule, not missing, f"missing or empty: {', '.join(missing)}" if missing else "all there")


def seeds(record: RecordFolder) -> Finding:
    found = record.seeds
    named = record.submission.get("seeds")
    if isinstance(named, list) and found and sorted(map(str, named)) != sorted(found):
        value = f"json names {', '.join(map(str, named))}; scores are there of {', '.join(found)}"
        return pass_if("seeds", False, value, f"at least {SEEDS}")
    value = f"{len(found)}: {', '.join(found)}" if found else "none with a score"
    return pass_if("seeds", len(found) >= SEEDS, value, f"at least {SEEDS}")


def hardware(record: RecordFolder) -> Finding:
    rule, limit = "hardware", "8 × H100 SXM"
    stated = str(record.submission.get("hardware") or "")
    if not stated:
        found = re.search(rf"{_H100}[\w ]*", record.readme, re.IGNORECASE)
        stated = found[0].strip() if found else ""
    if not stated:
        return unknown(rule, "named neither in submission.json nor in README.md", limit)
    good = re.search(_H100, stated, re.IGNORECASE) and "pcie" not in stated.lower()
    return pass_if(rule, bool(good), stated, limit)


def command(record: RecordFolder) -> Finding:
    """The variables that the README sets must be ones that the script reads, or the command reproduces another run."""
    rule = "README's command sets variables that the script reads"
    blocks = re.findall(r"```(?:bash|sh|shell)?\n(.*?)```|^((?: {4}.*\n)+)", record.readme, re.DOTALL | re.MULTILINE)
    text = "\n".join(part for block in blocks for part in block)
    variables = sorted(
        {name for name in re.findall(r"(?:^|[\s;])([A-Z][A-Z0-9_]+)=", text) if not _FOREIGN_VARIABLES.search(name)}
    )
    if not variables:
        return unknown(rule, "no command with variables in README.md")
    if record.script is None:
        return unknown(rule, f"{counted(len(variables), 'variable')}, but no script")
    sources = [record.script, *record.package]
    source = "\n".join(unwrapped(path.read_bytes()) for path in sources)
    if not source:
        return unknown(rule, f"{counted(len(variables), 'variable')}, but the script is compressed in an unknown way")
    # a settings dataclass has the name in lower case
    ignored = [name for name in variables if not re.search(rf"\b({name}|{name.lower()})\b", source)]
    if ignored:
        return pass_if(rule, False, f"ignored: {', '.join(ignored)}")
    return passes(rule, f"all {len(variables)}")


def unwrapped(source: bytes) -> str:
    """A script as it is, or what it unpacks from its one long string and runs; empty where that cannot be told.

    Nothing is executed.
    """
    text = source.decode(errors="replace")
    try:
        values = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    except (SyntaxError, ValueError):
        return text
    long = (value for value in values if isinstance(value, (str, bytes)) and 2 * len(value) > len(text))
    packed = next(long, None)
    if packed is None or not re.search("b85decode|decompress", text):
        return text
    data = packed if isinstance(packed, bytes) else packed.encode("latin-1", errors="replace")
    for unpack in (base64.b85decode, bytes):
        for decompress in (bz2.decompress, _brotli, lzma.decompress, _raw_lzma, zlib.decompress):
            try:
                return decompress(unpack(data)).decode(errors="replace")
            except (ImportError, OSError, ValueError, lzma.LZMAError, zlib.error):
                continue
    return ""


def _brotli(data: bytes) -> bytes:
    import brotli

    try:
        return bytes(brotli.decompress(data))
    except brotli.error as error:
        raise ValueError("not brotli") from error


def _raw_lzma(data: bytes) -> bytes:
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
