"""The published baseline: 9 layers, d 512, ReLU² MLP, tied embeddings, U-Net skips; 17,059,912 parameters.

Published: val_bpb 1.2243657, 13,780 steps of 43.54 ms on 8 × H100, 15,863,489 bytes. Deviation: the artifact is int6
GPTQ and brotli as everywhere here, where the published one was int8 and zlib.
"""

PUBLISHED = {"val_bpb": 1.2243657, "steps": 13780, "step_ms": 43.54, "artifact_bytes": 15_863_489}

SETTINGS = {
    "data_path": "data/datasets/fineweb10B_sp1024",
    "vocab_size": 1024,
    "num_layers": 9,
    "eval_stride": 0,
}
