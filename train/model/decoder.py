"""Generates texts token by token with a KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from train.common.wording import counted
from train.model.attention import KeyValues
from train.model.block import BlockInputs
from train.model.documents import Documents
from train.model.gpt import GPT, Shared
from train.model.head import head_logits

# a token's embedding depends on this many earlier tokens: the smear gate reads the previous embedding, whose trigram
# reads two more tokens
_PREDECESSORS = 3


class Decoder:
    """Feeds `rows` texts to a model in evaluation mode, some tokens per step. The complete texts have `length` tokens.

    Each step returns the logits that `GPT.logits` returns for the complete texts, because every step uses the rotary
    base of `length` tokens. (#1392 has no cache: for each token it computes the whole text again, with the rotary base
    of the current length. This takes 430 s.)
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
        """Append n tokens to each text: `tokens` is `(B, n)` int64.

        Returns:
            Softcapped logits of the next token, `(B, V)` float32 (float64 if the model computes in float64).

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
        """Compute the result of `GPT.embed` for positions `position` to `end`. This also needs a few earlier tokens."""
        begin, new = max(position - _PREDECESSORS, 0), end - position
        window = self.model.embed(self.ids[:, begin:end], self.ids.shape[1])
        cosine, sine = window.inputs.rotary
        rotary = cosine[position:end], sine[position:end]
        documents = Documents.of(self.ids[:, :end]) if self.model.config.document_masking else None
        inputs = BlockInputs(window.inputs.x0[:, -new:], rotary, documents=documents, past=self.past)
        return Shared(inputs, None if window.values is None else window.values[:, -new:])


def sample(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Draw a token for each row of logits, by inversion of the cumulative distribution.

    The token is the first one at which the cumulative sum of softmax(logits / temperature) exceeds the row's draw.
    Temperature 0 takes the most likely token, or the first of equally likely tokens. `logits` is `(B, V)`. `draws` is
    `(B,)` float64 in [0, 1). The result is `(B,)` int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # subtract the largest logit first: a logit divided by a tiny temperature could be infinite
    below = logits.double() - logits.amax(dim=-1, keepdim=True)
    cumulative = (below / temperature).softmax(dim=-1).cumsum(dim=-1)
    # by rounding, the last sum may be below 1: keep every draw below the last sum
    total = cumulative[:, -1]
    below = torch.minimum(draws * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below[:, None], right=True).squeeze(1)
