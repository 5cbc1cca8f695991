"""A made-up finished run with the numbers of a published run. Tests make records of it."""

import json
import math
from pathlib import Path
from typing import Any

from train.config import Config
from train.run.logger import RunLogger
from train.submission.summary import Summary

CONFIG = Config(
    recipe="sp8192_sdclip",
    runs_dir="runs",
    run_id="example",
    vocab_size=8192,
    train_seq_len=2048,
    train_batch_tokens=786432,
)


def make_summary(**changes: Any) -> Summary:
    """A summary with #1471's published loss, bits per byte and sizes for its first seed."""
    values: dict[str, Any] = {
        "run_id": "example",
        "recipe": "sp8192_sdclip",
        "seed": 1337,
        "date": "2026-04-08T12:00:00",
        "steps": 4964,
        "step_avg_ms": 118.871,
        "train_seconds": 590.0777,
        "stage_seconds": {"train": 610.25, "data": 3.5, "quantize": 20.125, "evaluate": 90.0},
        "val_loss": 2.85199103,
        "val_bpb": 1.1040946,
        "eval_seconds": 81.4567,
        "tokens": 40_540_160,
        "bytes": 151_078_222,
        "bytes_code": 83_119,
        "bytes_model": 15_898_181,
        "bytes_total": 15_981_300,
        "max_bytes": 16_000_000,
        "parameters": 37_022_811,
        "hardware": "8 × NVIDIA H100 80GB HBM3",
        "torch": "2.13.0",
        "python": "3.11.2",
        "step0_val_bpb": 3.48761234,
        "prequant_val_bpb": 1.08741234,
        "flat_val_bpb": 1.10412345,
        "yardsticks": {
            "gzip -9 primed with the training text": 1.96123456,
            "xz -9 primed with the training text": 1.40123456,
        },
        "model_groups": {"embeddings": 4_000_000, "attention": 4_898_181, "mlp": 7_000_000},
    }
    return Summary(**{**values, **changes})


def make_run(folder: Path, summary: Summary | None = None) -> Path:
    """Write a run folder as `python -m train` does, but only the files from which a record is made."""
    run = folder / "example"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (summary or make_summary()).write(run / "summary.json")
    with RunLogger(run, 1337, echo=False) as log:
        log.val_step(0, 100, 9.0, 3.4876, 0.0)
        for step in (1, 2, 5, 25, 50, 75, 100):
            log.train_step(step, 100, 2.9 + 6 * math.exp(-step / 20), 120.0 * step)
        log.val_step(100, 100, 2.95, 1.142, 12000.0)
    return run
