"""Replaces the output head and the loss of a small train_gpt.py by `golf_kernels.softcapped_cross_entropy`.

    python examples/fused_head_train_gpt.py
    python examples/fused_head_train_gpt.py --head plain

Both heads compute the same loss. The plain head stores the logits of the whole batch. The fused head stores the logits
of one chunk of rows at a time. The comments `before` and `after` in `GPT.forward` mark the difference.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf_kernels import Muon, softcapped_cross_entropy


class Hyperparameters:
    vocab_size = 1024
    model_dim = 64
    num_layers = 2
    train_seq_len = 32
    train_batch_tokens = 512
    logit_softcap = 30.0
    matrix_lr = 0.02
    embed_lr = 0.02


class GPT(nn.Module):
    """A small model for this example. Each layer adds a gated running mean and an MLP; the embedding is tied."""

    def __init__(self, args: type[Hyperparameters], head: str) -> None:
        super().__init__()
        self.head, self.softcap = head, args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        nn.init.normal_(self.tok_emb.weight, std=0.02)
        width = args.model_dim
        self.gates = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(args.num_layers))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(args.num_layers))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(args.num_layers))

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        x = F.rms_norm(self.tok_emb(input_ids), (self.tok_emb.embedding_dim,))
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).view(1, -1, 1)
        for gate, up, down in zip(self.gates, self.ups, self.downs, strict=True):
            x = x + torch.sigmoid(gate(x)) * (x.cumsum(1) / count)
            x = x + down(F.leaky_relu(up(F.rms_norm(x, x.shape[-1:])), 0.5).square())
        x = F.rms_norm(x, x.shape[-1:]).reshape(-1, x.shape[-1])  # (rows, model_dim)
        targets = target_ids.reshape(-1)  # (rows,)
        if self.head == "plain":  # before
            logits_proj = F.linear(x, self.tok_emb.weight)
            logits = self.softcap * torch.tanh(logits_proj / self.softcap)
            return F.cross_entropy(logits.float(), targets)
        return softcapped_cross_entropy(x, self.tok_emb.weight, targets, softcap=self.softcap)  # after


def main(head: str = "fused", iterations: int = 10, seed: int = 1337) -> list[float]:
    """Trains on sequences in which each token determines the next. Returns each step's loss in nats per token."""
    args = Hyperparameters
    torch.manual_seed(seed)
    model = GPT(args, head)
    next_token = torch.randperm(args.vocab_size)
    matrices = [*model.gates.parameters(), *model.ups.parameters(), *model.downs.parameters()]
    optimizers = [
        Muon(matrices, lr=args.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW([model.tok_emb.weight], lr=args.embed_lr, betas=(0.9, 0.95)),
    ]
    losses, started = [], time.perf_counter()
    for step in range(iterations):
        tokens = torch.randint(args.vocab_size // 8, (args.train_batch_tokens // args.train_seq_len, 1))
        for _ in range(args.train_seq_len):
            tokens = torch.cat([tokens, next_token[tokens[:, -1:]]], dim=1)  # (sequences, up to train_seq_len + 1)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        milliseconds = 1000 * (time.perf_counter() - started)
        print(f"step:{step + 1}/{iterations} train_loss:{losses[-1]:.4f} train_time:{milliseconds:.0f}ms")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=("fused", "plain"), default="fused")
    parser.add_argument("--iterations", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    main(arguments.head, arguments.iterations)
