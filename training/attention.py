"""Attention of one picture and many questions about it, none of which sees another; of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from blocks import BlockAttention, PatchAttention


def make_mask(segments: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """(B, T) segments of the text -> (B, 1, T, P + T) additive mask.

    A token sees the whole picture, the ``prefix`` first tokens, and what stands before it in its
    own segment.
    """
    own = (segments[:, :, None] == segments[:, None, :]).tril()
    zeros = torch.zeros(own.shape, dtype=dtype, device=segments.device)
    near = zeros.masked_fill_(~own, torch.finfo(dtype).min)
    return F.pad(near, (prefix, 0)).unsqueeze(1)


attend_in_blocks = torch.compiler.disable(BlockAttention.apply)


def attend_to_picture(module, query, key, value, attention_mask, scaling, **_):
    """Attention of a picture, causal, and of the text behind it, under the mask.

    query (B, H, P + T, d), key and value (B, G, P + T, d), attention_mask (B, 1, T, P + T).
    """
    if query.requires_grad and query.device.type == "cpu":
        return attend_in_blocks(query, key, value, attention_mask, scaling).transpose(1, 2), None
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    prefix = query.shape[2] - attention_mask.shape[2]
    picture = F.scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True,
        scale=scaling,
    )  # fmt: skip
    text = F.scaled_dot_product_attention(
        query[:, :, prefix:], key, value, attn_mask=attention_mask, scale=scaling
    )
    return torch.cat([picture, text], 2).transpose(1, 2), None


def attend_to_patches(module, query, key, value, attention_mask, scaling, **_):
    """A tower's attention in training on a CPU: (B, H, P, d) each, no mask."""
    query, key, value = (part.contiguous() for part in (query, key, value))
    return PatchAttention.apply(query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register("picture", attend_to_picture)
AttentionInterface.register("patches", attend_to_patches)
