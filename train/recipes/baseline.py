"""The published baseline: 9 layers, width 512, ReLU² MLP, tied embedding, U-Net skips; 17,059,912 parameters.

Published (8 × H100): val_bpb 1.2243657, 13,780 steps of 43.54 ms, 15,863,489 bytes.

As in the published script, the rotary table is rounded to bfloat16: positions, frequencies, cosines and sines
(ROTARY_TABLE=bf16).

Deviations:
- The artifact is int6 by GPTQ, compressed by brotli. The published one is int8 and zlib.
- 10 of the 600 seconds are reserved for GPTQ's calibration.
- Newton-Schulz divides by max(norm, 1e-7). The published script divides by norm + 1e-7.
- All ranks follow one clock. In the published script the learning rate of each rank follows the rank's own clock.
"""

PUBLISHED = {"val_bpb": 1.2243657, "steps": 13780, "step_ms": 43.54, "artifact_bytes": 15_863_489}

SETTINGS = {
    "data_path": "data/datasets/fineweb10B_sp1024",
    "vocab_size": 1024,
    "num_layers": 9,
    "rotary_table": "bf16",
    "gptq_reserve_seconds": 10.0,
    "eval_stride": 0,
    "logits_rounding": "bf16",
}
