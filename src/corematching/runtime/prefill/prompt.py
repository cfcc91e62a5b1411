"""Finds padding and image tokens in the inputs of a model's forward."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from corematching.cache.masks import padding_of

logger = logging.getLogger(__name__)


def query_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens per row of a forward with these inputs."""
    x = kwargs.get("input_ids")
    if x is None and args:
        x = args[0]
    if x is None:
        x = kwargs.get("inputs_embeds")
    return 0 if x is None else x.shape[1]


def batch_size(kwargs: dict[str, Any]) -> int:
    """Rows of a forward with these keyword inputs."""
    ids = kwargs.get("input_ids")
    x: Any = kwargs.get("inputs_embeds") if ids is None else ids
    return int(x.shape[0])


def read_prompt(
    model: nn.Module, kwargs: dict[str, Any], image_ids: tuple[int, ...], length: int
) -> tuple[Tensor, Tensor]:
    """Find the padding and the image tokens.

    Parameters
    ----------
    model : nn.Module
        The model.
    kwargs : dict
        The forward's inputs, by name.
    image_ids : tuple of int
        Ids of image tokens.
    length : int
        T, tokens of the prompt.

    Returns
    -------
    valid, image : Tensor
        (B, T) bool, the tokens without padding, and the image tokens.
    """
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    x: Any = ids if ids is not None else embeds
    valid = padding_of(kwargs.get("attention_mask"), x.shape[0], length, x.device)
    image: Tensor | None = None
    for token in image_ids:
        wanted = token if ids is not None else _placeholder(model, token)
        found = x == wanted
        found = found if ids is not None else found.all(dim=-1)
        image = found if image is None else image | found
    image = torch.zeros_like(valid) if image is None else image
    if ids is None and image_ids and not image.any():
        logger.warning(
            "inputs_embeds hold no image placeholder, so no token is dropped: pass input_ids, "
            "or embeddings of the placeholders together with pixel_values"
        )
    return valid, image & valid


def _placeholder(model: Any, token: int) -> Tensor:
    """(d,) embedding of an image token; NaN, which equals nothing, where it has none."""
    embed = model.get_input_embeddings()
    if token >= embed.num_embeddings:
        return embed.weight.new_full((embed.embedding_dim,), torch.nan)
    return embed(torch.tensor(token, device=embed.weight.device))
