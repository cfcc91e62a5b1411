"""Small models whose prompts run in the kernels, and what runs in them."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from corematching.backends.cpu.native import Gemm, PrefillLayer, prefers_native

by_default = pytest.mark.skipif(
    not prefers_native(torch.bfloat16), reason="prompts stay PyTorch's here"
)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Heads of 12 numbers: layers run in parts."""
NEURONS = {"token_score": None, "dense_first": 0, "dense_last": 0}


def build(kind="llama", dtype=torch.bfloat16):
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "granite": (GraniteConfig, GraniteForCausalLM),
    }[kind]
    extra = {"residual_multiplier": 0.2} if kind == "granite" else {}
    return model(config(**SIZES, **extra)).to(dtype).eval()


@pytest.fixture
def native_calls(monkeypatch):
    """Counts the products that run in the kernels, and whole layers."""
    counted = []
    for kind, name in ((Gemm, "linear"), (Gemm, "gated"), (Gemm, "joint"), (PrefillLayer, "run")):
        own = getattr(kind, name)

        def count(self, *args, own=own, name=name, **kwargs):
            counted.append(name)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, count)
    return counted


def prompt(batch=1, length=11):
    return torch.arange(batch * length).view(batch, length) * 7 % 97


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits.float()
