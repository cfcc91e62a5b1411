"""What a policy sees of a model during the prefill.

Shapes in this file: B samples, T tokens still present (padding included), N image tokens,
d hidden size, F intermediate neurons of the FFN, H attention heads, I images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class VisionView:
    """The attention of one layer of the vision tower, for the images of a batch.

    Available only in models with one image token per patch. Images are in the prompts' order;
    their patches, in order, are the batch's image tokens in order. N patches per image, S = N plus
    the class tokens, D head dimension, c feature width.

    Attributes
    ----------
    queries, keys : Tensor
        (I, H, S, D), class tokens first.
    scaling : float
        The layer's attention is ``softmax(queries @ keys^T * scaling)``.
    classes : int
        Class tokens, 0 or 1.
    features : Tensor
        (I, N, c), the projector's input.
    project : callable
        The model's projector: (..., c) features to (..., d) input embeddings.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    classes: int
    features: Tensor
    project: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class HostView:
    """What the host knows of the tokens of a `PrefillView` without waiting for the device.

    Attributes
    ----------
    image_counts, text_counts : tuple of int
        Image and text tokens of each sample.
    valid, image : np.ndarray or None
        (B, T) bool, the view's masks; None where only the counts are known.
    """

    image_counts: tuple[int, ...]
    text_counts: tuple[int, ...]
    valid: np.ndarray | None = None
    image: np.ndarray | None = None


@dataclass
class PrefillView:
    """One decoder layer during the prefill, for a whole batch.

    Attributes
    ----------
    layer : int
        Index of the decoder layer that has just run; -1 is the input of layer 0.
    num_layers : int
        Decoder layers of the model.
    valid : Tensor
        (B, T) bool, False on padding.
    image : Tensor
        (B, T) bool, True on image tokens; False on padding.
    activations : Tensor or None
        (B, T, F), the input of ``down_proj``: ``act(gate(x)) * up(x)``, or ``act(up(x))``.
    hidden : Tensor or None
        (B, T, d), the layer's output. None until the layer has finished.
    embeddings : Tensor or None
        (B, T, d), the model's input embeddings of the tokens still present.
    attention : callable or None
        Attention probabilities of some queries: ``attention(rows)`` with ``rows`` (B, R) long gives
        (B, H, R, T), computed for these rows only.
    contributions : callable or None
        ``contributions()`` gives (B, T, d): token j's term of the last token's attention output,
        ``sum_h A_h[last, j] * W_O,h V_h,j``. The sum over j is that output.
    down_proj : Tensor or None
        (d, F), the weight of the down projection.
    inputs : Tensor or None
        (B, T, d), the input of the FFN.
    gate : callable or None
        The FFN's gate for some tokens: ``gate(rows)`` with ``rows`` (B, R) long gives (B, R, F),
        ``act(gate(x))``; in an FFN without a gate ``act(up(x))``.
    kept : Tensor or None
        (B, T) bool, the tokens left after the last cut. A neuron policy that needs it chooses the
        neurons of earlier layers only once this mask is known.
    vision : VisionView or None
        The vision tower's attention.
    origin : Tensor or None
        (B, T) long, the tokens' columns in the whole prompt.
    weights : Tensor or None
        (B, T) float, the number of prompt tokens that each one represents after an earlier choice;
        None: one each.
    host : HostView or None
        What the host knows of the masks without reading them.
    memory : dict
        One object per type, shared by all views of one prefill; see `recall`.
    """

    layer: int
    num_layers: int
    valid: Tensor
    image: Tensor
    activations: Tensor | None = None
    hidden: Tensor | None = None
    embeddings: Tensor | None = None
    attention: Callable[[Tensor], Tensor] | None = None
    contributions: Callable[[], Tensor] | None = None
    down_proj: Tensor | None = None
    inputs: Tensor | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    kept: Tensor | None = None
    vision: VisionView | None = None
    origin: Tensor | None = None
    weights: Tensor | None = None
    host: HostView | None = None
    memory: dict[type, Any] = field(default_factory=dict)

    @property
    def text(self) -> Tensor:
        """(B, T) bool, True on text tokens: neither image nor padding."""
        return self.valid & ~self.image

    @property
    def last(self) -> Tensor:
        """(B,) long, the position of each sample's last token."""
        positions = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (self.valid * positions).argmax(dim=1)

    def recall(self, kind: type[T]) -> T:
        """State that all views of one prefill share, one object per type.

        Parameters
        ----------
        kind : type
            A class of the policy's own, for state that it reads again at a later layer. The first
            call creates the object with ``kind()``.
        """
        if kind not in self.memory:
            self.memory[kind] = kind()
        found: T = self.memory[kind]
        return found
