"""One dataclass that holds every setting of a run.

A field's name in upper case is its environment variable, and the names are Parameter Golf's, so the published run
commands work as they stand. Precedence: command line `--field value` > environment > recipe > default. A name that
looks like a setting and is none, a value of the wrong type and a value out of range are `ConfigError`s, raised before
anything is allocated. The default of a setting that is added does what was done without it, so that older run folders
and artifacts keep their meaning.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.common.values import ConfigError, check_type, check_value, format_value, parse_steps, parse_text, setting

# settings that compute nothing: where a run writes, what it tells, when it saves
BOOKKEEPING = frozenset(
    {"run_id", "runs_dir", "resume", "checkpoint_every", "train_log_every", "loggers", "profile_steps"}
)
# with them, what belongs to a machine or to one seed and makes no other recipe
LOCAL = BOOKKEEPING | {"recipe", "seed", "data_path", "tokenizer_path", "device", "code_form"}

# the version that removed the settings below
REMOVED_IN = "0.2.0"

RETIRED: dict[str, tuple[Any, ...] | None] = {
    "adam_eps": (1e-8,),
    "beta1": (0.9,),
    "compute_dtype": ("auto",),
    "eval_batch_seqs": None,
    "eval_max_tokens": (0,),
    "eval_share_layer0": None,
    "gptq_act_order": (True,),
    "gptq_block_size": (128,),
    "gptq_calib_temperature": (0.8,),
    "gradient_reduction": ("after", "overlapped"),
    "norm_eps": (2**-23,),
    "normuon_beta2": (0.95,),
    "tied_embed_init_std": (0.005,),
    "unet_skips": (True,),
    "val_batch_size": None,
    "val_max_tokens": (0,),
}
"""Removed settings: name → the values that compute what every run computes today; None: any value.

A config.json or artifact that holds one of these values loads as if the setting were not there.
"""


@dataclass(frozen=True)
class Config:
    """Every setting of a run; see each field's `help`, or `python -m train --help`."""

    # run
    recipe: str = setting("quickstart", "recipe to start from: a file in train/recipes")
    run_id: str = setting("", "name of the run's folder; empty: <recipe>_<date>-<time>")
    runs_dir: str = setting("runs", "folder that holds the run folders")
    seed: int = setting(1337, "seeds python, numpy and torch", low=0, high=2**63 - 1)
    resume: str = setting(
        "never", "auto: go on from the run folder's checkpoint, if there is one", choices=("never", "auto")
    )
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: none", low=0)
    device: str = setting("auto", "auto takes CUDA where there is one", choices=("auto", "cpu", "cuda"))
    attention: str = setting(
        "auto", "attention back end; auto: the fastest that can run, measured before training",
        choices=("auto", "sdpa", "fa3", "fa4", "cudnn", "flash", "math"),
    )  # fmt: skip
    compile: str = setting("auto", "torch.compile the model; auto: on CUDA only", choices=("auto", "on", "off"))
    golf_backend: str = setting("", "back ends to force: triton, or newton_schulz=triton,int6=cuda; empty: none")

    # data
    data_path: str = setting("", "folder with *_train_*.bin and *_val_*.bin shards and the tokenizer")
    tokenizer_path: str = setting("", "SentencePiece model; empty: the one in data_path")
    corpus: str = setting("", "text that is turned into shards when data_path does not exist", choices=("", "stdlib"))
    vocab_size: int = setting(1024, "number of tokens, of the tokenizer and of the embedding", low=259, high=65536)
    train_seq_len: int = setting(1024, "tokens per training sequence", low=1)
    train_batch_tokens: int = setting(524288, "tokens per step over all ranks", low=1, high=2**31)
    loader: str = setting("sequential", "order of the training tokens", choices=("sequential", "shuffled", "coprime"))
    document_masking: bool = setting(False, "keep attention and SmearGate inside documents")

    # model
    num_layers: int = setting(9, "transformer blocks", low=1, high=1024)
    model_dim: int = setting(512, "width of the residual stream", low=8, high=65536)
    num_heads: int = setting(8, "query heads", low=1)
    num_kv_heads: int = setting(4, "key and value heads", low=1)
    mlp_mult: float = setting(2.0, "hidden width of the MLP over model_dim", low=0.01, high=1024.0)
    mlp_slope: float = setting(0.0, "slope of LeakyReLU before the square; 0 is ReLU²", low=0.0, high=0.999)
    rope_base: float = setting(10000.0, "base of the rotary frequencies", low=1.0)
    rope_dims: int = setting(0, "rotary dimensions per head; 0: the whole head", low=0)
    rope_train_seq_len: int = setting(1024, "beyond this length the base grows by the NTK rule", low=1)
    qk_gain_init: float = setting(1.5, "initial gain of each query head after QK-norm")
    logit_softcap: float = setting(30.0, "logits are cap * tanh(logits / cap)", low=1e-3)
    embed_dtype: str = setting(
        "bfloat16", "dtype of the embedding tables and their moments", choices=("bfloat16", "float32")
    )
    orthogonal_init: bool = setting(False, "orthogonal instead of Kaiming-uniform matrices")
    ln_scale: bool = setting(False, "scale the norm of layer l by 1/sqrt(l+1)")
    xsa_last_n: int = setting(0, "the last n layers remove the value direction from attention's output", low=0)
    smear_gate: str = setting(
        "off", "blend each token with its predecessor: as published, or without leaking across documents",
        choices=("off", "published", "document"),
    )  # fmt: skip
    bigram_vocab_size: int = setting(0, "rows of the hashed bigram table; 0: none", low=0, high=2**24)
    bigram_dim: int = setting(128, "width of the hashed bigram table", low=1, high=65536)
    trigram: bool = setting(False, "look trigrams up in the bigram table too, and add both")
    ve_dim: int = setting(0, "width of the shared value embedding; 0: none", low=0, high=65536)
    ve_layers: tuple[int, ...] = setting((), "layers whose values get the shared embedding")
    ve_proj_optimizer: str = setting("muon", "who trains the value embedding's projection", choices=("muon", "adamw"))
    skip_gates: bool = setting(False, "sigmoid gate on each U-Net skip")
    parallel_start_layer: int = setting(-1, "from this layer on attention and MLP run in parallel; -1: never", low=-1)
    parallel_form: str = setting(
        "gptj",
        "gptj: one stream, both read the same input; lanes: two streams, merged at the end",
        choices=("gptj", "lanes"),
    )
    recur_layers: tuple[int, ...] = setting((), "layers that run twice")
    recur_form: str = setting(
        "unroll", "unroll: repeat the layers in the order; blend: average the repeat into the encoder's stream",
        choices=("unroll", "blend"),
    )  # fmt: skip
    recur_start_step: int = setting(0, "step from which the repetition is on", low=0)
    recur_scale_params: int = setting(
        0, "vectors of model_dim that are counted and saved but never trained (#1392)", low=0, high=1024
    )

    # optimization
    iterations: int = setting(20000, "steps, unless the clock ends first", low=1)
    max_wallclock_seconds: float = setting(600.0, "training ends here; 0: no cap", low=0.0)
    gptq_reserve_seconds: float = setting(0.0, "part of the wall clock kept for calibration", low=0.0)
    warmup_steps: int = setting(20, "steps before the clock, after which weights and optimizer are restored", low=0)
    warmdown_iters: int = setting(
        1200, "steps over which the learning rate falls at the end (measured in time under a cap)", low=0
    )
    warmdown_frac: float = setting(
        0.0, "fraction of the time over which the rate falls; > 0 replaces warmdown_iters", low=0.0, high=1.0
    )
    matrix_lr: float = setting(0.04, "learning rate of the matrices (Muon)", low=0.0)
    tied_embed_lr: float = setting(0.05, "learning rate of the embeddings (AdamW)", low=0.0)
    scalar_lr: float = setting(0.04, "learning rate of vectors and scalars (AdamW)", low=0.0)
    muon_momentum: float = setting(0.95, "momentum of Muon", low=0.0, high=0.9999)
    muon_momentum_warmup_start: float = setting(0.85, "momentum at step 0", low=0.0, high=0.9999)
    muon_momentum_warmup_steps: int = setting(500, "steps over which the momentum rises", low=0)
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", low=1, high=20)
    muon_coefficients: str = setting(
        "quintic", "Newton-Schulz coefficients: a name in golf_kernels.newton_schulz.COEFFICIENTS"
    )
    muon_wd: float = setting(0.0, "decoupled weight decay of the matrices", low=0.0)
    muon_eq_r: bool = setting(False, "normalize rows before Newton-Schulz (MuonEq-R)")
    muon_row_eps: float = setting(1e-7, "added to a row's squared norm in MuonEq-R", low=0.0)
    normuon: bool = setting(False, "normalize rows after Newton-Schulz by their running second moment (NorMuon)")
    beta2: float = setting(0.95, "AdamW's second decay", low=0.0, high=0.99999)
    adam_wd: float = setting(0.0, "decoupled weight decay of whatever AdamW trains", low=0.0)
    embed_wd: float = setting(-1.0, "decoupled weight decay of the embeddings; -1: adam_wd", low=-1.0)
    optimizer_graph: str = setting(
        "auto", "replay clipping, Muon and AdamW as CUDA graphs; auto: where Muon's step is the fused one",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    grad_clip_norm: float = setting(0.0, "largest norm of the whole gradient; 0: no clipping", low=0.0)
    ema_decay: float = setting(
        0.0, "decay of the weights' moving average, which is what is scored; 0: none", low=0.0, high=0.99999
    )
    swa_enabled: bool = setting(False, "average checkpoints from the end of the run; the average is what is scored")
    swa_every: int = setting(200, "steps between the checkpoints that are averaged", low=1)
    swa_start_frac: float = setting(
        0.5, "averaging begins when the rate has fallen below this fraction", low=0.0, high=1.0
    )
    qat: bool = setting(False, "train through fake-quantized int6 matrices, straight-through, from step 0")

    # quantization and artifact
    quantizer: str = setting("gptq", "how matrices are rounded", choices=("gptq", "rtn"))
    matrix_bits: int = setting(6, "bits of the matrices' codes", low=2, high=8)
    embed_bits: int = setting(
        8, "bits of the embeddings' codes; 16 keeps them in float16", choices=(2, 3, 4, 5, 6, 7, 8, 16)
    )
    tied_embed_bits: int = setting(
        0, "bits of the tied embedding's codes; 0: embed_bits", choices=(0, 2, 3, 4, 5, 6, 7, 8, 16)
    )
    matrix_clip: str = setting(
        "sdclip",
        "row clip of the matrices: a name in train.quantize.row_scales",
        choices=("sdclip", "hessian_sdclip", "row_max", "quantile", "percentile_search"),
    )
    matrix_clip_sigmas: float = setting(12.85, "SDClip: row clip of the matrices in deviations", low=0.1)
    embed_clip_sigmas: float = setting(20.0, "SDClip: row clip of the embeddings in deviations", low=0.1)
    embed_clip: str = setting("sdclip", "row clip of the embeddings", choices=("sdclip", "row_max", "quantile"))
    scale_floor: str = setting(
        "published",
        "smallest row scale: 1/(2^(bits-1)-1) as most records have it, or 1e-10",
        choices=("published", "none"),
    )
    gptq_calib_source: str = setting(
        "train",
        "text for the Hessians: training batches, or what the model writes itself",
        choices=("train", "generated"),
    )
    gptq_calib_graph: str = setting(
        "evaluated", "function for the Hessians: the one evaluated, or plain, without repeated and parallel layers (#1392)",
        choices=("evaluated", "plain"),
    )  # fmt: skip
    gptq_calib_batches: int = setting(
        64, "training batches, or sequences of train_seq_len tokens that the model writes, for the Hessians", low=1
    )
    gptq_tied_embed: bool = setting(
        False, "round the tied embedding by GPTQ too, on the final norm's outputs (#1394), not to nearest"
    )
    gptq_damp: float = setting(0.01, "damping, as a fraction of the Hessian's mean diagonal", low=0.0)
    passthrough_max_elements: int = setting(65536, "tensors of at most this many elements stay in float16", low=0)
    codec: str = setting(
        "brotli", "entropy coder of the artifact", choices=("brotli", "zstd", "lzma", "zlib", "ans", "raw", "raw6")
    )
    target_bytes: int = setting(
        0, "search the row clips (SDClip's k) so that code and model take at most so many bytes; 0: as set", low=0
    )
    target_mb: float = setting(
        0.0, "prune codes ±1 until code and model take so many MiB (1,048,576 bytes, as published); 0: never", low=0.0
    )
    prune_excess: int = setting(
        0, "prune so many codes ±1 per byte over the cap, if code and model are over it (#1471: 8); 0: none", low=0
    )
    code_form: str = setting(
        "wrapped", "code that counts: one script of all that a run uses, plain, or compressed to text or bytes",
        choices=("plain", "wrapped", "raw"),
    )  # fmt: skip
    max_artifact_bytes: int = setting(16_000_000, "cap on code plus model, decimal bytes", low=1)

    # validation and evaluation
    val_loss_every: int = setting(1000, "steps between validations; 0: only first and last", low=0)
    profile_steps: str = setting("", "profile these steps into the run folder, FIRST:END, such as 30:33; empty: none")
    loggers: str = setting("", "also log to tensorboard, wandb, or both, separated by a comma; empty: files alone")
    train_log_every: int = setting(200, "steps between log lines of the training loss", low=1)
    eval_seq_len: int = setting(0, "window of the final evaluation; 0: train_seq_len", low=0)
    eval_stride: int = setting(64, "new tokens per window; 0: only non-overlapping windows", low=0)
    eval_rule: str = setting(
        "once", "which positions a window scores: once (every token once), or the older published rules",
        choices=("once", "overlap_tail", "full_windows"),
    )  # fmt: skip
    paid_prefix_file: str = setting(
        "", "blob of validation targets that cost no nats (#262); NOT COMPLIANT, for checking the published arithmetic"
    )
    logits_rounding: str = setting("none", "round logits before the softcap", choices=("none", "bf16"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, _TYPES[field.name], getattr(self, field.name))
        _check_together(self)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.num_kv_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.model_dim * self.mlp_mult)

    @property
    def window(self) -> int:
        """Tokens per window of the final evaluation."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def embedding_decay(self) -> float:
        """Weight decay of the embeddings."""
        return self.adam_wd if self.embed_wd == -1 else self.embed_wd

    @property
    def training_seconds(self) -> float:
        """Wall clock for training steps alone; 0 means no cap."""
        return max(self.max_wallclock_seconds - self.gptq_reserve_seconds, 0.0)

    @property
    def pruning_target_bytes(self) -> int:
        """`target_mb` in bytes."""
        return int(self.target_mb * (1 << 20))

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`, which also reads the settings of earlier versions.

        Raises:
            ConfigError: an unknown name, a bad value, or a removed setting with a value that is no longer supported.
        """
        converted: dict[str, Any] = {}
        for name, value in values.items():
            typed = tuple(value) if isinstance(value, list) else value
            if name in RETIRED:
                _check_retired(name, typed)
                continue
            if name == "code_form" and typed in ("minified", "sources"):
                # forms removed in 0.2.0: quantized again, such a run counts the compressed script
                typed = "wrapped"
            field = _FIELDS.get(name) or _unknown(name)
            check_type(name, _TYPES[field.name], typed)
            converted[name] = typed
        return cls(**converted)


_FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TYPES = typing.get_type_hints(Config)


def field_names() -> tuple[str, ...]:
    return tuple(_FIELDS)


def field_help(name: str) -> str:
    """A field's one-line description with its choices and default, for `--help`."""
    field = _FIELDS[name]
    choices = f" ({', '.join(map(str, field.metadata['choices']))})" if field.metadata["choices"] else ""
    return f"{field.metadata['help']}{choices} [{format_value(field.default)}]"


def refuse_retired(name: str, source: str) -> None:
    """Raise a ConfigError if `name` is a removed setting; `source` is how it was given, such as `--name`."""
    if name in RETIRED:
        raise ConfigError(f"{source}: {name} was removed in {REMOVED_IN}: leave it out")


def parse_value(name: str, text: str, source: str) -> Any:
    """Turn the text of an environment variable or flag into the type of field `name`; see `parse_text`."""
    return parse_text(_TYPES[name], text, source)


def nearest(name: str) -> str:
    """A hint naming the field closest to `name`, or nothing."""
    close = difflib.get_close_matches(name.lower(), field_names(), n=1, cutoff=0.6)
    return f"; did you mean {close[0].upper() if name.isupper() else close[0]}?" if close else ""


def _unknown(name: str) -> typing.NoReturn:
    raise ConfigError(f"{name}: no such setting{nearest(name)}")


def _check_retired(name: str, value: Any) -> None:
    supported = RETIRED[name]
    if supported is not None and value not in supported:
        raise ConfigError(
            f"{name}={format_value(value)}: {name} was removed in {REMOVED_IN}, which supports only "
            f"{format_value(supported[0])}: use an earlier version of golf_kernels for this file"
        )


def _check_together(c: Config) -> None:
    """Refuse values that are each allowed but contradict each other."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    need(c.model_dim % c.num_heads == 0, f"model_dim {c.model_dim} is not a multiple of num_heads {c.num_heads}")
    need(
        c.num_heads % c.num_kv_heads == 0, f"num_heads {c.num_heads} is not a multiple of num_kv_heads {c.num_kv_heads}"
    )
    need(c.head_dim % 2 == 0, f"head size {c.head_dim} is odd: rotary embeddings need pairs")
    need(
        c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim,
        f"rope_dims {c.rope_dims} must be even and at most the head size {c.head_dim}",
    )
    need(
        float(c.model_dim * c.mlp_mult).is_integer(),
        f"mlp_mult {c.mlp_mult} times model_dim {c.model_dim} is not a whole number of hidden units",
    )
    need(c.xsa_last_n <= c.num_layers, f"xsa_last_n {c.xsa_last_n} is more than num_layers {c.num_layers}")
    for name, layers in (("ve_layers", c.ve_layers), ("recur_layers", c.recur_layers)):
        need(
            all(0 <= layer < c.num_layers for layer in layers),
            f"{name} {layers} names a layer outside 0..{c.num_layers - 1}",
        )
        need(list(layers) == sorted(set(layers)), f"{name} {layers} must rise without repeats")
    recurring = c.recur_layers
    need(
        c.recur_form != "unroll" or not recurring or recurring[-1] - recurring[0] + 1 == len(recurring),
        f"recur_layers {recurring} must be consecutive for recur_form unroll",
    )
    need(
        c.parallel_start_layer < c.num_layers,
        f"parallel_start_layer {c.parallel_start_layer} is not below num_layers {c.num_layers}",
    )
    need(
        c.train_batch_tokens % c.train_seq_len == 0,
        f"train_batch_tokens {c.train_batch_tokens} is not a multiple of train_seq_len {c.train_seq_len}",
    )
    need(
        c.quantizer == "gptq" or c.matrix_clip != "hessian_sdclip",
        "matrix_clip hessian_sdclip needs Hessians, which only quantizer gptq has",
    )
    need(
        not c.qat or c.matrix_bits == 6,
        f"qat trains with 6-bit rows, but matrix_bits is {c.matrix_bits}: set MATRIX_BITS=6 or QAT=0",
    )
    need(
        not c.target_bytes or c.matrix_clip in ("sdclip", "hessian_sdclip"),
        f"target_bytes searches the k of SDClip, but matrix_clip is {c.matrix_clip}: set MATRIX_CLIP=sdclip",
    )
    need(c.bigram_vocab_size != 1, "bigram_vocab_size 1 leaves no row to hash into: set 0 for no table, or at least 2")
    need(
        not c.trigram or c.bigram_vocab_size > 0,
        "trigram uses the bigram table, but there is none: set BIGRAM_VOCAB_SIZE, or TRIGRAM=0",
    )
    need(bool(c.ve_dim) == bool(c.ve_layers), "ve_dim and ve_layers belong together: set both or neither")
    need(c.embed_wd == -1 or c.embed_wd >= 0, f"embed_wd {c.embed_wd} is negative: set at least 0, or -1 for adam_wd")
    need(
        not (c.swa_enabled and c.ema_decay),
        "swa_enabled and ema_decay both average the weights: set SWA_ENABLED=0 or EMA_DECAY=0",
    )
    need(
        c.max_wallclock_seconds == 0 or c.gptq_reserve_seconds < c.max_wallclock_seconds,
        f"gptq_reserve_seconds {c.gptq_reserve_seconds} leaves no time of max_wallclock_seconds {c.max_wallclock_seconds}",
    )
    steps = parse_steps(c.profile_steps)
    need(
        not steps or steps.start < c.iterations,
        f"profile_steps {c.profile_steps} starts after the last of {c.iterations} iterations: choose earlier steps",
    )
