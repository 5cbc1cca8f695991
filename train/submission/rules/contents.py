"""Rules on the contents of a record folder: its files and keys, the number of seeds, the hardware and the command."""

from __future__ import annotations

import ast
import base64
import bz2
import lzma
import re
import zlib

from train.common.wording import counted
from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, fails, pass_if, unknown

KEYS = (
    "author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "val_bpb_std", "seeds", "seed_results",
    "bytes_total", "bytes_code", "hardware",
)  # fmt: skip
SEEDS = 3
_H100 = r"\b8\s*[x×]\s*(?:NVIDIA\s+)?H100"
# variables that the launcher and the libraries read, not the script
_LAUNCHER_VARIABLES = re.compile(
    r"^(NCCL|CUDA|OMP|MKL|TORCH|TORCHINDUCTOR|PYTORCH|PYTHON|HF|TRITON|MASTER|WORLD|RANK|LOCAL|LD|XDG)(_|$)|^(PATH|NPROC|HOME)$"
)


def files(record: RecordFolder) -> Finding:
    missing = [name for name in ("README.md", "submission.json") if not (record.path / name).is_file()]
    missing += [] if record.logs else ["a training log"]
    missing += [] if record.script else ["train_gpt.py"]
    if record.problem:
        missing.append(f"a valid submission.json ({record.problem})")
    present = f"README.md, submission.json, {counted(len(record.logs), 'log')}, script"
    return pass_if(not missing, "required files", f"missing: {', '.join(missing)}" if missing else present)


def keys(record: RecordFolder) -> Finding:
    rule = "required keys of submission.json"
    if not record.submission:
        return unknown(rule, "no submission.json")
    missing = [key for key in KEYS if record.submission.get(key) in (None, "", [], {})]
    return pass_if(not missing, rule, f"missing or empty: {', '.join(missing)}" if missing else f"all {len(KEYS)}")


def seeds(record: RecordFolder) -> Finding:
    rule, limit, found = "seeds", f"at least {SEEDS}", record.seeds
    named = record.submission.get("seeds")
    if isinstance(named, list) and found and sorted(map(str, named)) != sorted(found):
        return fails(
            rule, f"submission.json names {', '.join(map(str, named))}, scores exist for {', '.join(found)}", limit
        )
    return pass_if(len(found) >= SEEDS, rule, f"{len(found)}: {', '.join(found)}" if found else "no scores", limit)


def hardware(record: RecordFolder) -> Finding:
    rule, limit = "hardware", "8 × H100 SXM"
    stated = str(record.submission.get("hardware") or "")
    if not stated:
        found = re.search(rf"{_H100}[\w ]*", record.readme, re.IGNORECASE)
        stated = found[0].strip() if found else ""
    if not stated:
        return unknown(rule, "not named in submission.json or README.md", limit)
    good = re.search(_H100, stated, re.IGNORECASE) and "pcie" not in stated.lower()
    return pass_if(bool(good), rule, stated, limit)


def command(record: RecordFolder) -> Finding:
    """The script must read each variable that the README's command sets, or the command reproduces another run."""
    rule = "script reads the variables of README's command"
    blocks = re.findall(r"```(?:bash|sh|shell)?\n(.*?)```|^((?: {4}.*\n)+)", record.readme, re.DOTALL | re.MULTILINE)
    text = "\n".join(part for block in blocks for part in block)
    variables = sorted(
        {name for name in re.findall(r"(?:^|[\s;])([A-Z][A-Z0-9_]+)=", text) if not _LAUNCHER_VARIABLES.search(name)}
    )
    number = counted(len(variables), "variable")
    if not variables:
        return unknown(rule, "README.md has no command with variables")
    if record.script is None:
        return unknown(rule, f"{number}, but no script")
    source = "\n".join(unwrapped(path.read_bytes()) for path in [record.script, *record.package])
    if not source:
        return unknown(rule, f"{number}, but the script's compression is not recognized")
    # a settings dataclass has the name in lower case
    ignored = [name for name in variables if not re.search(rf"\b({name}|{name.lower()})\b", source)]
    return pass_if(not ignored, rule, f"ignored: {', '.join(ignored)}" if ignored else number)


def unwrapped(source: bytes) -> str:
    """Return the source that a script runs, without executing it.

    If most of the script is one compressed string, that string is unpacked; the result is "" if this fails.
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
