"""What a tiny model is made of, and its pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 128
HIDDEN = 64
WIDTH = 96
LAYERS = 4
PAD_ID = 0
IMAGE_ID = 120
IMAGE_ID_BEYOND_VOCAB = VOCAB  # Gemma 3 and PaliGemma allow an id without an embedding
FIRST_TEXT_ID, LAST_TEXT_ID = 3, 100

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


@dataclass(frozen=True)
class TinyModel:
    """How to build one tiny model and its inputs.

    Attributes
    ----------
    text : str
        Class name of the text configuration.
    text_config : dict
        What the text configuration has beside `TEXT`.
    model : str
        Class name of the model.
    config : str
        Class name of the whole configuration; empty for a text-only model.
    vision : str
        Class name of the vision configuration.
    vision_config, whole_config : dict
        What the vision and the whole configuration have beside the defaults.
    image_tokens : int
        Tokens of one image; 0 for a text-only model.
    pixels : callable or None
        ``pixels(images)`` with the number of images of every sample gives ``pixel_values`` etc.
    token_types : str
        Name of the input that marks image tokens, if the family has one.
    image_type : int
        What marks them there.
    attention : tuple of str
        Attention implementations that the family has.
    """

    text: str
    model: str
    text_config: dict[str, Any]
    config: str = ""
    vision: str = ""
    vision_config: dict[str, Any] | None = None
    whole_config: dict[str, Any] | None = None
    image_tokens: int = 0
    pixels: Callable[[Sequence[int], torch.Generator], dict[str, Tensor]] | None = None
    token_types: str = ""
    image_type: int = 1
    attention: tuple[str, ...] = ("sdpa", "eager")

    @property
    def has_vision(self) -> bool:
        """Whether the model takes images."""
        return bool(self.config)

    @property
    def image_id(self) -> int:
        """The id of an image placeholder."""
        whole = self.whole_config or {}
        return whole.get("image_token_id", whole.get("image_token_index", IMAGE_ID))

    def make_config(self, **overrides: Any) -> Any:
        """The configuration; ``overrides`` go to its text part."""
        text = {**TEXT, **self.text_config, **overrides}
        if not self.has_vision:
            return getattr(transformers, self.text)(**text)
        vision = {**VISION, **(self.vision_config or {})}
        return getattr(transformers, self.config)(
            text_config=getattr(transformers, self.text)(**text),
            vision_config=getattr(transformers, self.vision)(**vision),
            **{"tie_word_embeddings": False, **(self.whole_config or {})},
        )


def flat_pixels(size: int) -> Callable[..., dict[str, Tensor]]:
    """(images, 3, size, size), the images of all samples in one row."""

    def make(images: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(sum(images), 3, size, size, generator=rng)}

    return make


def sized_pixels(size: int) -> Callable[..., dict[str, Tensor]]:
    """Flat pixels, with the size of every image."""

    def make(images: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
        sizes = torch.tensor([[size, size]] * sum(images))
        return {**flat_pixels(size)(images, rng), "image_sizes": sizes}

    return make


def tiled_pixels(images: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
    """An overview and two tiles of 16 x 16 for every image of 16 x 32."""
    count = sum(images)
    return {
        "pixel_values": torch.randn(count, 3, 3, 16, 16, generator=rng),
        "image_sizes": torch.tensor([[16, 32]] * count),
    }


def patch_rows(images: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
    """Qwen's rows of 2 x 3 x 4 x 4 values, 8 x 8 patches for every image."""
    count = sum(images)
    return {
        "pixel_values": torch.randn(count * 64, 96, generator=rng),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * count),
    }


def padded_pixels(images: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
    """Idefics' (samples, most images, 3, 32, 32), missing images all zero."""
    pixels = torch.zeros(len(images), max(images), 3, 32, 32)
    for sample, count in enumerate(images):
        pixels[sample, :count] = torch.randn(count, 3, 32, 32, generator=rng)
    return {"pixel_values": pixels}


@torch.no_grad()
def enlarge_weights(model: torch.nn.Module) -> None:
    """Redraw the weights: matrices keep the scale of their input, vectors are jittered."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            fan_in = math.prod(parameter.shape[1:])
            parameter.normal_(0.0, 1.0 / math.sqrt(fan_in))
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.get_input_embeddings().weight.normal_(0.0, 1.0)
