"""Rules on a record folder's files, the keys of submission.json, the number of seeds, and README's command."""

from __future__ import annotations

import re

from train.common.wording import counted
from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, note, note_unless, pass_if, passes, unknown

KEYS = (
    "author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "val_bpb_std", "seeds", "seed_results",
    "bytes_total", "bytes_code", "hardware",
)  # fmt: skip
SEEDS = 3
_FILES_LIMIT = "a record has README.md, submission.json, a training log and the script"
_ASSIGNED = re.compile(r"(?:^|[\s;])([A-Z][A-Z0-9_]+)=")
# environment variables that the launcher or the libraries read; the script need not read them
_LAUNCHER_VARIABLES = re.compile(
    r"^(NCCL|CUDA|OMP|MKL|TORCH|TORCHINDUCTOR|PYTORCH|PYTHON|HF|TRITON|MASTER|WORLD|RANK|LOCAL|LD|XDG)(_|$)|^(PATH|NPROC|HOME)$"
)


def files(record: RecordFolder) -> Finding:
    rule = "required files"
    missing = [name for name in ("README.md", "submission.json") if name not in record.files.sizes]
    if record.claims.problem:
        missing.append(f"a valid submission.json ({record.claims.problem})")
    if not record.script:
        missing.append("train_gpt.py")
    if not record.logs and not record.unread:
        missing.append("a training log")
    if missing:
        return pass_if(False, rule, f"missing: {', '.join(missing)}", _FILES_LIMIT)
    if not record.logs:
        return unknown(rule, f"a log in an unknown form: {', '.join(record.unread)}", _FILES_LIMIT)
    return passes(
        rule, f"README.md, submission.json, {counted(len(record.logs), 'log')}, {record.script}", _FILES_LIMIT
    )


def other_logs(record: RecordFolder) -> Finding:
    """Note the logs that no seed's result uses: other seeds, copies, unknown formats, files that were not read."""
    rule = "each log counts once"
    found = [f"{name} does not count" for name in record.other_logs]
    found += list(record.copies)
    found += [f"{name}: a log in an unknown form" for name in record.unread]
    found += [f"{name} is not read" for name in record.files.skipped]
    more = f"; and {counted(len(found) - 8, 'other')}" if len(found) > 8 else ""
    return note_unless(not found, rule, "; ".join(found[:8]) + more or counted(len(record.logs), "log"))


def keys(record: RecordFolder) -> Finding:
    rule = "keys of submission.json"
    if not record.claims.values:
        return unknown(rule, "no submission.json")
    # one seed has no deviation; the rule `seeds` says how many there are
    needed = [key for key in KEYS if key != "val_bpb_std" or len(record.scores) != 1]
    missing = [key for key in needed if record.claims.values.get(key) in (None, "", [], {})]
    return note_unless(
        not missing, rule, f"missing or empty: {', '.join(missing)}" if missing else f"all {len(needed)}"
    )


def seeds(record: RecordFolder) -> Finding:
    rule, limit, found = "seeds", f"a record shows significance, usually by {SEEDS} seeds", list(record.scores)
    named = list(record.claims.seed_names)
    value = f"{len(found)}: {', '.join(found)}" if found else "no scores per seed"
    silent = [seed for seed in named if seed not in found]
    if silent and found:
        return note(rule, f"submission.json names {', '.join(named)}, scores exist for {', '.join(found)}", limit)
    if record.non_record and found:
        return passes(rule, f"{value}; the non-record track asks for no number")
    return note_unless(len(found) >= SEEDS, rule, value, limit)


def command(record: RecordFolder) -> Finding:
    """Check that the script reads each variable that README's command sets; otherwise the command gives another run."""
    rule = "script reads the variables of README's command"
    variables = sorted(name for name in training_variables(record.readme) if not _LAUNCHER_VARIABLES.search(name))
    number = counted(len(variables), "variable")
    if not variables:
        return unknown(rule, "README.md has no training command with variables")
    if not record.script:
        return unknown(rule, f"{number}, but no script")
    if not record.sources[record.script]:
        return unknown(rule, f"{number}, but the script's compression is not recognized")
    # a script with a settings dataclass has the variable's name in lower case
    words = {word for source in record.sources.values() for word in re.findall(r"\w+", source)}
    ignored = [name for name in variables if not {name, name.lower()} & words]
    return note_unless(not ignored, rule, f"ignored: {', '.join(ignored)}" if ignored else number)


def training_variables(readme: str) -> set[str]:
    """Return the variables that README's code blocks set for a training script, on its line or by `export` before."""
    blocks = re.findall(r"```[^\n]*\n(.*?)```|^((?: {4}[^\n]*\n)+)", readme, re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for block in blocks:
        exported: set[str] = set()
        for line in re.sub(r"\\[ \t\r]*\n", " ", "".join(block)).split("\n"):
            script = re.search(r"train\w{0,60}\.py\b", line)
            if line.strip().startswith("export "):
                exported |= set(_ASSIGNED.findall(line))
            elif script:
                found |= exported | set(_ASSIGNED.findall(line[: script.start()]))
    return found
