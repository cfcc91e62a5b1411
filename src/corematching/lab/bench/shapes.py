"""Published architectures by name, to be filled with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corematching.errors import unknown_name


@dataclass(frozen=True)
class Shape:
    """An architecture and its form of a picture.

    Attributes
    ----------
    name : str
    source : str
        The model whose published configuration this is.
    model, config : str
        Class names in transformers.
    text, vision, whole : dict
        The parts' settings other than the classes' defaults.
    image_tokens : int
        Of one picture.
    pixels : dict
        Per picture, the shape of each random float input.
    extras : callable
        ``extras(batch)`` gives integer inputs, as nested lists.
    before, after : tuple of int
        Token ids right before and right after a picture's.
    patch_rows : bool
        Whether the pictures of a batch come as one list of patches.
    token_types : str
        Name of the input that marks image tokens, if there is one.
    """

    name: str
    source: str
    model: str
    config: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    whole: Mapping[str, Any]
    image_tokens: int
    pixels: Mapping[str, tuple[int, ...]]
    extras: Callable[[int], dict[str, Any]] = field(default=lambda batch: {})
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    patch_rows: bool = False
    token_types: str = ""

    def make_config(self) -> Any:
        """The transformers configuration."""
        import transformers

        kind = getattr(transformers, self.config)
        parts = kind.sub_configs
        text = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **self.text}
        vision = dict(self.vision)
        for values, part in ((text, "text_config"), (vision, "vision_config")):
            own = getattr(parts[part], "model_type", "")
            values.setdefault("model_type", own)
        return kind(text_config=text, vision_config=vision, **self.whole)

    @property
    def image_id(self) -> int:
        """The id of image placeholder tokens."""
        return self.whole.get("image_token_id", self.whole.get("image_token_index"))


CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _llava(name: str, text: Mapping[str, Any], vision: Mapping[str, Any], source: str) -> Shape:
    side = vision["image_size"]
    return Shape(
        name=name,
        source=source,
        model="LlavaForConditionalGeneration",
        config="LlavaConfig",
        text={"model_type": "llama", "tie_word_embeddings": False, **text},
        vision=vision,
        whole={
            "image_token_index": text["vocab_size"] - 64,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
        },
        image_tokens=(side // vision["patch_size"]) ** 2,
        pixels={"pixel_values": (3, side, side)},
    )


def _qwen(name: str, tied: bool, source: str, **text: Any) -> Shape:
    ids = {
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Shape(
        name=name,
        source=source,
        model="Qwen2_5_VLForConditionalGeneration",
        config="Qwen2_5_VLConfig",
        text={"rope_parameters": rope, "tie_word_embeddings": tied, **text},
        vision={"out_hidden_size": text["hidden_size"], "hidden_size": 1280, "depth": 32},
        whole={**ids, "tie_word_embeddings": tied},
        image_tokens=576,  # a picture of 672 x 672: 48 x 48 patches, merged 2 x 2
        pixels={"pixel_values": (48 * 48, 3 * 2 * 14 * 14)},
        extras=lambda batch: {"image_grid_thw": [[1, 48, 48]] * batch},
        before=(ids["vision_start_token_id"],),
        after=(ids["vision_end_token_id"],),
        patch_rows=True,
        token_types="mm_token_type_ids",
    )


def _smolvlm() -> Shape:
    return Shape(
        name="smolvlm-500m",
        source="SmolVLM-500M-Instruct",
        model="SmolVLMForConditionalGeneration",
        config="SmolVLMConfig",
        text={
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        whole={"image_token_id": 49190, "scale_factor": 4, "tie_word_embeddings": False},
        image_tokens=17 * 64,  # 4 x 4 tiles and an overview, 64 tokens each
        pixels={"pixel_values": (17, 3, 512, 512)},
    )


def _llama(hidden: int, width: int, layers: int, heads: int, vocab: int = 32064) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
    }


TINY_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _llava("llava-1.5-7b", _llama(4096, 11008, 32, 32), CLIP_L_336, "LLaVA-1.5-7B"),
        _llava("llava-1.5-13b", _llama(5120, 13824, 40, 40), CLIP_L_336, "LLaVA-1.5-13B"),
        _qwen(
            "qwen2.5-vl-7b",
            tied=False,
            source="Qwen2.5-VL-7B-Instruct",
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        _qwen(
            "qwen2.5-vl-3b",
            tied=True,
            source="Qwen2.5-VL-3B-Instruct",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
        ),
        _smolvlm(),
        _llava("tiny", _llama(64, 160, 4, 4, vocab=256), TINY_VISION, "no model: for tests"),
    )
}
"""Name -> shape."""


def find_shape(name: str) -> Shape:
    """The shape of a name.

    Raises
    ------
    ConfigError
        There is none; the message names the nearest one.
    """
    if name.lower() not in SHAPES:
        raise unknown_name("shape", name, SHAPES)
    return SHAPES[name.lower()]
