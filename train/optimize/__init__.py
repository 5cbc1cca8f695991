"""Optimizers, schedules, averages of the weights, and the reduction of gradients over ranks.

In one step, autograd sums the gradients of all micro-batches in `.grad`. Each matrix has one rank that owns it. A
reduce-scatter sends each matrix's gradients to its owner (`reduction`). The owner clips the mean gradient and updates
the matrix with Muon (`groups`). An all-gather sends the matrix to all ranks. One all-reduce averages the gradients of
embeddings, vectors and scalars, and every rank updates them with AdamW. Then every rank adds the weights to its
averages (`averaging`).

Between the collectives the step does three computations: the norm of the gradients; clipping and Muon; AdamW. Each of
the three may be a CUDA graph (`cuda_graph`).
"""
