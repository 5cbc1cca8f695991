"""The settings of a run: each has a name, a default, a meaning and allowed values.

Names follow Parameter Golf, so published run commands work unchanged. A new setting's default must reproduce the old
behaviour, so that existing runs and artifacts stay valid. If you remove a setting, add it to
`train.common.retired.RETIRED`.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.common.values import parse_lengths, setting

# settings that do not affect the model or its score
BOOKKEEPING = frozenset(
    {"run_id", "runs_dir", "resume", "checkpoint_every", "train_log_every", "loggers", "profile_steps", "samples"}
)
# other settings that a resumed run may change: the kernels at any time, the other three until training ends
CHANGEABLE = frozenset({"golf_backend", "iterations", "max_wallclock_seconds", "val_loss_every"})
# two runs are runs of the same recipe even if they differ in these settings
LOCAL = BOOKKEEPING | {"recipe", "seed", "data_path", "tokenizer_path", "device", "code_form"}

SECTIONS = {
    "run": "recipe",
    "data": "data_path",
    "model": "num_layers",
    "optimization": "iterations",
    "quantization and artifact": "quantizer",
    "validation and evaluation": "val_loss_every",
}
"""Title of a section of `Settings` → the section's first setting."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run, section by section."""

    # run
    recipe: str = setting("quickstart", "recipe: a file in train/recipes")
    run_id: str = setting("", "name of the run folder; empty: RECIPE_DATE-TIME")
    runs_dir: str = setting("runs", "folder of all run folders")
    seed: int = setting(1337, "seed of Python, NumPy and PyTorch", low=0, high=2**63 - 1)
    resume: str = setting("never", "auto: continue from the run's checkpoint, if it has one", choices=("never", "auto"))
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: no checkpoints", low=0)
    train_log_every: int = setting(200, "steps between log lines of the training loss", low=1)
    samples: str = setting(
        "off", "let the model write sample texts; end: after the run; validations: also at each validation",
        choices=("off", "end", "validations"),
    )  # fmt: skip
    loggers: str = setting("", "also log to tensorboard, wandb, or tensorboard,wandb; empty: to files only")
    profile_steps: str = setting("", "steps to profile, FIRST:END, such as 30:33; empty: none")
    device: str = setting("auto", "device to compute on; auto: cuda if there is a GPU", choices=("auto", "cpu", "cuda"))
    attention: str = setting(
        "auto", "attention backend; auto: the fastest one, measured before training",
        choices=("auto", "sdpa", "fa3", "fa4", "cudnn", "flash", "math"),
    )  # fmt: skip
    compile: str = setting("auto", "torch.compile; auto: on for a GPU, off for a CPU", choices=("auto", "on", "off"))
    golf_backend: str = setting(
        "", "backends to force, for all operators (triton) or for some (newton_schulz=triton,int6=cuda); empty: none"
    )

    # data
    data_path: str = setting("", "folder of the shards (*_train_*.bin, *_val_*.bin) and the tokenizer")
    tokenizer_path: str = setting("", "SentencePiece model; empty: the one in data_path")
    corpus: str = setting(
        "", "stdlib: if data_path does not exist and is the folder that the recipe names, build it from Python's standard library",
        choices=("", "stdlib"),
    )  # fmt: skip
    vocab_size: int = setting(
        1024, "tokens in the vocabulary; a manifest in data_path overrides recipe and default", low=259, high=65536
    )
    train_seq_len: int = setting(1024, "tokens per training sequence", low=1)
    train_seq_schedule: str = setting(
        "",
        "growing training sequences, LENGTH@END,…: 1024@0.1,2048@1 has 1024 tokens until 0.1 of training; empty: train_seq_len",
    )
    train_batch_tokens: int = setting(524288, "tokens per step, over all ranks", low=1, high=2**31)
    loader: str = setting(
        "sequential",
        "order of the training tokens; coprime: step through each shard with a stride coprime to its length; packed: in order, a micro-batch is one row with whole documents",
        choices=("sequential", "shuffled", "coprime", "packed"),
    )
    document_masking: bool = setting(False, "attention and SmearGate see only the token's own document")

    # model
    num_layers: int = setting(9, "transformer layers", low=1, high=1024)
    model_dim: int = setting(512, "width of the residual stream", low=8, high=65536)
    num_heads: int = setting(8, "query heads", low=1)
    num_kv_heads: int = setting(4, "key and value heads", low=1)
    mlp_mult: float = setting(2.0, "hidden width of the MLP, in multiples of model_dim", low=0.01, high=1024.0)
    mlp_slope: float = setting(0.0, "negative slope of the squared LeakyReLU; 0: ReLU²", low=0.0, high=0.999)
    rope_base: float = setting(10000.0, "base of the rotary frequencies", low=1.0)
    rope_dims: int = setting(0, "rotary dimensions per head; 0: all", low=0)
    rope_train_seq_len: int = setting(1024, "longest sequence that uses rope_base as it is (see rope_scaling)", low=1)
    rope_scaling: str = setting(
        "ntk", "ntk: raise rope_base for longer sequences; none: use rope_base at every length", choices=("ntk", "none")
    )
    rotary_table: str = setting(
        "exact", "rounding of the rotary embedding to bfloat16; exact: none; bf16: positions, frequencies, cosines and sines; "
        "bf16_frequencies: only the frequencies",
        choices=("exact", "bf16", "bf16_frequencies"),
    )  # fmt: skip
    qk_gain_init: float = setting(1.5, "initial gain of each query head, after the QK norm")
    logit_softcap: float = setting(30.0, "cap of the logits: they become cap * tanh(logits / cap)", low=1e-3)
    embed_dtype: str = setting(
        "bfloat16", "dtype of the embeddings and of their AdamW moments", choices=("bfloat16", "float32")
    )
    orthogonal_init: bool = setting(False, "initialize matrices orthogonally, not Kaiming-uniformly")
    ln_scale: bool = setting(False, "scale the norms of layer l by 1/sqrt(l + 1)")
    xsa_last_n: int = setting(
        0, "number of last layers that remove the token's own value direction from attention's output (XSA)", low=0
    )
    head_gate: bool = setting(
        False, "multiply each attention head by a sigmoid gate, computed from 12 channels of attention's input (#1787)"
    )
    smear_gate: str = setting(
        "off", "blend each token's embedding with the previous token's; published: after the norm, one gate per channel, across documents unless "
        "document_masking is on; document: after the norm, one gate per token, not across documents; embedding (#1667): before the norm, "
        "one gate per token, across documents only if smear_gate_bos_fix is off",
        choices=("off", "published", "document", "embedding"),
    )  # fmt: skip
    smear_gate_bos_fix: bool = setting(True, "with smear_gate embedding, do not blend the first token of a document")
    bigram_vocab_size: int = setting(0, "rows of the hashed bigram embedding; 0: none", low=0, high=2**24)
    bigram_dim: int = setting(128, "width of the hashed bigram embedding", low=1, high=65536)
    trigram: bool = setting(False, "also hash trigrams into the bigram table and add their rows")
    ve_dim: int = setting(0, "width of the shared value embedding; 0: none", low=0, high=65536)
    ve_layers: tuple[int, ...] = setting((), "layers that add the value embedding to their values")
    embed_proj: str = setting(
        "always", "projection of bigram and value embeddings; needed: only if the widths differ",
        choices=("always", "needed"),
    )  # fmt: skip
    ve_proj_optimizer: str = setting("muon", "optimizer of the value embedding's projection", choices=("muon", "adamw"))
    skip_rows: int = setting(0, "largest number of U-Net skips; 0: half of num_layers", low=0, high=1024)
    skip_gates: bool = setting(False, "sigmoid gates on the U-Net skips")
    parallel_start_layer: int = setting(-1, "first layer with attention and MLP in parallel; -1: none", low=-1)
    parallel_form: str = setting(
        "gptj", "how attention and MLP run in parallel; gptj: both read one residual stream; lanes: each reads and writes its own stream; "
        "routed: each reads its own stream and writes both",
        choices=("gptj", "lanes", "routed"),
    )  # fmt: skip
    recur_layers: tuple[int, ...] = setting((), "layers that run again")
    num_loops: int = setting(1, "how many times recur_layers run again", low=1, high=1024)
    recur_form: str = setting(
        "unroll", "unroll: run recur_layers again as a group; blend: run each layer twice and average its two outputs",
        choices=("unroll", "blend"),
    )  # fmt: skip
    recur_start_step: int = setting(0, "first step with recurrence", low=0)
    recur_start_frac: float = setting(
        0.0, "fraction of training before recurrence; 0: use recur_start_step", low=0.0, high=1.0
    )
    recur_scale_params: int = setting(0, "unused vectors to add, to match #1392, which has 2", low=0, high=1024)
    softcap_params: int = setting(0, "unused softcaps to add, to match #1945, which has 2", low=0, high=1024)

    # optimization
    iterations: int = setting(20000, "steps, unless the wall clock ends training first", low=1)
    max_wallclock_seconds: float = setting(600.0, "wall-clock limit of training; 0: none", low=0.0)
    gptq_reserve_seconds: float = setting(0.0, "seconds of the wall-clock limit reserved for GPTQ calibration", low=0.0)
    warmup_steps: int = setting(20, "warm-up steps, not counted as training time; their updates are undone", low=0)
    warmdown_iters: int = setting(1200, "steps of the final learning-rate decay", low=0)
    warmdown_frac: float = setting(
        0.0, "fraction of training with learning-rate decay; 0: use warmdown_iters", low=0.0, high=1.0
    )
    min_lr: float = setting(0.0, "smallest factor on the learning rates in their decay", low=0.0, high=1.0)
    seq_change_warmup_steps: int = setting(
        0, "steps in which the learning rate rises again after the sequences of train_seq_schedule grew", low=0
    )
    warmdown_by: str = setting(
        "clock", "clock: schedules follow the training time, or the steps if the time has no limit; steps: schedules always follow the steps",
        choices=("clock", "steps"),
    )  # fmt: skip
    matrix_lr: float = setting(0.04, "learning rate of the matrices (Muon)", low=0.0)
    tied_embed_lr: float = setting(0.05, "learning rate of the embeddings (AdamW)", low=0.0)
    scalar_lr: float = setting(0.04, "learning rate of vectors and scalars (AdamW)", low=0.0)
    muon_momentum: float = setting(0.95, "momentum of Muon", low=0.0, high=0.9999)
    muon_momentum_warmup_start: float = setting(0.85, "momentum of Muon at step 0", low=0.0, high=0.9999)
    muon_momentum_warmup_steps: int = setting(500, "steps until the momentum reaches muon_momentum", low=0)
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", low=1, high=20)
    muon_coefficients: str = setting(
        "quintic", "Newton-Schulz coefficients: quintic, polar_express, cubic, muon_plus or aol"
    )
    muon_wd: float = setting(0.0, "weight decay of the matrices", low=0.0)
    muon_eq_r: bool = setting(False, "normalize rows before Newton-Schulz (MuonEq-R)")
    muon_row_eps: float = setting(1e-7, "epsilon that MuonEq-R adds to the squared norm of a row", low=0.0)
    normuon: bool = setting(False, "normalize rows after Newton-Schulz by their second moments (NorMuon)")
    beta2: float = setting(0.95, "decay of AdamW's second moments", low=0.0, high=0.99999)
    adam_wd: float = setting(0.0, "weight decay of AdamW's parameters", low=0.0)
    embed_wd: float = setting(-1.0, "weight decay of the embeddings; -1: same as adam_wd", low=-1.0)
    optimizer_graph: str = setting(
        "auto", "replay the optimizer's step as CUDA graphs; auto: only if Muon runs on Triton kernels",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    grad_clip_norm: float = setting(0.0, "largest norm of the gradient; 0: no clipping", low=0.0)
    ema_decay: float = setting(
        0.0, "average the weights with this decay and score the average (EMA); 0: off", low=0.0, high=0.99999
    )
    swa_enabled: bool = setting(False, "average the weights over the end of training and score the average (SWA)")
    swa_every: int = setting(200, "steps between additions of the weights to SWA's average", low=1)
    swa_start_frac: float = setting(
        0.5, "SWA starts when the learning rate falls below this fraction of its peak", low=0.0, high=1.0
    )
    qat: bool = setting(False, "train with fake-quantized int6 matrices and straight-through gradients")
    qat_dtype: str = setting(
        "float32",
        "dtype of the weights when qat rounds them; compute: the compute dtype",
        choices=("float32", "compute"),
    )

    # quantization and artifact
    quantizer: str = setting("gptq", "how matrices are rounded; rtn: to nearest", choices=("gptq", "rtn"))
    matrix_bits: int = setting(6, "bits per weight of the matrices", low=2, high=8)
    embed_bits: int = setting(8, "bits per weight of the embeddings; 16: float16", choices=(2, 3, 4, 5, 6, 7, 8, 16))
    tied_embed_bits: int = setting(
        0, "bits per weight of the tied embedding; 0: same as embed_bits", choices=(0, 2, 3, 4, 5, 6, 7, 8, 16)
    )
    matrix_clip: str = setting(
        "sdclip", "rule for the threshold at which the weights of a matrix row are clipped",
        choices=("sdclip", "hessian_sdclip", "row_max", "quantile", "percentile_search"),
    )  # fmt: skip
    matrix_clip_sigmas: float = setting(12.85, "SDClip clips matrix rows at this many standard deviations", low=0.1)
    embed_clip_sigmas: float = setting(20.0, "SDClip clips embedding rows at this many standard deviations", low=0.1)
    embed_clip: str = setting(
        "sdclip", "like matrix_clip, but for embedding rows", choices=("sdclip", "row_max", "quantile")
    )
    scale_floor: str = setting(
        "published",
        "smallest row scale; published: 1/(2^(bits-1) - 1); none: 2^-24, the smallest float16 above 0",
        choices=("published", "none"),
    )
    gptq_calib_source: str = setting(
        "train", "text from which GPTQ computes its Hessians; generated: text that the model writes",
        choices=("train", "generated"),
    )  # fmt: skip
    gptq_calib_graph: str = setting(
        "evaluated", "layers that run to compute the Hessians; evaluated: as in the evaluation; plain: without recurrence and parallel layers, as in #1392",
        choices=("evaluated", "plain"),
    )  # fmt: skip
    gptq_calib_batches: int = setting(64, "number of training batches or generated sequences for the Hessians", low=1)
    gptq_tied_embed: bool = setting(False, "round the tied embedding by GPTQ too (#1394)")
    gptq_damp: float = setting(0.01, "damping of a Hessian, as a fraction of its mean diagonal", low=0.0)
    passthrough_max_elements: int = setting(65536, "tensors of at most this many elements are stored in float16", low=0)
    codec: str = setting(
        "brotli", "compression of the artifact; raw: none; raw6: none, but codes of up to 6 bits take 6 bits instead of 8",
        choices=("brotli", "zstd", "lzma", "zlib", "ans", "raw", "raw6"),
    )  # fmt: skip
    target_bytes: int = setting(
        0, "choose SDClip's clips so that script and model take at most this many bytes; 0: off", low=0
    )
    target_mb: float = setting(
        0.0, "set quantized values of ±1 to 0 until script and model fit this many MiB; 0: off", low=0.0
    )
    prune_excess: int = setting(
        0,
        "set this many quantized values of ±1 to 0 for each byte over max_artifact_bytes; #1471 uses 8; 0: off",
        low=0,
    )
    code_form: str = setting(
        "wrapped", "form of the packed script, whose size counts; plain: uncompressed; wrapped: compressed, as text; raw: compressed, as bytes",
        choices=("plain", "wrapped", "raw"),
    )  # fmt: skip
    max_artifact_bytes: int = setting(16_000_000, "largest size of script and model, in bytes", low=1)

    # validation and evaluation
    val_loss_every: int = setting(1000, "steps between validations; 0: only the first and the last", low=0)
    eval_seq_len: int = setting(0, "window length of the final evaluation; 0: train_seq_len", low=0)
    eval_stride: int = setting(64, "stride in tokens of the final evaluation's windows; 0: they do not overlap", low=0)
    eval_rule: str = setting(
        "once", "how often overlapping windows score a token; once: each token once; overlap_tail: the text's last tokens several times, the others "
        "once; full_windows: some tokens at the text's start and end never, the others once",
        choices=("once", "overlap_tail", "full_windows"),
    )  # fmt: skip
    paid_prefix_file: str = setting(
        "", "file of validation tokens to score with loss 0, as #262 did; against the rules; empty: none"
    )
    logits_rounding: str = setting(
        "none", "rounding of the scored logits to bfloat16; bf16: before the softcap; bf16_capped: also after the softcap; "
        "bf16_each: also after each operation of the softcap. With eval_stride 0, all three mean bf16",
        choices=("none", "bf16", "bf16_capped", "bf16_each"),
    )  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.num_kv_heads

    @property
    def fake_quantization(self) -> str | None:
        """`qat_dtype` if `qat` is on, else None."""
        return self.qat_dtype if self.qat else None

    @property
    def mlp_hidden(self) -> int:
        return int(self.model_dim * self.mlp_mult)

    @property
    def window(self) -> int:
        """Window length of the final evaluation, in tokens."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def seq_lengths(self) -> tuple[tuple[int, float], ...]:
        """Lengths of the training sequences, each with the finished fraction of training up to which it holds."""
        return parse_lengths(self.train_seq_schedule) or ((self.train_seq_len, 1.0),)

    @property
    def embedding_decay(self) -> float:
        return self.adam_wd if self.embed_wd == -1 else self.embed_wd

    @property
    def training_seconds(self) -> float:
        """Time limit of training in seconds: the wall-clock limit minus the reserve for GPTQ. 0: no limit."""
        return max(self.max_wallclock_seconds - self.gptq_reserve_seconds, 0.0)

    @property
    def pruning_target_bytes(self) -> int:
        return int(self.target_mb * (1 << 20))
