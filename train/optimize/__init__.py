"""Parameter groups, schedules, averages of weights, and the reduction of gradients over ranks.

A matrix in a step: products take a working weight made of it (`train.model.linear`), autograd adds the gradients of all
micro-batches up in `.grad`, and a reduce-scatter takes these to the rank that owns the matrix (`reduction`). There the mean gradient is clipped and Muon updates the
matrix (`groups`), which is gathered by all ranks, and averaged (`averaging`). Embeddings, vectors and scalars are reduced
together, and AdamW updates them on every rank.

Between what the ranks exchange lie three pieces of work, each of which may be a CUDA graph (`capture`): the norm of a rank's
own gradients; clipping and Muon; AdamW.
"""
