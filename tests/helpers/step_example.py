"""Settings that make a recipe's training step small, for the tests of the step benchmarks."""

# narrow, but with enough matrices for 8 ranks; EMA and clipping as in the recipe
NARROW = {
    "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4, "vocab_size": 300, "train_seq_len": 32, "bigram_dim": 8, "compile": "off",
    "train_batch_tokens": 8 * 2 * 32, "device": "cpu", "embed_dtype": "float32",
}  # fmt: skip
SHALLOW = NARROW | {
    "num_layers": 3,
    "recur_layers": (1,),
    "parallel_start_layer": 2,
    "ve_layers": (2,),
    "xsa_last_n": 3,
}
