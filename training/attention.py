"""Attention of one picture and many questions about it, none of which sees another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface


def make_mask(segments: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(B, C * W) segments -> (B, C, W, W) additive mask within the chunks."""
    chunks = segments.unflatten(1, (-1, width))
    same = chunks[..., :, None] == chunks[..., None, :]
    allowed = same & torch.ones_like(same).tril()
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)


def attend_in_chunks(module, query, key, value, attention_mask, scaling, **_):
    """Attention of a picture and the chunks of text behind it.

    query (B, H, T, d), key and value (B, G, T, d), attention_mask (B, C, W, W) with T = P + C * W:
    the first P tokens are causal, a chunk sees them all and itself under the mask.
    """
    heads, total = query.shape[1:3]
    groups, (chunks, width) = key.shape[1], attention_mask.shape[1:3]
    prefix, repeat = total - chunks * width, heads // groups
    seen = F.scaled_dot_product_attention(
        query[:, :, :prefix],
        key[:, :, :prefix].repeat_interleave(repeat, 1),
        value[:, :, :prefix].repeat_interleave(repeat, 1),
        is_causal=True,
        scale=scaling,
    )  # (B, H, P, d)

    query = (query * scaling).unflatten(1, (groups, repeat))  # (B, G, r, T, d)
    shared, shared_value = key[:, :, :prefix], value[:, :, :prefix]
    own = key[:, :, prefix:].unflatten(2, (chunks, width))  # (B, G, C, W, d)
    own_value = value[:, :, prefix:].unflatten(2, (chunks, width))
    text = query[:, :, :, prefix:].unflatten(3, (chunks, width)).transpose(2, 3)
    text = text.flatten(3, 4)  # (B, G, C, r * W, d)
    far = (text.flatten(2, 3) @ shared.mT).unflatten(2, (chunks, repeat * width))
    near = (text @ own.mT).unflatten(3, (repeat, width)) + attention_mask[:, None, :, None]
    weights = torch.cat([far, near.flatten(3, 4)], -1).softmax(-1, torch.float32).to(query.dtype)
    far, near = weights[..., :prefix], weights[..., prefix:]
    said = (far.flatten(2, 3) @ shared_value).unflatten(2, (chunks, repeat * width))
    said = (said + near @ own_value).unflatten(3, (repeat, width)).transpose(2, 3)

    out = torch.cat([seen, said.flatten(3, 4).flatten(1, 2)], 2)  # (B, H, T, d)
    return out.transpose(1, 2), None


AttentionInterface.register("chunks", attend_in_chunks)
