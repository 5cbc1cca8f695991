"""Benchmarks of the kernels, of a training step and of evaluation. Outside this folder only tests import it."""
