"""Decode steps that a backend can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"} | {
    "use_cache",
    "logits_to_keep",
}
OUTPUTS = ("output_attentions", "output_hidden_states")


def is_plain_step(decoder: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a decoder call is a decode step of one token per row without extra outputs."""
    ids, x = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    token = ids if x is None else x
    if args or token is None or (ids is None) == (x is None):
        return False
    if token.shape[1] != 1 or kwargs.get("past_key_values") is None:
        return False
    if torch.is_grad_enabled() or decoder.training:
        return False
    if any(kwargs.get(name) or getattr(decoder.config, name, False) for name in OUTPUTS):
        return False
    extra = (value for name, value in kwargs.items() if name not in KNOWN)
    plain = all(value is None or isinstance(value, bool) for value in extra)
    return plain and kwargs.get("return_dict") is not False


def embed_step(decoder: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """(B, 1, d), the token embeddings of a decode step."""
    x = kwargs.get("inputs_embeds")
    embedded: Tensor = decoder.embed_tokens(kwargs["input_ids"]) if x is None else x
    return embedded
