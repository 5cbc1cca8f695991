"""Computes without a GPU which kernels a step runs, how long they take, and how many bytes GPUs exchange."""
