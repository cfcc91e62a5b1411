"""Engines on tiny models, and SceneVLM where its language model is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from PIL import Image

from corematching import CoreMatching
from corematching.demo.language import PACKAGE
from corematching.lab.evaluate import SceneQA
from corematching.media import read_picture
from corematching.serving import Engine
from tests.cli.conftest import picture, tiny_lm, tiny_vlm  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The engine's thread and the tests' share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tiny_vlm):  # noqa: F811
    """An engine on a random model that does not stop by itself."""
    with Engine.from_pretrained(
        str(tiny_vlm), CoreMatching(keep_ratio=0.5), max_batch=4, max_queue=8, device="cpu"
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def scene():
    """An engine on SceneVLM."""
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"the wheel of {PACKAGE} is not installed")
    with Engine.from_pretrained("SceneVLM", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="session")
def questions():
    """Twenty-one chats of SceneQA, from every part of it."""
    task = SceneQA.load()
    step = len(task.questions) // 21
    chosen = [task.questions[index * step] for index in range(21)]
    return [ask(task.prompt(each), read_picture(each.image)) for each in chosen]


def ask(text: str, *pictures: Image.Image) -> list[dict]:
    """A chat of one question."""
    parts: list[dict] = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
