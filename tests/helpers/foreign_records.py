"""Record folders in the layouts of other programs, with made-up numbers. A test then changes one thing in them."""

import json
import math
from pathlib import Path
from typing import Any

# the pair of CaseOps shards
TOKENS, BYTES = 47_851_520, 151_074_499
BAR = "=" * 100
CARD = "|   {}  {:<30} On  |   00000000:1{}:00.0 Off |                    0 |"
MODEL, RAW_CODE, CODE = 15_890_000, 151_000, 31_500
# seed → scores before quantization, after it, and after test-time training
SEEDS = {
    "42": (1.06500011, 1.07400022, 1.06110033),
    "314": (1.06510011, 1.07410022, 1.06120033),
    "999": (1.06530011, 1.07430022, 1.06140033),
}
SCRIPT = "import os\nimport ngram\n\nSEED = int(os.environ.get('SEED', 0))\nNOISE = os.environ.get('NOISE')\n"


def loss_of(bpb: float) -> float:
    return round(bpb * math.log(2) * BYTES / TOKENS, 8)


def log_lines(
    seed: str, *, gpu: str = "NVIDIA H100 80GB HBM3", clock_ms: int = 599_700, hessians_s: float = 0.2
) -> list[str]:
    """A log of the last weeks: a block of settings, minutes, and every line behind a time stamp."""
    before, after, ttt = SEEDS[seed]
    steps = [
        f"{step}/20000 train_loss: {2.3 + 6 / step:.4f} train_time: {step * 0.002:.1f}m tok/s: 6553600"
        for step in range(500, 5000, 500)
    ]
    body = [
        BAR, "Hyperparameters:", f"  seed: {seed}", "  world_size: 8", BAR, "Running Python 3.12.3", "Running PyTorch 2.11.0",
        *(CARD.format(index, gpu, index) for index in range(8)), BAR, "model_params: 35944602",
        "0/20000 val_loss: 9.0100 val_bpb: 4.1150", *steps, "5000/20000 val_loss: 2.3300 val_bpb: 1.0652",
        f"stopping_early: wallclock_cap train_time: {clock_ms}ms step: 5000/20000",
        f"diagnostic pre-quantization post-ema val_loss:{loss_of(before):.8f} val_bpb:{before:.8f} eval_time:6100ms",
        f"GPTQ:collected 67 Hessians in {hessians_s}s", f"Code size (uncompressed): {RAW_CODE} bytes",
        f"Code size (compressed): {CODE} bytes", "Serialized model: 135000000 bytes",
        f"Serialized model quantized+brotli: {MODEL} bytes", f"Total submission size quantized+brotli: {MODEL + CODE} bytes",
        f"diagnostic quantized val_loss:{loss_of(after):.8f} val_bpb:{after:.8f} eval_time:9100ms",
        f"quantized_ttt_phased val_loss:{loss_of(ttt):.8f} val_bpb:{ttt:.8f} eval_time:431000ms", "total_eval_time:455.5s",
    ]  # fmt: skip
    return [f"{1_776_000_000 + number}.25 {line}" for number, line in enumerate(body)]


def make_foreign(folder: Path, **changes: Any) -> Path:
    """Write a record with test-time training, made by another program. `changes` are fields of submission.json."""
    folder.mkdir(parents=True)
    scores = {seed: ttt for seed, (_, _, ttt) in SEEDS.items()}
    submission = {
        "author": "Bo", "github_id": "bo", "name": "Phases", "date": "2026-04-20", "track": "10min_16mb",
        "val_bpb": round(sum(scores.values()) / 3, 5), "seeds": [42, 314, 999],
        "seed_results": {seed: {"val_bpb": score, "artifact_bytes": MODEL + CODE} for seed, score in scores.items()},
        "bytes_total": MODEL + CODE, "bytes_code": CODE,
    }  # fmt: skip
    (folder / "submission.json").write_text(json.dumps({**submission, **changes}))
    (folder / "README.md").write_text(
        f"# Phases\n\nval_bpb: **{submission['val_bpb']}** (3 seeds). Score-first test-time training: each chunk is scored before "
        "the model trains on the validation tokens in it.\n\n```bash\nREPO=me/shards python data/download.py\n"
        "NOISE=1 SEED=42 \\\n  torchrun --standalone --nproc_per_node=8 train_gpt.py\n```\n"
    )
    for seed in SEEDS:
        (folder / f"train_seed{seed}.log").write_text("\n".join([*log_lines(seed), ""]))
    (folder / "train_gpt.py").write_text(SCRIPT)
    (folder / "ngram.py").write_text("# helper\n")
    return folder


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
