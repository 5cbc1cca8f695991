"""Optimizers, schedules, averages of weights, and the reduction of gradients over ranks.

A matrix in one step: autograd sums the gradients of all micro-batches in `.grad`. A reduce-scatter sends them to the rank
that owns the matrix (`reduction`). There the mean gradient is clipped and Muon updates the matrix (`groups`). An all-gather
sends the matrix to all ranks, and each adds it to its averages (`averaging`). Embeddings, vectors and scalars: one
all-reduce of their gradients, then AdamW on every rank.

Between the collectives the step computes three things: the gradients' norm; clipping and Muon; AdamW. Each of the three may
be a CUDA graph (`cuda_graph`).
"""
