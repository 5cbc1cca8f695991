"""Submission #1471: vocabulary 8192, three repeated layers, two lanes, EMA, SDClip, GPTQ int6, brotli.

Published (8 × H100): val_bpb 1.0866 (seeds 42, 1337, 2024: 1.08725556, 1.08655776, 1.08585085), 4,964 to 4,972 steps of
118.8 ms, 15,975,819 to 15,981,300 bytes, 37,022,812 parameters. As in its script, skips into layers whose lanes have
begun are dead, and the scale floor of 1/31 binds wherever a row's deviation is below 0.078.

Deviations: Hessians are summed over ranks, where rank 0's own 64 batches were used; a failing Cholesky is tried again
with more damping before a matrix is rounded to nearest; the loader's seed comes from shard names, not from absolute
paths; the container is this project's own.
"""

# of the first seed named above, val_bpb the mean where there are several
PUBLISHED = {"val_bpb": 1.0865547233, "steps": 4964, "step_ms": 118.86, "artifact_bytes": 15_981_300}

SETTINGS = {
    "data_path": "data/datasets/fineweb10B_sp8192",
    "vocab_size": 8192,
    "train_seq_len": 2048,
    "train_batch_tokens": 786432,
    "loader": "coprime",
    "num_layers": 11,
    "mlp_mult": 4.0,
    "mlp_slope": 0.5,
    "rope_dims": 16,
    "rope_train_seq_len": 2048,
    "qk_gain_init": 5.0,
    "orthogonal_init": True,
    "ln_scale": True,
    "xsa_last_n": 11,
    "ve_dim": 128,
    "ve_layers": (9, 10),
    "skip_gates": True,
    "parallel_start_layer": 7,
    "parallel_form": "lanes",
    "recur_layers": (3, 4, 5),
    "recur_form": "unroll",
    "recur_start_step": 2000,
    # published: calibration took 10.6 s of these 10
    "gptq_reserve_seconds": 10.0,
    "warmdown_frac": 0.72,
    "matrix_lr": 0.022,
    "tied_embed_lr": 0.03,
    "scalar_lr": 0.02,
    "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "muon_eq_r": True,
    # published as max(norm, 1e-7)
    "muon_row_eps": 1e-14,
    "muon_wd": 0.095,
    "embed_wd": 0.095,
    "adam_wd": 0.02,
    "grad_clip_norm": 0.3,
    "ema_decay": 0.9965,
    # published: never needed
    "prune_excess": 8,
    "eval_seq_len": 2048,
    "logits_rounding": "bf16",
}
