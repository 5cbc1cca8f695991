"""Submission #122: vocabulary 2048, 8 layers, NorMuon, int6 straight-through training from step 0, SWA, zstd.

Published (8 × H100): val_bpb 1.15849349 (mean of three verification runs: 1.16027254), 11,132 steps of 53.91 ms,
15,353,270 bytes, 19,941,440 parameters.

As in the published script:
- Windows are 4,096 tokens long. The README gives another length.
- The evaluation rule full_windows never scores the first 4,032 tokens.
- The rotary table is rounded to bfloat16: positions, frequencies, cosines and sines (ROTARY_TABLE=bf16).
- Fake quantization rounds the bfloat16 copies of the weights (QAT_DTYPE=compute).
- Windows are scored by an uncompiled model, so every operation of the softcap is rounded to bfloat16
  (LOGITS_ROUNDING=bf16_each).

Deviations:
- Vectors and scalars are float16 in the artifact. The published ones are float32.
- zstd compresses one code per byte. The published script packs the codes first.
- Newton-Schulz divides by max(norm, 1e-7). The published script divides by norm + 1e-7.
- All ranks follow one clock. In the published script the learning rate of each rank follows the rank's own clock.
- The artifact has this project's own container.
"""

PUBLISHED = {"val_bpb": 1.15849349, "steps": 11132, "step_ms": 53.91, "artifact_bytes": 15_353_270}

SETTINGS = {
    "data_path": "data/datasets/fineweb10B_sp2048",
    "vocab_size": 2048,
    "train_seq_len": 4096,
    "train_batch_tokens": 524288,
    "num_layers": 8,
    "mlp_mult": 3.0,
    "mlp_slope": 0.0,
    "rope_train_seq_len": 4096,
    "rotary_table": "bf16",
    "warmdown_iters": 3000,
    "matrix_lr": 0.02,
    "tied_embed_lr": 0.03,
    "scalar_lr": 0.02,
    "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "normuon": True,
    "swa_enabled": True,
    "swa_every": 200,
    "swa_start_frac": 0.5,
    # as published, row scales have a floor in the artifact but not in training
    "qat": True,
    "qat_dtype": "compute",
    "quantizer": "rtn",
    "matrix_clip": "quantile",
    "embed_bits": 16,
    "codec": "zstd",
    "eval_seq_len": 4096,
    # as published, windows are scored by an uncompiled model, which rounds after every operation
    "logits_rounding": "bf16_each",
    "eval_rule": "full_windows",
}
