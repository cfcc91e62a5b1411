"""Tiny models of families whose decoders differ from Llama's, beside those of `tests.models`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.tiny_model import (
    IMAGE_ID,
    LAYERS,
    TinyModel,
    flat_pixels,
    sized_pixels,
    tiled_pixels,
)


def _placed_patches(images: Sequence[int], rng: torch.Generator) -> dict[str, Tensor]:
    """Gemma 4's 8 x 8 patches of 3 x 4 x 4 values for every image, and where they stand."""
    count = sum(images)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    places = torch.stack([columns, rows], -1).view(1, 64, 2)
    return {
        "pixel_values": torch.rand(count, 64, 48, generator=rng),
        "image_position_ids": places.expand(count, -1, -1).contiguous(),
    }


def _gemma4(**text_config: Any) -> TinyModel:
    return TinyModel(
        text="Gemma4TextConfig",
        text_config={
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
            "sliding_window": 512,
            "vocab_size_per_layer_input": 128,
            "global_head_dim": 32,
            **text_config,
        },
        model="Gemma4ForConditionalGeneration",
        config="Gemma4Config",
        vision="Gemma4VisionConfig",
        vision_config={
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        whole_config={
            "image_token_id": IMAGE_ID,
            "video_token_id": IMAGE_ID + 1,
            "audio_token_id": IMAGE_ID + 2,
            "boi_token_id": IMAGE_ID + 3,
            "eoi_token_id": IMAGE_ID + 4,
            "boa_token_id": IMAGE_ID + 5,
            "eoa_token_index": IMAGE_ID + 6,
        },
        image_tokens=16,
        pixels=_placed_patches,
        token_types="mm_token_type_ids",
    )


MORE_FAMILIES: dict[str, TinyModel] = {
    # attention scaled by positions
    "ministral3": TinyModel(
        text="Ministral3Config",
        text_config={
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 64.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.5,
            },
        },
        model="Mistral3ForConditionalGeneration",
        config="Mistral3Config",
        vision="PixtralVisionConfig",
        vision_config={"image_size": 32},
        whole_config={"image_token_index": IMAGE_ID},
        image_tokens=16,
        pixels=sized_pixels(32),
    ),
    # layers that call the cache layer_past, and FFNs without a gate
    "llava_neox": TinyModel(
        text="GPTNeoXConfig",
        text_config={},
        model="LlavaForConditionalGeneration",
        config="LlavaConfig",
        vision="CLIPVisionConfig",
        vision_config={"image_size": 16},
        whole_config={"image_token_index": IMAGE_ID},
        image_tokens=16,
        pixels=flat_pixels(16),
    ),
    # other heads in full layers than in sliding ones
    "gemma4": _gemma4(
        hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1
    ),
    # embeddings of the tokens for each layer
    "gemma4_per_layer": _gemma4(hidden_size_per_layer_input=8),
    # image features that the decoder adds between layers
    "granite4_vision": TinyModel(
        text="Granite4VisionTextConfig",
        text_config={},
        model="Granite4VisionForConditionalGeneration",
        config="Granite4VisionConfig",
        vision="SiglipVisionConfig",
        vision_config={
            "image_size": 16, "hidden_size": 64, "num_attention_heads": 2, "vision_use_head": False
        },
        whole_config={
            "image_token_index": IMAGE_ID,
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "spatial_vision_layer": -1,
            "spatial_target_layers": [1, 2, 2, 3],
            "vision_feature_select_strategy": "full",
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 1,
                "intermediate_size": 32,
                "cross_attention_frequency": 1,
                "use_qformer_text_input": False,
            },
        },
        image_tokens=4 + 2 * (4 + 1),
        pixels=tiled_pixels,
    ),
}  # fmt: skip
