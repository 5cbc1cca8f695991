"""Fused kernels for Parameter Golf: PyTorch operators in the namespace `golf::`, and the optimizer `Muon`.

Every operator has a PyTorch reference that runs on any device. Some operators also have C++, CUDA or Triton backends.
`python -m golf_kernels` shows which backend each operator takes, and why.
"""

# imported because it registers the Triton backend of `muon_step`
from golf_kernels import muon_step as _muon_step  # noqa: F401

# some functions have the name of their module; after these imports `golf_kernels.newton_schulz` is the function
from golf_kernels.gptq_block import gptq_block
from golf_kernels.int6 import (
    int6_dequantize,
    int6_dequantize_many,
    int6_fake_quantize,
    int6_pack,
    int6_unpack,
)
from golf_kernels.leaky_relu2_mlp import leaky_relu2_mlp
from golf_kernels.linear_residual import linear_residual
from golf_kernels.mix_rms_norm import mix_rms_norm
from golf_kernels.muon import Muon
from golf_kernels.newton_schulz import COEFFICIENTS, CoefficientSet, newton_schulz
from golf_kernels.qk_norm_rope import qk_norm_rope
from golf_kernels.qkv_norm_rope import qkv_norm_rope
from golf_kernels.softcapped_cross_entropy import softcapped_cross_entropy
from golf_kernels.version import __version__
from golf_kernels.window_nll import window_nll
from golf_kernels.xsa import xsa

__all__ = [
    "COEFFICIENTS",
    "CoefficientSet",
    "Muon",
    "__version__",
    "gptq_block",
    "int6_dequantize",
    "int6_dequantize_many",
    "int6_fake_quantize",
    "int6_pack",
    "int6_unpack",
    "leaky_relu2_mlp",
    "linear_residual",
    "mix_rms_norm",
    "newton_schulz",
    "qk_norm_rope",
    "qkv_norm_rope",
    "softcapped_cross_entropy",
    "window_nll",
    "xsa",
]
