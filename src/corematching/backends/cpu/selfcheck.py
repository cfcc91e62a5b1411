"""The self-check of native decode steps against the decoder's own forward, once per model.

A native step of a bf16 model computes in float32 and rounds only stored values. The keys and values
of its first layers are compared with the layers' own forwards in float32, where any difference
beyond rounding is a difference of architecture. Deeper layers and the output are compared with the
decoder's own step in bf16, where rounding errors add up.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from corematching.backends.cpu.decode import NativeSteps

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}
ROUNDINGS = 2
"""Tolerance of the first layers' keys and values against float32, in units of the dtype's eps."""
EXACT_LAYERS = 2
POSITIONS = (0, 5, 6, 17)
STEP = 29

_checked: weakref.WeakKeyDictionary[Any, tuple[tuple[str, ...], bool]] = weakref.WeakKeyDictionary()


def agrees(steps: NativeSteps) -> bool:
    """Whether native steps after two short prompts agree with the decoder's own forward."""
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
    own, exact = _copy(cache, decoder), _copy(cache, decoder, torch.float32)
    now = torch.tensor([[STEP]])
    theirs = decoder(input_ids=token, position_ids=now, past_key_values=cache, use_cache=True)
    step = {"past_key_values": own, "position_ids": now}
    x = decoder.embed_tokens(token)
    ours = steps.run(x, step)
    pairs = [(ours, theirs.last_hidden_state)]
    for mine, layer in zip(_layers(own), _layers(cache), strict=True):
        pairs += [(mine.keys, layer.keys), (mine.values, layer.values)]
    dtype = theirs.last_hidden_state.dtype
    if not all(_is_close(a, b, TOLERANCE[dtype]) for a, b in pairs):
        return False
    return dtype == torch.float32 or _is_exact(steps, x, ours, own, exact)


def _is_exact(
    steps: NativeSteps, x: Tensor, ours: Tensor | None, own: DynamicCache, exact: DynamicCache
) -> bool:
    """Whether the first layers' new keys and values equal those in float32 up to rounding."""
    count = min(EXACT_LAYERS, len(steps.parts.layers))
    tolerance = ROUNDINGS * torch.finfo(x.dtype).eps
    try:
        out = _run_in_float32(steps, x, exact, count)
    except (RuntimeError, TypeError, ValueError) as error:
        log.debug("the decoder's layers cannot be called in turn: %s", error)
        return False
    pairs = [] if count < len(steps.parts.layers) else [(ours, out)]
    for mine, layer in list(zip(_layers(own), _layers(exact), strict=False))[:count]:
        for a, b in ((mine.keys, layer.keys), (mine.values, layer.values)):
            pairs.append((a[:, :, -1], b[:, :, -1]))
    return all(_is_close(a, b, tolerance) for a, b in pairs)


def _run_in_float32(steps: NativeSteps, x: Tensor, cache: DynamicCache, count: int) -> Tensor:
    """Run the first layers' own forwards, one after the other, on float32 copies of weights."""
    decoder: Any = steps.parts.decoder
    position = torch.tensor([[STEP]])
    x = x.float()
    cos_sin = _rotate(decoder, x, position)
    for layer in list(steps.parts.layers)[:count]:
        weights = {name: weight.float() for name, weight in layer.named_parameters()}
        how = {"position_embeddings": cos_sin, "attention_mask": None, "past_key_values": cache}
        out: Any = functional_call(layer, weights, (x,), how)
        x = out[0] if isinstance(out, tuple) else out
    return functional_call(decoder.norm, {"weight": decoder.norm.weight.float()}, (x,))


def _rotate(decoder: Any, x: Tensor, position: Tensor) -> Any:
    if hasattr(decoder.rotary_emb, "mrope_section"):
        position = position[None].expand(3, -1, -1)
    return decoder.rotary_emb(x, position)


def _copy(cache: DynamicCache, decoder: Any, dtype: torch.dtype | None = None) -> DynamicCache:
    copied = DynamicCache(config=decoder.config)
    for index, layer in enumerate(_layers(cache)):
        keys, values = layer.keys.clone(), layer.values.clone()
        copied.update(keys.to(dtype or keys.dtype), values.to(dtype or values.dtype), index)
    return copied


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


def _is_close(ours: Tensor | None, theirs: Tensor, tolerance: float) -> bool:
    """Whether the relative error in norm is below the tolerance."""
    if ours is None or ours.shape != theirs.shape:
        return False
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-20)
    return bool(error < tolerance)
