"""The model as transformers loads it: `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .golf_inference import add_weights, golf_logits


class GolfConfig(PretrainedConfig):
    """The settings that determine what the model computes. The rotary base is that of a text of `window` tokens."""

    model_type = "golf"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "window",
    }


class GolfForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of golf_kernels. It has no KV cache, so `generate` computes the whole text again for each token."""

    config_class = GolfConfig

    def __init__(self, config: GolfConfig) -> None:
        super().__init__(config)
        add_weights(self, config)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Compute the softcapped logits `(B, T, V)` of `input_ids` `(B, T)`."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("attention_mask: expected ones: the model reads no padding; give texts of one length")
        return CausalLMOutput(logits=golf_logits(self, self.config, input_ids))
