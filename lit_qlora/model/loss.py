"""Owns the cross entropy over answer tokens, in chunks.

Logits are computed for positions with a target only, a chunk at a time, so they never exist in full.
The head is frozen: its weight gets no gradient. Knows neither batches nor the model.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 1024
"""Rows of logits that exist at a time: 125 MiB in fp32 at a vocabulary of 32,000."""


def summed_cross_entropy(
    hidden: Tensor, head: Tensor, ids: Tensor, chunk_rows: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of ``ids``, and the number of them that were the likeliest.

    Args:
        hidden: ``[N, h]``, the last hidden states at the scored positions.
        head: ``[V, h]``, the frozen output weight; its dtype is the dtype of the products.
        ids: ``[N]`` int64.
        chunk_rows: rows of logits that exist at a time.

    Returns:
        The sum in nats, fp32 and differentiable in ``hidden``; and an int64 count.
    """
    if not torch.is_grad_enabled():
        hidden = hidden.detach()  # unknown inside of the function
    return _SummedCrossEntropy.apply(hidden, head, ids, chunk_rows)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def token_cross_entropies(hidden: Tensor, head: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of `summed_cross_entropy`, token by token.

    Args:
        hidden: ``[N, h]``.
        head: ``[V, h]``.
        ids: ``[N]`` int64.

    Returns:
        ``[N]`` nats, fp32; and ``[N]`` bool, whether the token was the likeliest. No gradient.
    """
    nats, is_likeliest = [], []
    for start in range(0, len(ids), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        scored = _score(hidden[rows], head, ids[rows].unsqueeze(1))
        nats.append(scored[0].squeeze(1))
        is_likeliest.append(scored[1].squeeze(1))
        del scored
    empty = torch.zeros(0, device=hidden.device)
    return torch.cat([empty, *nats]), torch.cat([empty.bool(), *is_likeliest])


def _score(hidden: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nats ``[n, 1]``, whether likeliest ``[n, 1]``, unnormalised softmax ``[n, V]``, and its divisor ``[n, 1]``."""
    scores = (hidden.to(head.dtype) @ head.T).float()
    highest, likeliest = scores.max(dim=1, keepdim=True)
    wanted = scores.gather(1, target)
    scores = scores.sub_(highest).exp_()
    total = scores.sum(dim=1, keepdim=True)
    return total.log() + highest - wanted, likeliest == target, scores, total


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross entropy that forms the gradient in forward, so that logits are computed once.

    It is kept for a *sum* of losses: entries of softmax minus one-hot divided by thousands of tokens would
    flush to zero in fp16 before any loss scale could lift them. The scale and the division come in backward, in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, chunk_rows: int) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        keeps_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty(hidden.shape, dtype=head.dtype, device=hidden.device) if keeps_gradient else None
        for start in range(0, len(ids), chunk_rows):
            rows = slice(start, start + chunk_rows)
            target = ids[rows].unsqueeze(1)
            nats, is_likeliest, scores, total = _score(hidden[rows], head, target)
            num_correct += is_likeliest.sum()
            loss += nats.sum()
            if gradient is not None:
                scores.div_(total)
                scores.scatter_add_(1, target, torch.full_like(nats, -1.0))
                gradient[rows] = scores.to(head.dtype) @ head
            del scores  # before the next chunk's are allocated
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(num_correct)
        return loss, num_correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        # In fp32: a loss scale of 65,536 alone is beyond fp16.
        return (gradient.float() * grad_loss).to(gradient.dtype), None, None, None
