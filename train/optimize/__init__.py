"""Optimizers, schedules, averages of weights, and the reduction of gradients over ranks.

A step of a matrix: autograd sums the gradients of all micro-batches in `.grad`; a reduce-scatter sends them to the rank that
owns the matrix (`reduction`); there the mean gradient is clipped and Muon updates the matrix (`groups`); an all-gather sends
the matrix back to all ranks, which average it (`averaging`). Gradients of embeddings, vectors and scalars go through one
all-reduce, and AdamW updates these parameters on every rank.

The collectives separate three parts of the step: the gradients' norm, clipping with Muon, and AdamW. Each may be a CUDA graph
(`cuda_graph`).
"""
