"""16,000,000 bytes, decimal, with everything that is shipped."""

from __future__ import annotations

from train.common.wording import counted
from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, fails, pass_if, passes, unknown

CAP_BYTES = 16_000_000


def cap(record: RecordFolder) -> Finding:
    rule, limit = "code and model together", f"{CAP_BYTES:,} bytes"
    totals: dict[str, float | None] = {
        f"seed {seed}": result.get("artifact_bytes") for seed, result in record.seed_results.items()
    }
    totals["submission.json"] = record.number("bytes_total")
    for log in record.logs:
        sizes = log.log["sizes"]
        # the shipped script may be another form of the sources that ran
        shipped = record.number("bytes_code") or sizes.get("code")
        if "model" in sizes and shipped is not None:
            totals[log.path.name] = sizes["model"] + shipped
        else:
            totals[log.path.name] = sizes.get("total")
    known = {source: int(size) for source, size in totals.items() if size is not None}
    if not known:
        return unknown(rule, "no total in submission.json or in a log", limit)
    source, largest = max(known.items(), key=lambda item: item[1])
    spare = CAP_BYTES - largest
    return pass_if(
        rule,
        spare >= 0,
        f"{largest:,} ({source}), {f'{spare:,} to spare' if spare >= 0 else f'{-spare:,} too many'}",
        limit,
    )


def code(record: RecordFolder) -> Finding:
    """The code that is counted must be the code that is shipped."""
    rule = "code that is counted"
    stated = record.number("bytes_code", "code_bytes")
    logged = sorted({log.log["sizes"]["code"] for log in record.logs if "code" in log.log["sizes"]})
    if stated is None:
        found = f", the logs say {', '.join(f'{size:,}' for size in logged)}" if logged else ""
        return fails(rule, f"no bytes_code in submission.json{found}")
    if record.script is None:
        if not logged:
            return unknown(rule, f"{stated:,} in submission.json, but neither script nor logged size")
        return pass_if(rule, stated in logged, f"{stated:,}; the logs say {', '.join(f'{size:,}' for size in logged)}")
    shipped = sum(path.stat().st_size for path in (record.script, *record.package))
    if shipped != stated:
        return fails(rule, f"{stated:,} in submission.json, {shipped:,} in the folder")
    other = [f"{size:,}" for size in logged if size != stated]
    return passes(rule, f"{shipped:,}" + (f"; the runs logged {', '.join(other)}" if other else ""))


def parts(record: RecordFolder) -> Finding:
    """total = model + code: what is more was shipped too, and must be named."""
    rule = "total = model + code"
    paid = int(record.number("bytes_paid_prefix") or 0)
    sums = []
    for seed in record.seeds:
        result = record.result(seed)
        total = record.seed_results.get(seed, {}).get("artifact_bytes", result.get("artifact_bytes"))
        code_bytes = record.number("bytes_code") or result.get("bytes_code")
        if total and "bytes_model" in result and code_bytes:
            sums.append((f"seed {seed}", int(total), int(result["bytes_model"]) + paid, int(code_bytes)))
    for log in record.logs:
        sizes = log.log["sizes"]
        if {"total", "model", "code"} <= set(sizes):
            sums.append((log.path.name, sizes["total"], sizes["model"] + paid, sizes["code"]))
    keys = ("bytes_total", "bytes_model", "bytes_code")
    top = [int(size) for key in keys if (size := record.number(key)) is not None]
    if len(top) == len(keys):
        sums.append(("submission.json", top[0], top[1] + paid, top[2]))
    if not sums:
        return unknown(rule, "model bytes are neither in submission.json nor in a log")
    wrong = [
        f"{name}: {total:,} is {total - model - code_bytes:+,} from {model:,} + {code_bytes:,}"
        for name, total, model, code_bytes in sums
        if total != model + code_bytes
    ]
    return pass_if(rule, not wrong, "; ".join(wrong) or f"in {counted(len(sums), 'place')}")
