"""Rules on size: code, model and any paid prefix together may have at most 16,000,000 bytes."""

from __future__ import annotations

from train.common.wording import counted
from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, fails, pass_if, passes, unknown

CAP_BYTES = 16_000_000


def cap(record: RecordFolder) -> Finding:
    rule, limit = "total size", f"{CAP_BYTES:,} bytes"
    totals: dict[str, float | None] = {
        f"seed {seed}": result.get("artifact_bytes") for seed, result in record.seed_results.items()
    }
    totals["submission.json"] = record.number("bytes_total")
    for log in record.logs:
        sizes = log.log["sizes"]
        # the shipped script may have another size than the code that ran
        shipped = record.number("bytes_code") or sizes.get("code")
        known = "model" in sizes and shipped is not None
        totals[log.path.name] = sizes["model"] + shipped if known and shipped else sizes.get("total")
    stated = {source: int(size) for source, size in totals.items() if size is not None}
    if not stated:
        return unknown(rule, "no total in submission.json or in a log", limit)
    source, largest = max(stated.items(), key=lambda item: item[1])
    left = CAP_BYTES - largest
    return pass_if(
        left >= 0, rule, f"{largest:,} ({source}), {abs(left):,} {'left' if left >= 0 else 'too many'}", limit
    )


def code(record: RecordFolder) -> Finding:
    rule = "bytes_code is the size of the script"
    stated = record.number("bytes_code", "code_bytes")
    logged = sorted({log.log["sizes"]["code"] for log in record.logs if "code" in log.log["sizes"]})
    in_logs = f"; logged: {', '.join(f'{size:,}' for size in logged)}" if logged else ""
    if stated is None:
        return fails(rule, f"no bytes_code in submission.json{in_logs}")
    if record.script is None:
        if not logged:
            return unknown(rule, f"{stated:,} in submission.json, but neither script nor logged size")
        return pass_if(stated in logged, rule, f"{stated:,} in submission.json{in_logs}")
    shipped = sum(path.stat().st_size for path in (record.script, *record.package))
    if shipped != stated:
        return fails(rule, f"{stated:,} in submission.json, {shipped:,} in the folder")
    return passes(rule, f"{shipped:,}{in_logs if logged != [stated] else ''}")


def parts(record: RecordFolder) -> Finding:
    """Check that model, paid prefix and code add up to the total, so that no other bytes are shipped."""
    rule = "total = model + code"
    prefix = int(record.number("bytes_paid_prefix") or 0)
    # source → total, model without prefix, code
    sums: dict[str, tuple[float | None, float | None, float | None]] = {}
    for seed in record.seeds:
        result = record.result(seed)
        total = record.seed_results.get(seed, {}).get("artifact_bytes", result.get("artifact_bytes"))
        code_bytes = record.number("bytes_code") or result.get("bytes_code")
        sums[f"seed {seed}"] = total, result.get("bytes_model"), code_bytes
    for log in record.logs:
        sizes = log.log["sizes"]
        sums[log.path.name] = sizes.get("total"), sizes.get("model"), sizes.get("code")
    number = record.number
    sums["submission.json"] = number("bytes_total"), number("bytes_model"), number("bytes_code")
    known, wrong = 0, []
    for source, (total, model, code_bytes) in sums.items():
        if total is None or model is None or code_bytes is None:
            continue
        known += 1
        difference = int(total) - int(model) - prefix - int(code_bytes)
        if difference:
            wrong.append(
                f"{source}: {int(total):,} is {difference:+,} from {int(model) + prefix:,} + {int(code_bytes):,}"
            )
    if not known:
        return unknown(rule, "no model size in submission.json or in a log")
    return pass_if(not wrong, rule, "; ".join(wrong) or f"checked in {counted(known, 'place')}")
