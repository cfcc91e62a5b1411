"""The input embeddings of the image tokens: the projected features of the vision tower."""

from __future__ import annotations

from torch import Tensor

from corematching.errors import ConfigError
from corematching.protocol import PrefillView


def read_embeddings(view: PrefillView) -> Tensor:
    """The view's (B, T, d) input embeddings, as float32; those of image tokens are the projector's.

    Raises
    ------
    ConfigError
        When the view has none.
    """
    if view.embeddings is None:
        raise ConfigError(
            f"layer {view.layer} shows no embeddings: name 'embeddings' in the policy's needs"
        )
    return view.embeddings.float()


def read_features(view: PrefillView) -> Tensor:
    """`read_embeddings` with zeros where the token is no image token."""
    return read_embeddings(view).masked_fill(~view.image.unsqueeze(-1), 0)
