"""A small model whose artifact has every kind of tensor."""

from typing import Any

import torch

from train.config import Config
from train.model.gpt import GPT
from train.quantize.quantize_model import quantize_model
from train.quantize.tensors import QuantizedTensor, StoredTensors

ROOMY = {"code_bytes": 0, "max_bytes": 10**9}


def tiny(**changes: Any) -> Config:
    shape: dict[str, Any] = {
        "vocab_size": 260, "num_layers": 3, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_slope": 0.5,
        "train_seq_len": 8, "train_batch_tokens": 64, "ve_dim": 4, "ve_layers": (1, 2), "skip_gates": True,
        "recur_layers": (1,), "quantizer": "rtn", "passthrough_max_elements": 100, "scale_floor": "none",
    }  # fmt: skip
    return Config(**(shape | changes))


def quantized(config: Config, seed: int = 0) -> StoredTensors:
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    return quantize_model(model, config, {})


def bits(tensor: torch.Tensor) -> bytes:
    # numpy has no bfloat16
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True).tobytes()


def assert_same(found: StoredTensors, expected: StoredTensors) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        other = found[name]
        if isinstance(tensor, QuantizedTensor):
            assert isinstance(other, QuantizedTensor), name
            assert other.bits == tensor.bits
            assert torch.equal(other.codes, tensor.codes), name
            assert torch.equal(other.scales.view(torch.int16), tensor.scales.view(torch.int16)), name
        else:
            assert isinstance(other, torch.Tensor), name
            assert other.dtype == tensor.dtype
            assert other.shape == tensor.shape
            # compare the bits, because −0 equals 0
            assert bits(other) == bits(tensor), name
