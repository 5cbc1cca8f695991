"""What the benchmarks share: inputs, timing, and the variants of a training step."""
