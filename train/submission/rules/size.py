"""Rules on size: the sum of code, model and paid prefix may have at most 16,000,000 bytes."""

from __future__ import annotations

from train.common.wording import counted
from train.submission.digits import is_number
from train.submission.record_folder import RecordFolder, SeedResult, stated
from train.submission.rules.finding import Finding, fails, note, note_unless, passes, unknown

CAP_BYTES = 16_000_000
_LIMIT = "code and model have at most 16,000,000 bytes"


def cap(record: RecordFolder) -> Finding:
    """Check that the total size of each seed is at most 16,000,000 bytes.

    The record's files may state different totals for one seed. The record breaks the rule only if all of them are too
    large.
    """
    rule = "total size"
    readings = {result.seed: _totals(record, result) for result in record.results}
    whole = stated_total(record)
    if whole is not None:
        readings["submission.json"] = {"submission.json": whole}
    readings = {name: found for name, found in readings.items() if found}
    if not readings:
        return unknown(rule, "no total in submission.json or in a log", _LIMIT)
    # judge the largest seed by the smallest of its totals
    name = max(readings, key=lambda seed: min(readings[seed].values()))
    source, least = min(readings[name].items(), key=lambda item: item[1])
    where = source if name == "submission.json" else f"seed {name}, {source}"
    left = CAP_BYTES - int(least)
    value = f"{int(least):,} ({where}), {abs(left):,} {'left' if left >= 0 else 'too many'}"
    if left < 0:
        return fails(rule, value, _LIMIT)
    over = [
        f"seed {seed}: {int(size):,} with {source}"
        for seed, found in readings.items()
        for source, size in found.items()
        if size > CAP_BYTES
    ]
    return note(rule, f"{value}; but {over[0]}", _LIMIT) if over else passes(rule, value, _LIMIT)


def code(record: RecordFolder) -> Finding:
    """Find the code that has the size `bytes_code`: the script with its modules, the script alone, or the code in a log."""
    rule = "bytes_code is the size of the code"
    given = record.claims.number("bytes_code")
    logged = sorted({size for log in record.logs for name, size in log.log["sizes"].items() if name.startswith("code")})
    in_logs = f"; logged: {', '.join(f'{size:,}' for size in logged)}" if logged else ""
    shipped = {name: record.files.sizes[name] for name in record.sources}
    total = sum(shipped.values())
    helpers = [f"{name} {size:,}" for name, size in shipped.items() if name != record.script]
    beside = f"; files that the script uses: {', '.join(helpers[:4])}" if helpers else ""
    if given is None:
        return note(rule, f"no bytes_code in submission.json{in_logs}{beside}")
    if not shipped:
        known = given in logged
        return (passes if known else unknown)(rule, f"{int(given):,} in submission.json{in_logs}, no script")
    if given == total:
        return passes(rule, f"{int(given):,}{in_logs if logged != [given] else ''}")
    if given == record.files.sizes[record.script]:
        return note(rule, f"{int(given):,} is {record.script} alone{beside}")
    kinds = {size: name for log in record.logs for name, size in log.log["sizes"].items() if name.startswith("code")}
    if given in kinds:
        what = {"code_compressed": "compressed code", "code_uncompressed": "uncompressed code"}.get(
            kinds[int(given)], "code"
        )
        return note(rule, f"{int(given):,} is the {what} of the log; the folder has {total:,}{beside}")
    return note(rule, f"{int(given):,} in submission.json, {total:,} in the folder{in_logs}{beside}")


def parts(record: RecordFolder) -> Finding:
    """Check that the total is the sum of model, paid prefix and code, so that the record ships no other bytes."""
    rule = "total = model + code"
    number = record.claims.number
    prefix = int(number("bytes_paid_prefix") or 0)
    sums: list[tuple[str, float | None, float | None, set[float]]] = []
    for result in record.results:
        if result.log:
            sizes = result.log.log["sizes"]
            sums.append((result.log.name, sizes.get("total"), sizes.get("model"), _codes(record, result)))
        claimed = result.claimed
        sums.append(
            (
                f"seed {result.seed}",
                claimed.get("artifact_bytes"),
                result.numbers.get("bytes_model"),
                _codes(record, result),
            )
        )
    codes = {value for value in (number("bytes_code"),) if value is not None}
    sums.append(("submission.json", stated_total(record), number("bytes_model"), codes))
    known, wrong = 0, []
    for source, total, model, options in sums:
        if total is None or model is None or not options:
            continue
        known += 1
        if total == model:
            wrong.append(f"{source}: artifact_bytes {int(total):,} is the model alone")
        elif not any(total == model + prefix + size for size in options):
            size = min(options, key=lambda size: abs(total - model - prefix - size))
            difference = int(total - model - prefix - size)
            wrong.append(f"{source}: {int(total):,} is {difference:+,} from {int(model) + prefix:,} + {int(size):,}")
    if not known:
        return unknown(rule, "no model size in submission.json or in a log")
    return note_unless(not wrong, rule, "; ".join(wrong) or f"checked in {counted(known, 'place')}")


def stated_total(record: RecordFolder) -> float | None:
    """Return the total size in bytes that submission.json states for the whole record."""
    total = record.claims.values.get("bytes_total")
    return total if is_number(total) else record.claims.number("artifact_bytes")


def _codes(record: RecordFolder, result: SeedResult) -> set[float]:
    """All sizes of the code in bytes: in the log, in submission.json, and of the shipped files."""
    sizes = result.log.log["sizes"] if result.log else {}
    found: set[float] = {size for name, size in sizes.items() if name.startswith("code")}
    found |= {value for value in (record.claims.number("bytes_code"), result.claimed.get("bytes_code")) if value}
    return found | ({float(sum(record.files.sizes[name] for name in record.sources))} if record.script else set())


def _totals(record: RecordFolder, result: SeedResult) -> dict[str, float]:
    """All total sizes of a seed that its log and submission.json state or imply: source → bytes."""
    sizes = result.log.log["sizes"] if result.log else {}
    found: dict[str, float] = {}
    model = sizes.get("model")
    if "total" in sizes:
        found["logged total"] = sizes["total"]
    if model is not None:
        given = stated(result.claimed, "bytes_code") or record.claims.number("bytes_code")
        found |= {"bytes_code of submission.json": model + given} if given else {}
        shipped = sum(record.files.sizes[name] for name in record.sources)
        found |= {"the code in the folder": model + shipped} if shipped else {}
        found |= {
            f"{name.replace('_', ' ')} of the log": model + size
            for name, size in sizes.items()
            if name.startswith("code_")
        }
    claimed = result.claimed.get("artifact_bytes")
    # use the claim only without a log, because artifact_bytes may be the size of the model alone
    return found or ({"submission.json": claimed} if claimed is not None else {})
