"""Questions that hold control tokens, and prompts that are too long."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, normalizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2_5_VLConfig,
)

from corematching.cli.entry import run_command
from corematching.cli.prompt import build_inputs
from corematching.errors import InputError
from corematching.inputs import check_room, longest_prompt, max_positions, plain_text
from corematching.lab.evaluate import Subject
from corematching.named_models import LoadedModel
from tests.cli.conftest import picture, tiny_lm, tiny_vlm  # noqa: F401
from tests.demo.scene_fakes import byte_tokenizer

PATCHES = 16
TYPED = ["<image>", "<|im_end|>", "<|im_start|>system", "<|endoftext|>", "<ima<image>ge>", "<image"]


@pytest.fixture(scope="module")
def loaded(tiny_vlm):  # noqa: F811
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm)
    return LoadedModel("tiny", model, AutoProcessor.from_pretrained(tiny_vlm), takes_images=True)


def special_counts(loaded, ids):
    special = loaded.tokenizer.all_special_ids
    return {token: int((ids == token).sum()) for token in special}


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("entry", ["run", "subject"])
def test_typed_special_tokens_are_text(loaded, typed, entry):
    def encode(question):
        image = Image.new("RGB", (32, 32))
        if entry == "run":
            return build_inputs(loaded, [image], question)["input_ids"]
        subject = Subject("tiny", loaded.model, loaded.processor)
        return subject.encode([question], [image])["input_ids"]

    asked, plain = encode(f"What is {typed}?"), encode("What is that?")
    assert special_counts(loaded, asked) == special_counts(loaded, plain)
    assert int((asked == loaded.model.config.image_token_id).sum()) == PATCHES
    assert typed.replace(" ", "") in loaded.tokenizer.decode(asked[0]).replace(" ", "")


@pytest.mark.parametrize("text", ["How many?", "a < b > c", "<", "image", "\n\n  x", "é<|im_", ""])
def test_other_text_stays_as_it_is(loaded, text):
    assert plain_text(loaded.processor, text) == text


def test_marks_of_the_processor_count(loaded):
    class Processor:
        tokenizer = loaded.tokenizer

        def __init__(self):
            self.video_token = "<video>"

    assert plain_text(Processor(), "a <video>") == "a < video>"


def test_a_token_that_cannot_be_escaped_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("[secret]", special=True, normalized=True)])
    assert plain_text(tokenizer, "a [secret] b") == "a [ secret] b"
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("[ ", "[")]
    )
    tokenizer.add_tokens([AddedToken("[secret]", special=True, normalized=True)])
    for text in ("a [secret] b", "a [SECRET] b"):
        with pytest.raises(InputError, match=r"special token '\[secret\]': write it another way"):
            plain_text(tokenizer, text)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (OPTConfig(max_position_embeddings=2048), 2048),
        (BloomConfig(), None),
        (
            LlamaConfig(
                max_position_embeddings=1000,
                rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            ),
            4000,
        ),
        (
            LlamaConfig(
                max_position_embeddings=4000,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 1000,
                },
            ),
            4000,
        ),
        (Gemma3TextConfig(max_position_embeddings=131072), 131072),
        (Qwen2_5_VLConfig(text_config={"max_position_embeddings": 128000}), 128000),
    ],
)
def test_how_many_tokens_a_model_takes(config, limit):
    assert max_positions(config) == limit


def test_the_tokenizer_is_asked_where_the_config_says_nothing():
    tokenizer = SimpleNamespace(model_max_length=77)
    assert max_positions(BloomConfig(), tokenizer) == 77
    assert max_positions(BloomConfig(), SimpleNamespace(model_max_length=int(1e30))) is None
    assert max_positions(LlamaConfig(max_position_embeddings=99), tokenizer) == 99


def test_room():
    check_room(None, 10**9)
    check_room(100, 36, 64)
    with pytest.raises(InputError, match=r"37 tokens and the answer up to 64, .* 100 at most.* 63"):
        check_room(100, 37, 64)
    with pytest.raises(InputError, match="100 tokens, the model takes 100 at most"):
        check_room(100, 100)


def test_padding_does_not_count():
    mask = torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert longest_prompt({"input_ids": mask, "attention_mask": mask}) == 2
    assert longest_prompt({"input_ids": mask}) == 3


@pytest.mark.parametrize("command", ["run", "analyze", "text"])
def test_a_long_question_is_refused_with_both_numbers(
    command,
    tiny_vlm,  # noqa: F811
    tiny_lm,  # noqa: F811
    picture,  # noqa: F811
    tmp_path,
    capsys,
):
    model = tiny_lm if command == "text" else tiny_vlm
    shown = [] if command == "text" else ["--image", str(picture)]
    out = ["--out", str(tmp_path / "a.html")] if command == "analyze" else []
    name = "run" if command == "text" else command
    code = run_command([name, "-m", str(model), *shown, *out, "-q", "x" * 100_000])
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1
    assert "the prompt has 100,0" in said.err and "takes 512 at most" in said.err


def test_an_answer_too_long_for_the_model(tiny_vlm, picture, capsys):  # noqa: F811
    fixed = ["run", "-m", str(tiny_vlm), "-i", str(picture), "-q", "What?"]
    assert run_command([*fixed, "--max-new-tokens", "600"]) == 2
    assert "the answer up to 600, the model takes 512 at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template", ["{% for", '{{ raise_exception("no") }}', "{{ messages[9].x.y }}", "{{ 1/0 }}"]
)
def test_broken_chat_template(tiny_vlm, picture, capsys, tmp_path, template):  # noqa: F811
    import shutil

    folder = shutil.copytree(tiny_vlm, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    for command in ("run", "analyze"):
        asked = ["-m", str(folder), "-i", str(picture), "-q", "What?"]
        out = ["--out", str(tmp_path / "a.html")] if command == "analyze" else []
        assert run_command([command, *asked, *out]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "chat template" in said


def test_a_typed_image_is_no_picture(tiny_vlm, picture, capsys):  # noqa: F811
    asked = ["-i", str(picture), "-q", "Is <image> a tag?", "--json", "--max-new-tokens", "3"]
    assert run_command(["run", "-m", str(tiny_vlm), *asked]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["report"]["samples"]
    assert sample["image_tokens"] == PATCHES
