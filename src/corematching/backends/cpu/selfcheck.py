"""The self-check of native decode steps against the decoder's own forward, once per model.

A native step of a bf16 model computes in float32 and rounds only stored values. Its output and each
layer's keys and values are compared with the decoder's own step in float32 on the same weights,
where any difference beyond one rounding is a difference of architecture. The decoder's own step in
bf16, whose rounding errors add up, is compared loosely.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from corematching.backends.cpu.decode import NativeSteps

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}
EXACT_TOLERANCE = torch.finfo(torch.bfloat16).eps
"""Tolerance against the step in float32; rounding to bf16 gives a third of it."""
POSITIONS = (0, 5, 6, 17)
STEP = 29
"""The least position of the step; it is the last one that the model knows."""
MOST = 1 << 22
"""Numbers of a weight in float32 at a time."""

_checked: weakref.WeakKeyDictionary[Any, tuple[tuple[str, ...], bool]] = weakref.WeakKeyDictionary()


def agrees(steps: NativeSteps) -> bool:
    """Whether native steps after two short prompts agree with the decoder's own forward."""
    decoder = steps.parts.decoder
    known, form = _checked.get(decoder), steps.form
    if known is not None and known[0] == form:
        return known[1]
    with torch.inference_mode(False), torch.no_grad():
        try:
            verdict = _compare(steps, decoder)
        except Exception:
            log.debug("a decoder that cannot be called by itself", exc_info=True)
            verdict = False
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
    last = getattr(decoder.config, "max_position_embeddings", None) or 0
    now = torch.tensor([[max(STEP, last - 1)]])
    theirs = decoder(input_ids=token, position_ids=now, past_key_values=cache, use_cache=True)
    x = decoder.embed_tokens(token)
    ours = steps.run(x, {"past_key_values": own, "position_ids": now})
    dtype = theirs.last_hidden_state.dtype
    if not _agree(ours, own, theirs.last_hidden_state, cache, TOLERANCE[dtype]):
        return False
    if dtype == torch.float32:
        return True
    with _Float32Products():
        theirs = decoder(
            inputs_embeds=x.float(), position_ids=now, past_key_values=exact, use_cache=True
        )
    return _agree(ours, own, theirs.last_hidden_state, exact, EXACT_TOLERANCE)


def _agree(
    ours: Tensor | None, own: DynamicCache, theirs: Tensor, cache: DynamicCache, tolerance: float
) -> bool:
    """Whether two steps' outputs, and their new keys and values of every layer, are close."""
    pairs = [(ours, theirs)]
    for mine, layer in zip(_layers(own), _layers(cache), strict=True):
        for a, b in ((mine.keys, layer.keys), (mine.values, layer.values)):
            pairs.append((a[:, :, -1], b[:, :, -1]))
    return all(_is_close(a, b, tolerance) for a, b in pairs)


class _Float32Products(TorchFunctionMode):
    """Computes linear layers on float32 inputs with weights of another dtype in float32."""

    def __init__(self) -> None:
        super().__init__()
        self._room = torch.empty(MOST)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return self._multiply(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _multiply(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if input.dtype != torch.float32 or weight.dtype == torch.float32:
            return F.linear(input, weight, bias)
        inputs = weight.shape[1]
        room = self._room if self._room.numel() >= inputs else torch.empty(inputs)
        parts = []
        for rows in weight.split(max(room.numel() // inputs, 1)):
            part = room[: rows.numel()].view(rows.shape).copy_(rows)
            parts.append(F.linear(input, part))
        out = torch.cat(parts, -1)
        return out if bias is None else out + bias.float()


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
