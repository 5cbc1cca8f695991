"""The published baseline: 9 layers, d 512, ReLU² MLP, tied embeddings, U-Net skips; 17,059,912 parameters.

Published: val_bpb 1.2243657, 13,780 steps of 43.54 ms on 8 × H100, 15,863,489 bytes. Deviations: the artifact is int6
GPTQ and brotli, where the published one was int8 and zlib, and 10 of the 600 s are kept for its calibration.
"""

PUBLISHED = {"val_bpb": 1.2243657, "steps": 13780, "step_ms": 43.54, "artifact_bytes": 15_863_489}

SETTINGS = {
    "data_path": "data/datasets/fineweb10B_sp1024",
    "vocab_size": 1024,
    "num_layers": 9,
    "gptq_reserve_seconds": 10.0,
    "eval_stride": 0,
    "logits_rounding": "bf16",
}
