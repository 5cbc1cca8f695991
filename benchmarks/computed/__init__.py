"""What is computed without a GPU: a step's kernels, their time, and the bytes that GPUs exchange."""
