"""Tiny models and pictures that the command can be run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from corematching.demo import assemble
from tests.demo.scene_fakes import write_language_model, write_scene_assets


def join(defaults: dict[str, object], arguments: Sequence[object]) -> list[str]:
    """The arguments, with those of the default options that are not among them in front."""
    left = [(name, value) for name, value in defaults.items() if name not in arguments]
    return [str(word) for pair in left for word in pair] + [str(word) for word in arguments]


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory) -> Path:
    """A random LLaVA with 16 image tokens, in float32, that does not stop by itself."""
    root = tmp_path_factory.mktemp("tiny_vlm")
    assets = write_scene_assets(root / "assets")
    path = assemble(assets, write_language_model(root / "lm"), root / "model")
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory) -> Path:
    """A random text-only Llama, in float32."""
    path = write_language_model(tmp_path_factory.mktemp("tiny_lm"))
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    """A red square in the upper left of a blue picture."""
    image = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(image).rectangle((0, 0, 31, 31), fill="red")
    path = tmp_path_factory.mktemp("picture") / "square.png"
    image.save(path)
    return path
