"""Parts of `corematching.protocol.PrefillView`: a vision tower's layer, what the host knows.

Shapes: B samples, T tokens still present, I images, H attention heads, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor


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
