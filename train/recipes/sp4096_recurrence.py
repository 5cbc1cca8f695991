"""Submission #1392: vocabulary 4096, one repeated layer, parallel residuals, MuonEq-R, GPTQ int6, brotli.

Published (8 × H100): val_bpb 1.1020 (seeds 42, 314, 999: 1.10327377, 1.10181145, 1.10101898), 5,733 to 5,945 steps of
100.9 to 104.7 ms, 15.82 to 15.88 MB, 34,400,347 parameters. As its script does, and not as its README says, only layer
4 repeats (the blend exists in the encoder alone), the parallel layers are in GPT-J form, and only the EMA is loaded.

As published, the trained model writes the 128 sequences that it is calibrated on, without training data and so outside
the 600 s, and the Hessians are collected without the repeat and the parallel layers; GPTQ_CALIB_GRAPH=evaluated takes
the function that is scored.

Deviations: sequences are written with kept keys and values, all under the rotary base of 2,048 tokens, which is that of
the evaluation, where the published run recomputed everything for each length, in 430 s, with the plain base up to 1,024
tokens; ranks share them; the random numbers are other ones; clipping comes after the reduction over ranks; gradients
and momentum are float32 where they were bfloat16, and the momentum is reset after the warm-up; the untrained vectors
have no gradient, where theirs added up from step to step inside the clipped norm; late fake-quantization, which could
reach the value embedding's projection at most, is not there; the container is this project's own.
"""

# of the first seed named above, val_bpb the mean where there are several
PUBLISHED = {"val_bpb": 1.1020347333, "steps": 5733, "step_ms": 104.67, "artifact_bytes": 15_824_545}

SETTINGS = {
    "data_path": "data/datasets/fineweb10B_sp4096",
    "vocab_size": 4096,
    "train_seq_len": 2048,
    "train_batch_tokens": 786432,
    "num_layers": 11,
    "mlp_mult": 4.0,
    "mlp_slope": 0.5,
    "rope_dims": 16,
    # the published module was built for 1,024 positions, so 2,048 fall under the NTK rule
    "rope_train_seq_len": 1024,
    "qk_gain_init": 5.0,
    "orthogonal_init": True,
    "ln_scale": True,
    "xsa_last_n": 11,
    "smear_gate": "published",
    "ve_dim": 128,
    "ve_layers": (9, 10),
    "ve_proj_optimizer": "adamw",
    "parallel_start_layer": 7,
    "parallel_form": "gptj",
    # layer 5 is in the decoder, where the published loop never repeats
    "recur_layers": (4, 5),
    "recur_form": "blend",
    "recur_start_step": 3000,
    # counted and saved, but in no optimizer: both stay 0.5
    "recur_scale_params": 2,
    "warmdown_iters": 4000,
    "matrix_lr": 0.02,
    "tied_embed_lr": 0.03,
    "scalar_lr": 0.02,
    "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "muon_eq_r": True,
    "muon_wd": 0.09,
    "adam_wd": 0.09,
    "grad_clip_norm": 0.3,
    "ema_decay": 0.997,
    "matrix_clip": "percentile_search",
    "embed_clip": "quantile",
    "gptq_calib_source": "generated",
    "gptq_calib_graph": "plain",
    "gptq_calib_batches": 128,
    # MiB: above the cap, and so never of use
    "target_mb": 15.9,
    "eval_seq_len": 2048,
    "logits_rounding": "bf16",
    # scores the text's last 64 tokens 32 times, as published
    "eval_rule": "overlap_tail",
}
