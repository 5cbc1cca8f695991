"""Settings that must fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.common.values import ConfigError, parse_steps

if TYPE_CHECKING:
    from train.config import Config


def check_consistency(config: Config) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: the message names them.
    """

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    need(
        config.model_dim % config.num_heads == 0,
        f"model_dim {config.model_dim} is not a multiple of num_heads {config.num_heads}: choose widths that divide",
    )
    need(
        config.num_heads % config.num_kv_heads == 0,
        f"num_heads {config.num_heads} is not a multiple of num_kv_heads {config.num_kv_heads}: query heads share key heads in equal groups",
    )
    need(config.head_dim % 2 == 0, f"head size {config.head_dim} is odd: rotary embeddings need pairs")
    need(
        config.rope_dims % 2 == 0 and config.rope_dims <= config.head_dim,
        f"rope_dims {config.rope_dims} must be even and at most the head size {config.head_dim}",
    )
    need(
        float(config.model_dim * config.mlp_mult).is_integer(),
        f"mlp_mult {config.mlp_mult} times model_dim {config.model_dim} is not a whole hidden width",
    )
    need(
        config.xsa_last_n <= config.num_layers,
        f"xsa_last_n {config.xsa_last_n} is more than num_layers {config.num_layers}",
    )
    for name in ("ve_layers", "recur_layers"):
        layers = getattr(config, name)
        need(
            all(0 <= layer < config.num_layers for layer in layers),
            f"{name} {layers} names a layer outside 0..{config.num_layers - 1}",
        )
        need(
            len(set(layers)) == len(layers) and list(layers) == sorted(layers),
            f"{name} {layers} must rise without repeats",
        )
    need(
        config.recur_form != "unroll"
        or not config.recur_layers
        or config.recur_layers[-1] - config.recur_layers[0] + 1 == len(config.recur_layers),
        f"recur_layers {config.recur_layers} must be consecutive for recur_form unroll",
    )
    need(
        config.parallel_start_layer < config.num_layers,
        f"parallel_start_layer {config.parallel_start_layer} is not below num_layers {config.num_layers}",
    )
    need(
        config.train_batch_tokens % config.train_seq_len == 0,
        f"train_batch_tokens {config.train_batch_tokens} is not a multiple of train_seq_len {config.train_seq_len}: a step "
        "holds whole sequences",
    )
    need(
        config.quantizer == "gptq" or config.matrix_clip != "hessian_sdclip",
        "matrix_clip hessian_sdclip needs the Hessians of quantizer gptq",
    )
    need(
        not config.qat or config.matrix_bits == 6,
        f"qat trains through 6-bit rows, but matrix_bits is {config.matrix_bits}: set MATRIX_BITS=6 or QAT=0",
    )
    need(
        not config.target_bytes or config.matrix_clip in ("sdclip", "hessian_sdclip"),
        f"target_bytes searches the k of SDClip, and matrix_clip {config.matrix_clip} has none: set MATRIX_CLIP=sdclip",
    )
    need(config.bigram_vocab_size != 1, "bigram_vocab_size 1 has no row to hash into: set 0 for none, or at least 2")
    need(
        not config.trigram or config.bigram_vocab_size > 0,
        "trigram looks its rows up in the bigram table, and there is none: set BIGRAM_VOCAB_SIZE, or TRIGRAM=0",
    )
    need(bool(config.ve_dim) == bool(config.ve_layers), "ve_dim and ve_layers belong together: set both or neither")
    need(
        config.embed_wd == -1 or config.embed_wd >= 0,
        f"embed_wd {config.embed_wd} is negative: set a decay of at least 0, or -1 for that of adam_wd",
    )
    need(
        not (config.swa_enabled and config.ema_decay),
        "swa_enabled and ema_decay both average the weights: set SWA_ENABLED=0 or EMA_DECAY=0",
    )
    need(
        config.max_wallclock_seconds == 0 or config.gptq_reserve_seconds < config.max_wallclock_seconds,
        f"gptq_reserve_seconds {config.gptq_reserve_seconds} leaves nothing of max_wallclock_seconds {config.max_wallclock_seconds}",
    )
    profiled = parse_steps(config.profile_steps)
    need(
        not profiled or profiled.start < config.iterations,
        f"profile_steps {config.profile_steps} begins behind the last of {config.iterations} iterations: choose earlier steps",
    )
