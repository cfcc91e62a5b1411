"""Compares a native step with the decoder's own, once per model."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from .steps import NativeSteps

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}
POSITIONS = (0, 5, 6, 17)
STEP = 29

_checked: weakref.WeakKeyDictionary[Any, tuple[tuple[str, ...], bool]] = weakref.WeakKeyDictionary()


def agrees(steps: NativeSteps) -> bool:
    """Whether two tokens behind short prompts come out as from the decoder's own forward."""
    decoder = steps.parts.decoder
    known, form = _checked.get(decoder), steps.form
    if known is not None and known[0] == form:
        return known[1]
    with torch.inference_mode(False), torch.no_grad():
        verdict = _compare(steps, decoder)
    _checked[decoder] = (form, verdict)
    return verdict


def _compare(steps: NativeSteps, decoder: Any) -> bool:
    words = decoder.embed_tokens.weight.shape[0]
    ids = torch.arange(2 * len(POSITIONS) + 2) * 7919 % words
    prompt, token = ids[:-2].view(2, -1), ids[-2:].view(2, 1)
    cache = DynamicCache(config=decoder.config)
    past = torch.tensor(POSITIONS)[None]
    decoder(input_ids=prompt, position_ids=past, past_key_values=cache, use_cache=True)
    own = DynamicCache(config=decoder.config)
    layer: Any
    mine: Any
    for index, layer in enumerate(cache.layers):
        own.update(layer.keys.clone(), layer.values.clone(), index)
    now = torch.tensor([[STEP]])
    theirs = decoder(input_ids=token, position_ids=now, past_key_values=cache, use_cache=True)
    step = {"past_key_values": own, "position_ids": now}
    ours = steps.run(decoder.embed_tokens(token), step)
    pairs = [(ours, theirs.last_hidden_state)]
    for mine, layer in zip(own.layers, cache.layers, strict=True):
        pairs += [(mine.keys, layer.keys), (mine.values, layer.values)]
    return all(_is_close(a, b) for a, b in pairs)


def _is_close(ours: Tensor | None, theirs: Tensor) -> bool:
    """Whether two tensors differ by little of their norm."""
    if ours is None or ours.shape != theirs.shape:
        return False
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-20)
    return bool(error < TOLERANCE[theirs.dtype])
