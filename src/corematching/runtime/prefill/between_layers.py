"""What a decoder adds to hidden states between its layers, after tokens were dropped.

A decoder that adds features of the whole prompt between two layers finds hidden states of the whole
prompt there: a layer's output is spread to the tokens' columns, and gathered before the next layer.
Shapes: B samples, T tokens of the prompt, K tokens still present, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from corematching.cache.masks import take
from corematching.model.hooks import stay_eager
from corematching.model.layer_inputs import may_add_between_layers
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec
from corematching.runtime.prefill.layer_inputs import Present


class BetweenLayers:
    """Spreads and gathers hidden states between the layers, where the decoder may add to them.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.
    length : int
        T, tokens of the prompt.
    """

    def __init__(self, parts: ModelSpec, length: int) -> None:
        self.parts, self.length = parts, length
        self._spreads = may_add_between_layers(parts.decoder)

    def install(self, patches: Patches, find: Callable[[], Present | None]) -> None:
        """Put the hooks on; ``find()`` gives the present tokens, or None while all are."""

        @stay_eager
        def spread(_: nn.Module, args: Any, output: Any) -> Any:
            present = find()
            if present is None:
                return None
            if isinstance(output, tuple):
                return (self._spread(output[0], present.origin), *output[1:])
            return self._spread(output, present.origin)

        def process(original: Any, hidden: Tensor, masks: Tensor, features: Tensor) -> Tensor:
            present = find()
            if present is None:
                return original(hidden, masks, features)
            return _add_to_present(original, hidden, masks, features, present)

        for layer in self.parts.layers[:-1] if self._spreads else ():
            patches.add_hook(layer, spread)
        if hasattr(self.parts.decoder, "_deepstack_process"):
            patches.wrap(self.parts.decoder, "_deepstack_process", process)

    def gather(self, hidden: Tensor, origin: Tensor) -> Tensor:
        """Spread hidden states (B, T, d) to (B, K, d) of the tokens in ``origin`` (B, K)."""
        return take(hidden, origin) if self._spreads else hidden

    def _spread(self, hidden: Tensor, origin: Tensor) -> Tensor:
        """(B, K, d) to (B, T, d), zeros for dropped tokens."""
        batch, _, size = hidden.shape
        places = origin.to(hidden.device)[..., None].expand(-1, -1, size)
        return hidden.new_zeros(batch, self.length, size).scatter(1, places, hidden)


def _add_to_present(
    original: Any, hidden: Tensor, masks: Tensor, features: Tensor, present: Present
) -> Tensor:
    """Make Qwen3-VL add its visual features to the present tokens only."""
    rows = torch.zeros(masks.shape, dtype=torch.long, device=masks.device)
    rows[masks] = torch.arange(int(masks.sum()), device=masks.device)
    origin = present.origin.to(masks.device)
    left = masks.gather(1, origin) & present.valid.to(masks.device)
    picked = rows.gather(1, origin)[left]
    return original(hidden, left, features[picked.to(features.device)])
