"""Optimizers, schedules, averages of the weights, and the reduction of gradients over ranks.

In one step, autograd sums the gradients of a rank's micro-batches in `.grad`. Each matrix is owned by one rank. A
reduce-scatter sends each matrix's gradients to its owner (`reduction`). The owner clips the mean gradient and updates
the matrix with Muon (`groups`). An all-gather sends the updated matrices to all ranks. One all-reduce averages the
gradients of embeddings, vectors and scalars, and every rank updates these parameters with AdamW. Then every rank adds
the weights to its averages (`averaging`).

Between the collectives, a step has three computations: the norm of the gradients, clipping with Muon, and AdamW. Each
computation may be a CUDA graph (`cuda_graph`).
"""
