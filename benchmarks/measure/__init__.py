"""How something is measured: inputs, timing, the variants of a training step."""
