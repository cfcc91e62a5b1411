"""The attention bias for merged tokens, in decode steps and further turns.

A kept token that represents n tokens has log(n) added to its attention scores (proportional
attention: Token Merging, arXiv:2210.09461, section 3). The cache holds the log counts; every
decoder layer's forward, compiled ones included, adds them to the layer's mask.
Shapes: B samples, Q queries, K prompt tokens in the cache, S columns of the mask.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from corematching.cache.masks import add_weights
from corematching.cache.pruned_cache import pruned_prompt_of
from corematching.cache.pruned_prompt import PrunedPrompt
from corematching.model.layer_inputs import find_cache
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec
from corematching.protocol import TokenPolicy

log = logging.getLogger(__name__)

ADDITIVE = ("sdpa", "eager")
"""Attention implementations that take additive masks."""


def can_weigh(config: Any) -> bool:
    """Whether a text model's attention takes an additive bias; warns once if not."""
    name = config._attn_implementation
    if name is None or name in ADDITIVE:
        return True
    warn_once(name)
    return False


@functools.cache
def warn_once(name: str) -> None:
    """Warn that an attention implementation ignores the weights of kept tokens."""
    log.warning(
        "%s cannot add to attention scores, so kept tokens count for themselves only, not for the "
        "dropped ones around them: model.set_attn_implementation('sdpa') gives better answers",
        name,
    )


class TokenCountBias:
    """Adds a cache's log counts to the masks of the decoder layers.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.
    tokens : TokenPolicy or None
        The token policy; the bias applies if it is ``proportional``.
    """

    def __init__(self, parts: ModelSpec, tokens: TokenPolicy | None) -> None:
        self.parts = parts
        self.weighs = tokens is not None and tokens.proportional

    def install(self, patches: Patches) -> None:
        """Replace the layers' forwards on their instances, if choices carry weights."""
        for index, layer in enumerate(self.parts.layers if self.weighs else ()):
            patches.wrap(layer, "forward", functools.partial(_run_layer, index))


def _run_layer(index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
    cache: Any = find_cache(kwargs)
    memory = pruned_prompt_of(cache)
    if memory is None or memory.log_counts is None:
        return original(*args, **kwargs)
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim != 4:
        return original(*args, **kwargs)  # flash attention
    stored, first = cache.layers[index].get_mask_sizes(hidden.shape[1])
    if torch.compiler.is_compiling():
        mask = _weigh(memory, mask, stored, first, hidden)
    else:
        key = (stored, first, hidden.device)
        known = memory.masks
        if known is None or known[0] != key or known[1] is not mask:
            memory.masks = key, mask, _weigh(memory, mask, stored, first, hidden)
        assert memory.masks is not None
        mask = memory.masks[2]
    return original(*args, **dict(kwargs, attention_mask=mask))


def _weigh(
    memory: PrunedPrompt, mask: Tensor | None, stored: int, first: int, hidden: Tensor
) -> Tensor:
    """The mask (B, 1, Q, S) of a layer with ``stored`` columns from column ``first`` on."""
    assert memory.log_counts is not None
    memory.check_batch(hidden.shape[0])
    columns = memory.log_counts.to(hidden.device)
    missing = first + stored - columns.shape[1]
    columns = F.pad(columns, (0, missing)) if missing > 0 else columns
    columns = columns[:, None, None, first : first + stored].to(hidden.dtype)
    if mask is None:
        return columns
    return add_weights(mask, columns[..., : mask.shape[-1]], hidden.dtype)
