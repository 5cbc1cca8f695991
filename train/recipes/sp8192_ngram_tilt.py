"""Submission #2135: the model of sp8192_frontier, trained on sequences of one length, with SmearGate across documents.

Published (8 × H100): val_bpb 1.0565 with test-time training on each document and an n-gram tilt of the scores (seeds
42, 0, 314); val_bpb 1.0691 without both, for the quantized model and windows without overlap; 4,983 to 5,001 steps of
120 ms, 15,942,822 to 15,947,490 bytes, 35,945,673 parameters.

As in the published script:
- SmearGate blends the first token of a document with the last one of the document before (SMEAR_GATE_BOS_FIX=0).
- Of the 600 s, 0.5 s are kept for the calibration, although it takes longer.

Deviations:
- Scores have no n-gram tilt.
- All deviations of sp8192_frontier, except those of the growing sequences, which this recipe does not have.
"""

# val_bpb is the mean over the seeds, with test-time training and tilt; the other figures are those of the first seed
PUBLISHED = {"val_bpb": 1.05650768, "steps": 5001, "step_ms": 119.88, "artifact_bytes": 15_947_490}

SETTINGS = {
    "data_path": "data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
    "vocab_size": 8192,
    "train_seq_len": 2048,
    "train_batch_tokens": 786432,
    "loader": "packed",
    "document_masking": True,
    "num_layers": 11,
    "mlp_mult": 4.0,
    "mlp_slope": 0.5,
    "rope_dims": 16,
    "rope_train_seq_len": 2048,
    "rope_scaling": "none",
    "rotary_table": "bf16_frequencies",
    "qk_gain_init": 5.0,
    "orthogonal_init": True,
    "ln_scale": True,
    "xsa_last_n": 11,
    "head_gate": True,
    "smear_gate": "embedding",
    "smear_gate_bos_fix": False,
    "skip_rows": 8,
    "skip_gates": True,
    "parallel_start_layer": 8,
    "parallel_form": "routed",
    "recur_layers": (3, 4, 5),
    "num_loops": 2,
    "recur_start_frac": 0.35,
    "softcap_params": 2,
    "gptq_reserve_seconds": 0.5,
    "warmdown_frac": 0.85,
    "min_lr": 0.1,
    "matrix_lr": 0.028,
    "tied_embed_lr": 0.03,
    "scalar_lr": 0.02,
    "muon_momentum": 0.97,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "muon_coefficients": "polar_express",
    "muon_eq_r": True,
    # the published script divides by max(norm, 1e-7)
    "muon_row_eps": 1e-14,
    "muon_wd": 0.095,
    "beta2": 0.99,
    "adam_wd": 0.02,
    "embed_wd": 0.085,
    "grad_clip_norm": 0.3,
    "ema_decay": 0.9965,
    "embed_bits": 7,
    "matrix_clip_sigmas": 12.0,
    "embed_clip_sigmas": 14.0,
    "scale_floor": "none",
    "gptq_calib_batches": 32,
    "gptq_tied_embed": True,
    "val_loss_every": 4000,
    "eval_seq_len": 2560,
}
