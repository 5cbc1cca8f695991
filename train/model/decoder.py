"""Generation token by token with a cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from train.common.wording import counted
from train.model.attention import KeyValues
from train.model.block import BlockInputs
from train.model.documents import Documents
from train.model.gpt import GPT, Shared
from train.model.head import head_logits

# the smear gate reads the previous token, whose trigram reads two more
_PREDECESSORS = 3


class Decoder:
    """Feeds `rows` texts of `length` tokens to a model in evaluation mode, some tokens at a time.

    Each step returns what `GPT.logits` returns for the finished text: the rotary base is that of `length` from the first
    token on. (#1392 kept no cache. It recomputed the text for every length, with that length's base, in 430 s.)
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
        """Append `tokens` `(B, n)` int64, n to each text; softcapped logits of the next token, `(B, V)` float32.

        The logits are float64 if the compute dtype is.

        Raises:
            ValueError: the texts would be longer than `length`.
        """
        model, position = self.model, self.past.length
        end, length = position + tokens.shape[1], self.ids.shape[1]
        if end > length:
            raise ValueError(f"the texts end after {counted(length, 'token')}: no token {end}")
        self.ids[:, position:end] = tokens
        hidden = model.hidden_of(self._shared(position, end), recurrence=self.recurrence)
        return head_logits(hidden[:, -1], model.head_weight, model.config.logit_softcap)

    def _shared(self, position: int, end: int) -> Shared:
        """`GPT.embed` from `position` to `end`, computed from these tokens and the last few before them."""
        begin, new = max(position - _PREDECESSORS, 0), end - position
        window = self.model.embed(self.ids[:, begin:end], self.ids.shape[1])
        cosine, sine = window.inputs.rotary
        rotary = cosine[position:end], sine[position:end]
        documents = Documents.of(self.ids[:, :end]) if self.model.config.document_masking else None
        inputs = BlockInputs(window.inputs.x0[:, -new:], rotary, documents=documents, past=self.past)
        return Shared(inputs, None if window.values is None else window.values[:, -new:])


def sample(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Draw tokens by inversion: the first one at which the cumulative softmax(logits / temperature) exceeds the draw.

    Temperature 0 takes the likeliest token, the first of several. `logits` is `(B, V)`, `draws` `(B,)` float64 in [0, 1),
    the result `(B,)` int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # the last sum is 1 only up to rounding; keep every draw below it
    total = cumulative[:, -1]
    places = torch.minimum(draws * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, places[:, None], right=True).squeeze(1)
