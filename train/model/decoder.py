"""One more token at a time: the logits of a growing text without computing its beginning again."""

from __future__ import annotations

import torch
from torch import Tensor

from train.common.wording import counted
from train.model.block import BlockInputs
from train.model.documents import Documents
from train.model.gpt import GPT, Shared
from train.model.head import head_logits
from train.model.key_values import KeyValues

# the gate reads the token before, whose trigram goes back two more
_PREDECESSORS = 3


class Decoder:
    """Feeds texts to a model token by token; each step's logits are those of `GPT.logits` on the whole text of `length` tokens.

    The rotary base is the one of the whole length from the first token on, as in an evaluation of the finished text.
    (#1392 recomputed everything for each length, with the base of the length so far; that keeps nothing and took 430
    s.)

    Args:
        model: in evaluation mode.
        rows: texts side by side, B.
        length: tokens of a finished text.
        recurrence: whether the repeated layers run twice.
    """

    def __init__(self, model: GPT, rows: int, length: int, *, recurrence: bool) -> None:
        config, device = model.config, model.embedding.weight.device
        plan = model.recurrent_plan if recurrence else model.plan
        shape = (rows, length, config.num_kv_heads, config.head_dim)
        self.model, self.recurrence = model, recurrence
        self.past = KeyValues(len(plan), shape, dtype=model.compute_dtype, device=device)
        self.ids = torch.empty(rows, length, dtype=torch.int64, device=device)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each text.

        Args:
            tokens: `(B,)` int64.

        Returns:
            Softcapped logits of the token after it, `(B, V)` float32 (float64 where the compute dtype is).

        Raises:
            ValueError: the texts are finished.
        """
        model, position = self.model, self.past.length
        if position == self.ids.shape[1]:
            raise ValueError(f"the texts have room for {counted(position, 'token')}, not for {position + 1}")
        self.ids[:, position] = tokens
        hidden = model.hidden_of(self._shared(position), recurrence=self.recurrence)
        return head_logits(hidden[:, 0], model.head_weight, model.config.logit_softcap)

    def _shared(self, position: int) -> Shared:
        """What the layers read at one position, from the few tokens that it depends on before the first layer."""
        begin, end = max(position - _PREDECESSORS, 0), position + 1
        window = self.model.embed(self.ids[:, begin:end], self.ids.shape[1])
        cosine, sine = window.inputs.rotary
        rotary = cosine[position:end], sine[position:end]
        documents = Documents.of(self.ids[:, :end]) if self.model.config.document_masking else None
        inputs = BlockInputs(window.inputs.x0[:, -1:], rotary, documents=documents, past=self.past)
        return Shared(inputs, None if window.values is None else window.values[:, -1:])
