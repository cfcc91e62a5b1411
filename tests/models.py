"""Tiny random models of every supported family, and inputs for them, without a network.

Every model has four decoder layers and weights large enough that a dropped token or neuron changes
the logits visibly. `build` gives the same weights for the same name each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.more_models import MORE_FAMILIES
from tests.tiny_model import (
    FIRST_TEXT_ID,
    HIDDEN,
    IMAGE_ID,
    IMAGE_ID_BEYOND_VOCAB,
    LAST_TEXT_ID,
    LAYERS,
    MROPE,
    PAD_ID,
    TEXT,
    VISION,
    VOCAB,
    WIDTH,
    TinyModel,
    enlarge_weights,
    flat_pixels,
    padded_pixels,
    patch_rows,
    sized_pixels,
    tiled_pixels,
)

__all__ = [
    "FAMILIES",
    "FIRST_TEXT_ID",
    "HIDDEN",
    "IMAGE_ID",
    "LAST_TEXT_ID",
    "LAYERS",
    "PAD_ID",
    "TEXT",
    "TEXT_FAMILIES",
    "VISION",
    "VISION_FAMILIES",
    "VOCAB",
    "WIDTH",
    "WINDOW_FAMILIES",
    "build",
    "image_mask",
    "make_inputs",
]


def _llava_like(text: str, **text_config: Any) -> TinyModel:
    return TinyModel(
        text=text,
        text_config=text_config,
        model="LlavaForConditionalGeneration",
        config="LlavaConfig",
        vision="CLIPVisionConfig",
        vision_config={"image_size": 16},
        whole_config={"image_token_index": IMAGE_ID},
        image_tokens=16,
        pixels=flat_pixels(16),
    )


def _idefics_like(name: str) -> TinyModel:
    return TinyModel(
        text="LlamaConfig",
        text_config={},
        model=f"{name}ForConditionalGeneration",
        config=f"{name}Config",
        vision=f"{name}VisionConfig",
        vision_config={"image_size": 32},
        whole_config={"image_token_id": IMAGE_ID, "pad_token_id": PAD_ID},
        image_tokens=16,
        pixels=padded_pixels,
    )


def _qwen_like(name: str, rope: dict[str, Any], **vision_config: Any) -> TinyModel:
    return TinyModel(
        text=f"{name}TextConfig",
        text_config={"rope_parameters": rope},
        model=f"{name}ForConditionalGeneration",
        config=f"{name}Config",
        vision=f"{name}VisionConfig",
        vision_config={"depth": 2, "num_heads": 2, "temporal_patch_size": 2, **vision_config},
        whole_config={
            "image_token_id": IMAGE_ID,
            "video_token_id": IMAGE_ID + 1,
            "vision_start_token_id": IMAGE_ID + 2,
            "vision_end_token_id": IMAGE_ID + 3,
        },
        image_tokens=16,
        pixels=patch_rows,
        token_types="mm_token_type_ids",
    )


def _paligemma_like(text: str, attention: tuple[str, ...], **text_config: Any) -> TinyModel:
    return TinyModel(
        text=text,
        text_config=text_config,
        model="PaliGemmaForConditionalGeneration",
        config="PaliGemmaConfig",
        vision="SiglipVisionConfig",
        vision_config={"image_size": 16, "vision_use_head": False},
        whole_config={
            "image_token_index": IMAGE_ID_BEYOND_VOCAB,
            "projection_dim": HIDDEN,
            "hidden_size": HIDDEN,
        },
        image_tokens=16,
        pixels=flat_pixels(16),
        token_types="token_type_ids",
        image_type=0,
        attention=attention,
    )


def _gemma3(window: int) -> TinyModel:
    return TinyModel(
        text="Gemma3TextConfig",
        text_config={
            "sliding_window": window,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        },
        model="Gemma3ForConditionalGeneration",
        config="Gemma3Config",
        vision="SiglipVisionConfig",
        vision_config={"image_size": 32, "vision_use_head": False},
        whole_config={
            "image_token_index": IMAGE_ID_BEYOND_VOCAB,
            "boi_token_index": IMAGE_ID + 1,
            "eoi_token_index": IMAGE_ID + 2,
            "mm_tokens_per_image": 16,
        },
        image_tokens=16,
        pixels=flat_pixels(32),
        token_types="token_type_ids",
    )


def _text_only(
    name: str, attention: tuple[str, ...] = ("sdpa", "eager"), **config: Any
) -> TinyModel:
    return TinyModel(
        text=f"{name}Config", text_config=config, model=f"{name}ForCausalLM", attention=attention
    )


FAMILIES: dict[str, TinyModel] = {
    "llava": _llava_like("LlamaConfig"),
    "llava_next": TinyModel(
        text="MistralConfig",
        text_config={"sliding_window": None},
        model="LlavaNextForConditionalGeneration",
        config="LlavaNextConfig",
        vision="CLIPVisionConfig",
        vision_config={"image_size": 16},
        whole_config={
            "image_token_index": IMAGE_ID,
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        },
        image_tokens=16 + 4 * (8 + 1),
        pixels=tiled_pixels,
    ),
    "llava_onevision": TinyModel(
        text="Qwen2Config",
        text_config={},
        model="LlavaOnevisionForConditionalGeneration",
        config="LlavaOnevisionConfig",
        vision="SiglipVisionConfig",
        vision_config={"image_size": 16, "vision_use_head": False},
        whole_config={
            "image_token_index": IMAGE_ID,
            "video_token_index": IMAGE_ID + 1,
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        },
        image_tokens=16 + 4 * (8 + 1),
        pixels=tiled_pixels,
    ),
    "qwen2_vl": _qwen_like("Qwen2VL", MROPE, embed_dim=32, hidden_size=HIDDEN),
    "qwen2_5_vl": _qwen_like(
        "Qwen2_5_VL", MROPE, out_hidden_size=HIDDEN, window_size=16, fullatt_block_indexes=[1]
    ),
    "qwen3_vl": _qwen_like(
        "Qwen3VL",
        {**MROPE, "mrope_interleaved": True},
        out_hidden_size=HIDDEN,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    ),
    "internvl": TinyModel(
        text="Qwen2Config",
        text_config={},
        model="InternVLForConditionalGeneration",
        config="InternVLConfig",
        vision="InternVLVisionConfig",
        vision_config={"image_size": [32, 32], "patch_size": [4, 4]},
        whole_config={"image_token_id": IMAGE_ID},
        image_tokens=16,
        pixels=flat_pixels(32),
    ),
    "smolvlm": _idefics_like("SmolVLM"),
    "idefics3": _idefics_like("Idefics3"),
    "paligemma": _paligemma_like("GemmaConfig", ("sdpa", "eager")),
    "paligemma2": _paligemma_like("Gemma2Config", ("eager",), query_pre_attn_scalar=16),
    "gemma3": _gemma3(window=512),
    "mistral3": TinyModel(
        text="MistralConfig",
        text_config={"sliding_window": None},
        model="Mistral3ForConditionalGeneration",
        config="Mistral3Config",
        vision="PixtralVisionConfig",
        vision_config={"image_size": 32},
        whole_config={"image_token_index": IMAGE_ID},
        image_tokens=16,
        pixels=sized_pixels(32),
    ),
    "llama": _text_only("Llama"),
    "qwen2": _text_only("Qwen2"),
    "qwen3": _text_only("Qwen3"),
    "mistral": _text_only("Mistral", sliding_window=None),
    "gemma2": _text_only("Gemma2", ("eager",), query_pre_attn_scalar=16),
    "mistral_window": _text_only("Mistral", sliding_window=6),
    "qwen2_window": _text_only(
        "Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2
    ),
    "gemma2_window": _text_only("Gemma2", ("eager",), sliding_window=6, query_pre_attn_scalar=16),
    "llava_mistral_window": _llava_like("MistralConfig", sliding_window=12),
    "gemma3_window": _gemma3(window=12),
}
FAMILIES |= {
    name: tiny for name, tiny in MORE_FAMILIES.items() if hasattr(transformers, tiny.config)
}
VISION_FAMILIES = tuple(name for name, tiny in FAMILIES.items() if tiny.has_vision)
TEXT_FAMILIES = tuple(name for name, tiny in FAMILIES.items() if not tiny.has_vision)
WINDOW_FAMILIES = tuple(name for name in FAMILIES if name.endswith("_window"))


def build(
    name: str, attn_implementation: str | None = None, seed: int = 0, **overrides: Any
) -> Any:
    """Build a tiny random model: float32, in eval mode, the same weights every time.

    Parameters
    ----------
    name : str
        One of `FAMILIES`.
    attn_implementation : str, optional
        By default the first one that the family has.
    seed : int
        Of the weights.
    **overrides
        Fields of the text configuration.
    """
    tiny = FAMILIES[name]
    rng = torch.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, tiny.model)._from_config(
        tiny.make_config(**overrides),
        attn_implementation=attn_implementation or tiny.attention[0],
        dtype=torch.float32,
    )
    enlarge_weights(model)
    torch.set_rng_state(rng)
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.eos_token_id = None
    return model.eval()


def make_inputs(
    name: str,
    model: Any,
    batch: int = 1,
    images: int | Sequence[int] = 1,
    text_lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs for ``model(**inputs)`` and ``model.generate(**inputs)``.

    Parameters
    ----------
    name : str
        One of `FAMILIES`.
    model
        What `build` gave.
    batch : int
        Samples.
    images : int or sequence of int
        Images of every sample; ignored for text-only models.
    text_lengths : sequence of int, optional
        Text tokens of every sample, at least 2 and one more than its images; by default they
        differ, so that a batch is left-padded.
    seed : int
        Of ids and pixels.
    """
    tiny = FAMILIES[name]
    rng = torch.Generator().manual_seed(seed)
    counts = [images] * batch if isinstance(images, int) else list(images)
    counts = counts if tiny.has_vision else [0] * batch
    lengths = [9 + 3 * (i % 2) for i in range(batch)] if text_lengths is None else text_lengths
    rows = [_sample_ids(tiny, n, k, rng) for n, k in zip(lengths, counts, strict=True)]
    longest = max(len(row) for row in rows)
    input_ids = torch.full((batch, longest), PAD_ID)
    attention_mask = torch.zeros(batch, longest, dtype=torch.long)
    for sample, row in enumerate(rows):
        input_ids[sample, longest - len(row) :] = row
        attention_mask[sample, longest - len(row) :] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if tiny.token_types and any(counts):
        is_image = (input_ids == tiny.image_id).long()
        inputs[tiny.token_types] = is_image * tiny.image_type
    if tiny.pixels is not None and any(counts):
        inputs |= tiny.pixels(counts, rng)
    return {key: value.to(model.device) for key, value in inputs.items()}


def image_mask(name: str, inputs: dict[str, Tensor]) -> Tensor:
    """(B, T) bool, True on image tokens."""
    return inputs["input_ids"] == FAMILIES[name].image_id


def _sample_ids(tiny: TinyModel, length: int, images: int, rng: torch.Generator) -> Tensor:
    """Ids of one sample: a text token before every image, the rest of the text at the end."""
    text = torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID, (length,), generator=rng)
    image = torch.full((tiny.image_tokens,), tiny.image_id)
    parts = [part for i in range(images) for part in (text[i : i + 1], image)]
    return torch.cat([*parts, text[images:]])
