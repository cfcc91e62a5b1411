"""A miniature of everything SceneVLM is made of, small enough to build in a test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from corematching.demo import SceneAssets, write_assets

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>"]
IMAGE_TOKEN_ID = 3
WIDTH = 32
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
IMAGE_PROCESSOR = {
    "size": {"height": 32, "width": 32},
    "do_center_crop": False,
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIALS + letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def write_language_model(folder: Path, layers: int = 4) -> Path:
    """A random Llama with tied embeddings and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_scene_assets(folder: Path, seed: int = 1) -> SceneAssets:
    """Random vision tower, projector and two pairs of LoRA factors, in the shipped form."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    projector = LlavaMultiModalProjector(
        LlavaConfig(vision_config=VISION, text_config={"model_type": "llama", "hidden_size": WIDTH})
    )
    tensors = {f"vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    tensors |= {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    for name, rows, columns in (("self_attn.q_proj", WIDTH, WIDTH), ("mlp.down_proj", WIDTH, 64)):
        tensors[f"lora.layers.1.{name}.A"] = torch.randn(2, columns)
        tensors[f"lora.layers.1.{name}.B"] = torch.randn(rows, 2)
    config = {
        "vision_config": VISION,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "image_token_id": IMAGE_TOKEN_ID,
        "image_processor": IMAGE_PROCESSOR,
    }
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    return write_assets(folder, half, config, scale=0.5)
