"""The complete model, as the settings describe it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from golf_kernels import cpu
from train.common import hardware
from train.config import Config
from train.model.attention import Heads
from train.model.block import Block, BlockInputs
from train.model.documents import Documents, document_starts
from train.model.embeddings import BigramHash, TokenEmbedding, ValueEmbedding, projects
from train.model.head import Head, head_logits
from train.model.init import constant, parameter
from train.model.linear import observe
from train.model.norm import rms_norm
from train.model.order import Step, make_plan, skip_count
from train.model.rope import ntk_base, rotary_table
from train.model.skips import UNetSkips
from train.model.smear import PositionSmearGate, SmearGate

_BLEND = 0.5
_LANE_RESID = 1.1
# from this model width on, training on a CPU with bfloat16 products is faster in bfloat16 than in float32
_WIDE = 128


class Lanes(NamedTuple):
    """The residual stream x `(B, T, d)` between two layers.

    Where layers run in lanes (see `Block`), x is the lane of attention and `mlp_lane` the lane of the MLP.
    """

    x: Tensor
    mlp_lane: Tensor | None = None


class Shared(NamedTuple):
    """Tensors that all layers of a forward pass share: `inputs` without extra values, and the value embedding h."""

    inputs: BlockInputs
    values: Tensor | None


def resolve_compute_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the forward pass, bfloat16 or float32.

    It is bfloat16 on a GPU, and on a CPU that has bfloat16 products if the model is wide.
    """
    device = hardware.auto_device() if config.device == "auto" else config.device
    if device == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if config.model_dim >= _WIDE and cpu.multiplies_bfloat16() else torch.float32


class GPT(nn.Module):
    """A Parameter Golf transformer with tied embeddings.

    Weights are float32. Embeddings have the dtype `config.embed_dtype`. The forward pass casts both to `compute_dtype`.
    If the argument `recurrence` of a method is True, the layers in `recur_layers` run again. `recurrence` is a Python
    bool, so a compiled model has two static graphs.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, tables = config.model_dim, getattr(torch, config.embed_dtype)
        orthogonal, qat = config.orthogonal_init, config.fake_quantization
        self.config = config
        self.compute_dtype = resolve_compute_dtype(config)
        self.plan = make_plan(config, recurrence=False)
        self.recurrent_plan = make_plan(config, recurrence=True)
        self.embedding = TokenEmbedding(config.vocab_size, dim, tables)
        self.bigram = self.smear = self.skips = self.ve = None
        if config.bigram_vocab_size:
            self.bigram = BigramHash(
                config.bigram_vocab_size, config.bigram_dim, dim, config.num_layers,
                project=projects(config, config.bigram_dim, dim), orthogonal=orthogonal, dtype=tables, qat=qat, trigram=config.trigram,
            )  # fmt: skip
        if config.smear_gate != "off":
            self.smear = SmearGate(dim) if config.smear_gate == "published" else PositionSmearGate(dim)
        if config.ve_dim:
            self.ve = ValueEmbedding(
                config.vocab_size, config.ve_dim, config.kv_dim, config.ve_layers,
                project=projects(config, config.ve_dim, config.kv_dim), orthogonal=orthogonal, dtype=tables, qat=qat,
            )  # fmt: skip
        if skip_count(config):
            self.skips = UNetSkips(skip_count(config), dim, gated=config.skip_gates)
        # cast, because nn.ModuleList does not know the type of its elements
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config, layer) for layer in range(config.num_layers)))
        self.head = Head(config.logit_softcap)
        lanes = any(step.form == "lanes" for step in self.plan)
        self.lane_mix = constant(0.5) if lanes else None
        self.lane_resid = self.lane_post = None
        if any(step.form == "routed" for step in self.plan):
            # as in the published script, layers before the lanes have rows too
            self.lane_resid = constant(_LANE_RESID, config.num_layers, 2)
            self.lane_post = constant(1.0, config.num_layers, 2, 2)
        # #1945 stores these caps, but never trains them
        caps = torch.full((config.softcap_params,), config.logit_softcap)
        self.softcaps = parameter(caps, trained=False) if len(caps) else None
        # #1392 stores these vectors, but never trains them
        scales = torch.full((config.recur_scale_params, dim), _BLEND)
        self.recur_scales = parameter(scales, trained=False) if len(scales) else None

    @property
    def head_weight(self) -> Tensor:
        """The tied embedding `(V, d)` in the compute dtype."""
        return self.embedding.weight.to(self.compute_dtype)

    def forward(self, ids: Tensor, targets: Tensor, *, recurrence: bool, longest: int = 0) -> Tensor:
        """Compute the loss; see the method `loss`."""
        return self.loss(ids, targets, recurrence=recurrence, longest=longest)

    def loss(self, ids: Tensor, targets: Tensor, *, recurrence: bool, longest: int = 0) -> Tensor:
        """Compute the mean cross-entropy of the softcapped logits, in nats per token.

        `ids` `(B, T)` int64 are the input tokens, `targets` `(B, T)` the tokens to predict. The result is a float32
        scalar (float64 if the compute dtype is float64). `longest` as for `embed`.
        """
        hidden = self.hidden_of(self.embed(ids, longest=longest), recurrence=recurrence).flatten(0, 1)
        loss: Tensor = self.head(hidden, self.head_weight, targets.flatten())
        return loss

    def logits(self, ids: Tensor, *, recurrence: bool) -> Tensor:
        """Compute softcapped logits `(B, T, V)` of `ids` `(B, T)`, in float32 (float64 for compute dtype float64)."""
        return head_logits(self.hidden(ids, recurrence=recurrence), self.head_weight, self.config.logit_softcap)

    def hidden(self, ids: Tensor, *, recurrence: bool, rows_from: int = 0) -> Tensor:
        """Compute the input of the output head for `ids` `(B, T)`: `(B, T - rows_from, d)` in the compute dtype.

        In the last layer, positions before `rows_from` only provide keys and values.
        """
        return self.hidden_of(self.embed(ids), recurrence=recurrence, rows_from=rows_from)

    def overlapping_hidden(
        self, text: Tensor, *, windows: int, stride: int, recurrence: bool, rows_from: int
    ) -> Tensor:
        """Compute `hidden` for overlapping windows of a text: `(windows, T - rows_from, d)`.

        Window b has T tokens and begins at token b * stride of `text`, `(T + (windows - 1) * stride,)` int64.
        Embeddings and layer 0's queries, keys and values are computed once per token, not once per window.

        Raises:
            RuntimeError: `overlap_problem` says that the result would differ from `hidden`.
        """
        if self.overlap_problem is not None:
            raise RuntimeError(f"windows cannot share layer 0: {self.overlap_problem}")
        length = len(text) - (windows - 1) * stride
        once = self.embed(text[None], length)
        inputs = self._inputs(self.plan[0].layer, once)
        block = self.blocks[self.plan[0].layer]
        query, key, value = block.attention.heads(block.mix_and_norm(inputs.x0, inputs.x0)[1], inputs.extra_value)

        def in_windows(x: Tensor) -> Tensor:
            # return a view, so that overlapping windows share memory
            return x[0].unfold(0, length, stride).movedim(-1, 1)

        documents = None if inputs.documents is None else Documents(in_windows(inputs.documents.starts))
        everywhere = BlockInputs(in_windows(inputs.x0), inputs.rotary, None, documents)
        shared = Shared(everywhere, None if once.values is None else in_windows(once.values))
        heads = (in_windows(query), in_windows(key), in_windows(value))
        return self.hidden_of(shared, recurrence=recurrence, rows_from=rows_from, heads=heads)

    def hidden_of(self, shared: Shared, *, recurrence: bool, rows_from: int = 0, heads: Heads | None = None) -> Tensor:
        """Compute the result of the method `hidden` from `shared`, the result of `embed`.

        `heads` is the result of `Attention.heads` for layer 0, if already computed.
        """
        plan = self.recurrent_plan if recurrence else self.plan
        lanes = Lanes(shared.inputs.x0)
        saved: dict[int, Tensor] = {}
        for index, step in enumerate(plan[:-1]):
            lanes = self._run(step, self._enter(step, lanes, saved), shared, heads=None if index else heads)
            if step.saves:
                saved[index] = lanes.x
        lanes = self._run(plan[-1], self._enter(plan[-1], lanes, saved), shared, rows_from)
        hidden = rms_norm(self._merge(lanes))
        observe(self.embedding.weight, hidden)
        return hidden

    @property
    def overlap_problem(self) -> str | None:
        """The reason why the results of `overlapping_hidden` and `hidden` would differ; None: they agree."""
        if self.smear is not None or self.bigram is not None:
            return "smear gate and bigrams read the previous token, which a window's first token lacks"
        if self.plan[0].form in ("lanes", "routed") or len(self.plan) == 1:
            return "layer 0 is the first in lanes, or the last"
        return None

    def embed(self, ids: Tensor, length: int | None = None, longest: int = 0) -> Shared:
        """Compute x0, the rotary table and the value embedding, which all layers share.

        x0 = smear(rms(E[ids] + bigram)), or with `smear_gate` "embedding" rms(smear(E[ids] + bigram)).

        Args:
            ids: `(B, T)` int64 token ids.
            length: number of positions in the rotary table; None: T.
            longest: with `document_masking`, documents are cut to at most this many tokens; 0: they are not.
        """
        config, dtype = self.config, self.compute_dtype
        x = self.embedding(ids, dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, dtype)
        if self.smear is not None and config.smear_gate == "embedding":
            x = rms_norm(self.smear(x, document_starts(ids) if config.smear_gate_bos_fix else None))
        elif self.smear is not None:
            masked = config.document_masking or config.smear_gate == "document"
            x = self.smear(rms_norm(x), document_starts(ids) if masked else None)
        else:
            x = rms_norm(x)
        length, rotary_dims = length or ids.shape[1], config.rope_dims or config.head_dim
        base, kind = config.rope_base, config.rotary_table
        if config.rope_scaling == "ntk" and length > config.rope_train_seq_len:
            # beyond the training length the published scripts compute new frequencies, in float32
            base, kind = ntk_base(base, rotary_dims, length, config.rope_train_seq_len), "exact"
        rotary = rotary_table(length, rotary_dims, base, kind=kind, dtype=dtype, device=ids.device)
        documents = Documents.of(ids, longest) if config.document_masking else None
        values = None if self.ve is None else self.ve(ids, dtype)
        return Shared(BlockInputs(x, rotary, None, documents), values)

    def _enter(self, step: Step, lanes: Lanes, saved: dict[int, Tensor]) -> Lanes:
        """Add the U-Net skip of the step. Before the first layer in lanes, copy the residual stream to the MLP's lane.

        With `parallel_form` "lanes" the copy includes the skip (#1471), with "routed" it does not (#1530).
        """
        x, mlp_lane = lanes
        if step.form == "routed" and mlp_lane is None:
            mlp_lane = x
        if step.skip is not None and self.skips is not None:
            row, source = step.skip
            x = self.skips(x, saved[source], row)
        return Lanes(x, x if step.form == "lanes" and mlp_lane is None else mlp_lane)

    def _merge(self, lanes: Lanes) -> Tensor:
        x, mlp_lane = lanes
        if mlp_lane is None:
            return x
        if self.lane_mix is None:
            return 0.5 * (x + mlp_lane)
        return mlp_lane + self.lane_mix.to(x.dtype) * (x - mlp_lane)

    def _inputs(self, layer: int, shared: Shared) -> BlockInputs:
        if shared.values is None or self.ve is None:
            return shared.inputs
        return shared.inputs._replace(extra_value=self.ve.of_layer(layer, shared.values))

    def _run(self, step: Step, lanes: Lanes, shared: Shared, rows_from: int = 0, heads: Heads | None = None) -> Lanes:
        block, inputs = self.blocks[step.layer], self._inputs(step.layer, shared)
        if heads is not None:
            inputs = inputs._replace(heads=heads)
        if lanes.mlp_lane is not None and self.lane_resid is not None and self.lane_post is not None:
            routes = self.lane_resid[step.layer], self.lane_post[step.layer]
            return Lanes(*block.run_routed((lanes.x, lanes.mlp_lane), routes, inputs, rows_from=rows_from))
        if lanes.mlp_lane is not None:
            return Lanes(*block.run_lanes(lanes.x, lanes.mlp_lane, inputs, rows_from=rows_from))
        output = block(lanes.x, inputs, form=step.form, rows_from=rows_from)
        # blending x with the output needs all rows: only encoder layers are blended, and their rows_from is 0
        if step.blend is not None:
            output = torch.lerp(lanes.x, output, self._blend_weight(step.blend, output.dtype))
        return Lanes(output)

    def _blend_weight(self, repeat: int, dtype: torch.dtype) -> Tensor | float:
        if self.recur_scales is not None and repeat < len(self.recur_scales):
            return self.recur_scales[repeat].to(dtype)
        return _BLEND
