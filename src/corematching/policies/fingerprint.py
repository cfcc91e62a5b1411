"""A number that identifies a sample's picture and text, independent of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from corematching.policies.features import read_embeddings
from corematching.policies.shuffle import hash_words
from corematching.protocol import PrefillView

PROBES = 16
"""Image tokens that are looked at."""


def fingerprint(view: PrefillView) -> Tensor:
    """A hash of what a sample shows, the same in any row of any batch.

    Hashed is the channel in which a token's input embedding is largest, with its index: for every
    text token, and for `PROBES` image tokens at equal distances, of which the mean image
    token is subtracted first. A largest channel does not move with the rounding by which a batch
    differs from its single samples (but for near ties), so that equal inputs get equal numbers.

    Returns
    -------
    Tensor
        (B,) long.

    Raises
    ------
    ConfigError
        When the view has no embeddings.
    """
    embeddings = read_embeddings(view)
    image, text = view.image, view.text
    total = image.sum(1, keepdim=True)
    mean = embeddings.masked_fill(~image.unsqueeze(-1), 0).sum(1) / total.clamp(min=1)
    index = torch.where(image, image.cumsum(1), text.cumsum(1))  # from 1 on
    step = total.div(PROBES, rounding_mode="floor").clamp(min=1)
    probes = image & ((index - 1) % step == 0)
    centred = torch.where(image.unsqueeze(-1), embeddings - mean.unsqueeze(1), embeddings)
    words = hash_words(image.long(), index, centred.argmax(-1))
    words = words.masked_fill(~(probes | text), 0)
    return hash_words(words.sum(1))
