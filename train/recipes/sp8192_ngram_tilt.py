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

from train.recipes.sp8192_frontier import SETTINGS as FRONTIER

# val_bpb is the mean over the seeds, with test-time training and tilt; the other figures are those of the first seed
PUBLISHED = {"val_bpb": 1.05650768, "steps": 5001, "step_ms": 119.88, "artifact_bytes": 15_947_490}

SETTINGS = {
    **FRONTIER,
    "train_seq_schedule": "",
    "seq_change_warmup_steps": 0,
    "qk_gain_init": 5.0,
    "smear_gate_bos_fix": False,
    "matrix_lr": 0.028,
    "gptq_reserve_seconds": 0.5,
    "gptq_calib_batches": 32,
    "val_loss_every": 4000,
    "eval_seq_len": 2560,
}
