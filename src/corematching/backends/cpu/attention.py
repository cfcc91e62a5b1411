"""Prompt attention between its projections: compiled, else the model's own.

Shapes: B samples, T tokens, H attention heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corematching.backends.cpu.native import (
    PrefillAttention,
    Scratch,
    apply_rope,
    why_unsupported_attention,
)
from corematching.cache.layers import store

ATTENTION = "sdpa"
ONLY_SDPA = ("softcap", "position_bias", "cache", "enable_gqa")
"""Options of an attention call that the kernels do not support."""
PROBE_ERROR = 2e-2


class PromptAttention:
    """Computes the output projection's input from concatenated queries, keys and values.

    Parameters
    ----------
    scratch : Scratch
        Memory to work in.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._attention = PrefillAttention(scratch)

    def attend(
        self, module: Any, qkv: Tensor, cos_sin: Any, mask: Any, cache: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Llama's attention: (B, T, H + 2G, D) before rotation to (B, T, H * D), and no weights.

        ``cos_sin`` are cosines and sines, (B or 1, T, D) each; queries are rotated in place.
        """
        kv_heads = module.v_proj.out_features // module.head_dim
        cos, sin = cos_sin
        query, key, value = apply_rope(qkv, cos, sin, kv_heads)
        if cache is not None:
            key, value = store(cache, key, value, module.layer_idx)
        return self._mix(module, query, key, value, mask, module.scaling, kwargs)

    def attend_to_patches(self, module: Any, qkv: Tensor, mask: Any) -> Tensor:
        """CLIP's attention: (B, T, 3H, D) to (B, T, H * D)."""
        query, key, value = qkv.transpose(1, 2).chunk(3, dim=1)
        return self._mix(module, query, key, value, mask, module.scale, {"dropout": 0.0})[0]

    def _mix(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        reason = why_unsupported_attention(query, key, value, mask)
        if reason is None and not asks_for_more(kwargs):
            causal = query.shape[2] > 1 and is_causal(module, mask, kwargs)
            mixed = self._attention.attend(query, key, value, mask, scaling, causal)
            return mixed.flatten(2), None
        mixed, weights = ALL_ATTENTION_FUNCTIONS[ATTENTION](
            module, query, key, value, mask, scaling=scaling, **kwargs
        )
        return mixed.flatten(2), weights


def inputs_of(attention: Any) -> list[Any]:
    """An attention's projections to queries, keys and values."""
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def asks_for_more(kwargs: dict[str, Any]) -> bool:
    """Whether an attention call has options that the kernels do not support."""
    return any(kwargs.get(name) for name in ONLY_SDPA)


def is_causal(module: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an attention call is causal, by the rule of transformers' sdpa attention."""
    causal = kwargs.get("is_causal")
    return mask is None and (getattr(module, "is_causal", True) if causal is None else causal)


def uses_sdpa(attention: Any) -> bool:
    """Whether an attention runs PyTorch's sdpa, without dropout."""
    config = getattr(attention, "config", None)
    return getattr(config, "_attn_implementation", None) == ATTENTION and not attention.training


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    error = (ours.float() - theirs.float()).norm()
    return bool(error <= PROBE_ERROR * theirs.float().norm())
