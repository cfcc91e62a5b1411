"""Attention for training on a CPU, where PyTorch's takes twice as long to go backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 192
"""Rows of queries that are taken at once."""


class BlockAttention(torch.autograd.Function):
    """Attention in blocks of queries, each against the keys that it may see.

    Query (B, H, T, d), key and value (B, G, T, d) with H a multiple of G, mask (B, 1, T - P, T):
    causal over the first P tokens, the picture, under the additive mask behind them. Keeps the
    probabilities, T * (T + P) / 2 of them for each head.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        groups, picture = key.shape[1], key.shape[2] - mask.shape[2]
        grouped = query.unflatten(1, (groups, -1))  # (B, G, R, T, d)
        out = torch.empty_like(grouped)
        kept = []
        for start, end in cut(picture, key.shape[2]):
            rows = grouped[..., start:end, :]
            scores = attend_to(rows, key[:, :, :end]).mul_(scale)
            if end <= picture:
                size = end - start
                future = torch.ones(size, size, dtype=torch.bool, device=key.device).triu(1)
                scores[..., start:].masked_fill_(future, torch.finfo(scores.dtype).min)
            else:
                scores += mask.unsqueeze(2)
            chances = scores.softmax(-1)
            out[..., start:end, :] = mix(chances, value[:, :, :end])
            kept.append(chances)
        out = out.flatten(1, 2)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.scale, ctx.picture = scale, picture
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, *kept = ctx.saved_tensors
        groups = key.shape[1]
        along = (grad.float() * out.float()).sum(-1, keepdim=True).to(query.dtype)
        grouped, grads, along = (x.unflatten(1, (groups, -1)) for x in (query, grad, along))
        grad_query = torch.empty_like(grouped)
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for (start, end), chances in zip(cut(ctx.picture, key.shape[2]), kept, strict=True):
            rows, part = grouped[..., start:end, :], grads[..., start:end, :]
            grad_value[:, :, :end] += gather(chances, part)
            slopes = attend_to(part, value[:, :, :end])
            slopes.sub_(along[..., start:end, :]).mul_(chances).mul_(ctx.scale)
            grad_query[..., start:end, :] = mix(slopes, key[:, :, :end])
            grad_key[:, :, :end] += gather(slopes, rows)
        grad_query = grad_query.flatten(1, 2)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


class PatchAttention(torch.autograd.Function):
    """Attention of all patches to all, one picture after the other, for the sake of the cache.

    Query, key and value (B, H, P, d). Keeps the probabilities, P * P of them for each head.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        chances = query.new_empty(*query.shape[:3], key.shape[2])
        out = torch.empty_like(query)
        room = torch.empty_like(chances[0])
        for q, k, v, p, o in zip(query, key, value, chances, out, strict=True):
            scores = torch.baddbmm(room, q, k.mT, beta=0, alpha=scale)
            torch.softmax(scores, -1, out=p)
            torch.bmm(p, v, out=o)
        ctx.save_for_backward(query, key, value, out, chances)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, chances = ctx.saved_tensors
        grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
        along = (grad.float() * out.float()).sum(-1, keepdim=True).to(query.dtype)
        for b, (g, p) in enumerate(zip(grad, chances, strict=True)):
            torch.bmm(p.mT, g, out=grad_value[b])
            slopes = torch.baddbmm(along[b].expand_as(p), g, value[b].mT, beta=-1).mul_(p)
            torch.bmm(slopes, key[b], out=grad_query[b])
            torch.bmm(slopes.mT, query[b], out=grad_key[b])
        return grad_query.mul_(ctx.scale), grad_key.mul_(ctx.scale), grad_value, None


def cut(picture: int, length: int) -> Iterator[tuple[int, int]]:
    """Where blocks of rows begin and end: the picture's, then the text in one."""
    for start in range(0, picture, ROWS):
        yield start, min(start + ROWS, picture)
    yield picture, length


def attend_to(rows: Tensor, key: Tensor) -> Tensor:
    """(B, G, R, n, d), (B, G, T, d) -> (B, G, R, n, T) products."""
    return (rows.flatten(2, 3) @ key.mT).unflatten(2, rows.shape[2:4])


def mix(chances: Tensor, value: Tensor) -> Tensor:
    """(B, G, R, n, T), (B, G, T, d) -> (B, G, R, n, d)."""
    return (chances.flatten(2, 3) @ value).unflatten(2, chances.shape[2:4])


def gather(chances: Tensor, rows: Tensor) -> Tensor:
    """(B, G, R, n, T), (B, G, R, n, d) -> (B, G, T, d), summed over R and n."""
    return chances.flatten(2, 3).mT @ rows.flatten(2, 3)
