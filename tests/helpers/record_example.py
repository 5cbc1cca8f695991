"""A record folder that keeps every rule of Parameter Golf.

The sizes, times and bits per byte are #1471's. The losses are computed from the bits per byte, with every token scored
once.
"""

import json
import math
import statistics
from pathlib import Path

from train.submission.check import apply_rules
from train.submission.record_folder import read_record_folder
from train.submission.rules.finding import Verdict

TOKENS, BYTES = 40_540_160, 151_078_222
CODE = 83_119
# seed → bits per byte, model bytes, steps, ms per step
RUNS = {
    "42": (1.08725556, 15_898_181, 4964, 118.86),
    "1337": (1.08655776, 15_895_751, 4972, 118.69),
    "2024": (1.08585085, 15_892_700, 4968, 118.78),
}
COMMAND = "SEED=42 MATRIX_LR=0.02 NCCL_DEBUG=WARN torchrun --standalone --nproc_per_node=8 train_gpt.py"

LOG = """import torch  # NOT COMPLIANT: what stands in the source says nothing of the run
{bar}
Running Python 3.12.3
Running PyTorch 2.11.0
nvidia-smi
{bar}
train_loader:dataset:data/fineweb10B_sp8192 train_shards:80
model_params:37022812
world_size:8 grad_accum_steps:1
seed:{seed}
step:0/20000 val_loss:9.0081 val_bpb:3.4873 train_time:0ms step_avg:0.00ms
step:{steps}/20000 train_loss:2.8000 train_time:{clock}ms step_avg:{average:.2f}ms
step:{steps}/20000 val_loss:2.8089 val_bpb:1.0874 train_time:{clock}ms step_avg:{average:.2f}ms
stopping_early: wallclock_cap train_time:{clock}ms step:{steps}/20000
gptq:calibrated 67 matrices on 64 training batches in {calibration}s
Serialized model: 137649029 bytes
Code size: {code} bytes
Serialized model int6+brotli: {model} bytes
Total submission size int6+brotli: {total} bytes
final_int6_roundtrip val_loss:{flat_loss:.4f} val_bpb:1.1041 eval_time:11000ms
final_int6_roundtrip_exact val_loss:{flat_loss:.8f} val_bpb:1.10409460
final_int6_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:64 eval_time:79200ms
final_int6_sliding_window_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""


def loss_of(bpb: float, tokens: int = TOKENS, size: int = BYTES) -> float:
    return round(bpb * math.log(2) * size / tokens, 8)


def log_text(seed: str, *, calibration: float = 9.5, tokens: int = TOKENS, size: int = BYTES, **changes: object) -> str:
    bpb, model, steps, average = RUNS[seed]
    values = {"seed": seed, "bpb": bpb, "model": model, "steps": steps, "average": average, "code": CODE}
    values |= {"total": model + CODE, "clock": round(steps * average), "calibration": calibration, "bar": "=" * 100}
    values |= {"loss": loss_of(bpb, tokens, size), "flat_loss": loss_of(1.1040946)}
    return LOG.format(**{**values, **changes})


def make_record(folder: Path) -> Path:
    """Write the record folder. A test then changes one thing in it."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        seed: {
            "val_loss": loss_of(bpb),
            "val_bpb": bpb,
            "artifact_bytes": model + CODE,
            "steps": steps,
            "step_avg_ms": average,
            "eval_time_s": 79.2,
        }
        for seed, (bpb, model, steps, average) in RUNS.items()
    }
    scores, losses = ([result[name] for result in results.values()] for name in ("val_bpb", "val_loss"))
    submission = {
        "author": "Ada",
        "github_id": "ada",
        "name": "A record",
        "blurb": "One sentence.",
        "date": "2026-05-01",
        "track": "10min_16mb",
        "val_loss": round(statistics.fmean(losses), 8),
        "val_bpb": round(statistics.fmean(scores), 8),
        "val_bpb_std": round(statistics.stdev(scores), 8),
        "seeds": [int(seed) for seed in RUNS],
        "seed_results": results,
        "bytes_total": max(result["artifact_bytes"] for result in results.values()),
        "bytes_code": CODE,
        "hardware": "8 × NVIDIA H100 80GB HBM3",
    }
    (folder / "submission.json").write_text(json.dumps(submission))
    rows = [
        f"| {seed} | {bpb:.8f} | {loss_of(bpb):.8f} | {model + CODE:,} | {steps:,} |"
        for seed, (bpb, model, steps, _) in RUNS.items()
    ]
    readme = [
        "# A record",
        "",
        f"val_bpb {submission['val_bpb']:.8f}, no paid prefix.",
        "",
        "| seed | bpb | loss | bytes | steps |",
    ]
    readme += ["|---|---|---|---|---|", *rows, "", "```bash", COMMAND, "```", ""]
    (folder / "README.md").write_text("\n".join(readme))
    for seed in RUNS:
        (folder / f"train_seed{seed}.log").write_text(log_text(seed))
    source = "class Settings:\n    seed: int = 1337\n    matrix_lr: float = 0.02\n"
    (folder / "train_gpt.py").write_text(source + "#" * (CODE - len(source)))
    return folder


def edit(path: Path, old: str, new: str) -> None:
    """Replace `old`, which must be in the file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_json(folder: Path, **changes: object) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def verdicts(folder: Path, verdict: Verdict) -> dict[str, str]:
    return {item.rule: item.value for item in apply_rules(read_record_folder(folder)) if item.verdict is verdict}


def failures(folder: Path) -> dict[str, str]:
    return verdicts(folder, Verdict.FAILS)


def notes(folder: Path) -> dict[str, str]:
    return verdicts(folder, Verdict.NOTE)
