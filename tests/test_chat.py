"""One chat's tokens and pixels: the same as transformers gives for the chat template."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from corematching.chat import ask, encode, render
from tests.cli.conftest import tiny_lm, tiny_vlm  # noqa: F401

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
PLAIN = TEMPLATE.replace("{{ bos_token }}", "")
RED = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def vision(tiny_vlm):  # noqa: F811
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm)
    return model, AutoProcessor.from_pretrained(tiny_vlm)


@pytest.fixture
def text(tiny_lm):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.bos_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(tiny_lm), tokenizer


def by_transformers(processor, turns):
    return processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("pictures", [[RED], [RED, RED], []])
def test_a_chat_with_pictures(vision, pictures):
    model, processor = vision
    turns = ask("How many squares?", pictures)
    ours, theirs = encode(model, processor, [turns]), by_transformers(processor, turns)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(ours[name])) for name in theirs)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN])
def test_a_chat_with_a_text_only_model(text, template):
    model, tokenizer = text
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "How many squares?"}]
    ours = encode(model, tokenizer, [ask("How many squares?")])
    theirs = by_transformers(tokenizer, turns)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_without_a_template(vision, text, monkeypatch):
    model, tokenizer = text
    tokenizer.chat_template = None
    ours = encode(model, tokenizer, [ask("How many?")])
    assert torch.equal(ours["input_ids"], tokenizer("How many?", return_tensors="pt")["input_ids"])
    _, processor = vision
    monkeypatch.setattr(processor, "chat_template", None)
    turns = [*ask("How many?", [RED, RED]), *ask("Why?")]
    assert render(processor, turns) == processor.image_token * 2 + "How many?\nWhy?"
