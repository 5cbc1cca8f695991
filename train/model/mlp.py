"""The MLP with squared LeakyReLU, including its norm and the residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from golf_kernels.leaky_relu2_mlp import leaky_relu2_mlp
from train.config import Config
from train.model.compile import OperatorModule
from train.model.init import matrix, zero_matrix
from train.model.linear import linear, observing, working_weight
from train.model.norm import NORM_EPS, rms_norm


class MLP(OperatorModule):
    """Computes y = residual + scale ⊙ (leaky_relu(g · rms(x) W_upᵀ)² W_downᵀ). g is `gain`. Slope 0 gives ReLU²."""

    def __init__(self, config: Config, gain: float) -> None:
        super().__init__()
        self.up = matrix(config.mlp_hidden, config.model_dim, orthogonal=config.orthogonal_init)
        self.down = zero_matrix(config.model_dim, config.mlp_hidden)
        self.slope = config.mlp_slope
        self.gain = gain
        self.qat = config.fake_quantization

    def forward(self, x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        """Compute y `(B, T, d)` from x `(B, T, d)`, residual `(B, T, d)` and scale `(d,)`, all of the same dtype."""
        fake_quantize = self.qat if self.training else None
        # do not call the fused operator if calibration observes the input of W_down, which the operator hides
        if observing() or "leaky_relu2_mlp" in self.written_out:
            normed = rms_norm(x) * self.gain
            hidden = F.leaky_relu(linear(normed, self.up, fake_quantize=fake_quantize), self.slope).square()
            return residual + linear(hidden, self.down, scale=scale, fake_quantize=fake_quantize)
        return leaky_relu2_mlp(
            x,
            working_weight(self.up, x.dtype, fake_quantize=fake_quantize),
            working_weight(self.down, x.dtype, fake_quantize=fake_quantize),
            slope=self.slope,
            norm_eps=NORM_EPS,
            gain=self.gain,
            residual=residual,
            scale=scale,
        )
