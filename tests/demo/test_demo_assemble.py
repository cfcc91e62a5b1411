from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
)

from corematching.demo import SceneAssets, assemble, write_assets
from corematching.demo.assemble import name_ends
from corematching.demo.assets import expand, squeeze
from corematching.errors import InputError
from tests.demo.scene_fakes import (
    IMAGE_TOKEN_ID,
    byte_tokenizer,
    write_language_model,
    write_scene_assets,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    language = write_language_model(root / "lm")
    assets = write_scene_assets(root / "assets")
    steps: list[tuple[str, float]] = []
    out = assemble(assets, language, root / "out", lambda *step: steps.append(step))
    return language, assets, out, steps


@pytest.fixture(scope="module")
def loaded(parts):
    model, info = AutoModelForImageTextToText.from_pretrained(parts[2], output_loading_info=True)
    return model, AutoProcessor.from_pretrained(parts[2]), info


def test_loads_without_our_code(loaded):
    model, processor, info = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.generation_config.eos_token_id == 2


def test_lora_is_merged_and_the_rest_is_untouched(parts, loaded):
    language, assets, _, _ = parts
    plain = AutoModelForCausalLM.from_pretrained(language).model.state_dict()
    merged = loaded[0].model.language_model.state_dict()
    factors = assets.under("lora.")
    for name, weight in plain.items():
        base = name.removesuffix(".weight")
        expected = weight
        if f"{base}.A" in factors:
            update = factors[f"{base}.B"].float() @ factors[f"{base}.A"].float()
            expected = (weight.float() + 0.5 * update).to(weight.dtype)
            assert not torch.equal(expected, weight)
        assert torch.equal(merged[name], expected), name


@pytest.mark.parametrize("named", ["<|im_end|>", None])
def test_the_tokenizer_ends_and_pads_as_the_config_says(named):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = named, named or "<|im_start|>"
    name_ends(tokenizer, LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)


def test_a_config_without_ends_changes_nothing():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    name_ends(tokenizer, LlamaConfig(eos_token_id=[2, 3], pad_token_id=None))
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (2, None)


def test_tower_and_projector_arrive_unchanged(parts, loaded):
    shipped = parts[1].tensors
    state = loaded[0].model.state_dict()
    for name, tensor in shipped.items():
        if name.startswith("lora."):
            continue
        place = name.replace("projector.", "multi_modal_projector.", 1)
        assert torch.equal(state[place], tensor.to(torch.bfloat16)), name


def test_prompt_has_one_token_per_patch_before_the_question(loaded):
    model, processor, _ = loaded
    content = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\n<image>How many?<|im_end|>\n<|im_start|>assistant\n"
    picture = Image.new("RGB", (50, 30), "red")
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == 16
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(inputs["pixel_values"], red)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_image_changes_the_logits(loaded):
    model, processor, _ = loaded
    logits = []
    for colour in ("red", "blue"):
        inputs = processor(
            images=Image.new("RGB", (32, 32), colour), text="<image>What?", return_tensors="pt"
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert not torch.equal(*logits)


def test_progress_rises_to_one(parts):
    fractions = [done for _, done in parts[3]]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_factors_for_an_unknown_layer_are_refused(parts, tmp_path):
    language, assets, _, _ = parts
    tensors = dict(assets.tensors) | {"lora.layers.9.mlp.up_proj.A": torch.ones(1, 1)}
    wrong = write_assets(tmp_path / "wrong", tensors, assets.config, 1.0)
    with pytest.raises(InputError, match=r"layers\.9\.mlp\.up_proj"):
        assemble(wrong, language, tmp_path / "out")


def test_missing_tower_weight_is_refused(parts, tmp_path):
    language, assets, _, _ = parts
    tensors = {k: v for k, v in assets.tensors.items() if "patch_embedding" not in k}
    wrong = write_assets(tmp_path / "wrong", tensors, assets.config, 1.0)
    with pytest.raises(InputError, match="vision tower"):
        assemble(wrong, language, tmp_path / "out")


def test_damaged_weights_are_refused(tmp_path):
    assets = write_scene_assets(tmp_path)
    data = bytearray(assets.weights_path.read_bytes())
    data[-1] ^= 1
    assets.weights_path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"damaged.*pip install"):
        SceneAssets.read(tmp_path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"scenevlm\.json is missing"):
        SceneAssets.read(tmp_path)


def test_rows_are_rounded_to_a_255th_of_their_range():
    tensor = torch.randn(6, 3, 4) * torch.logspace(-3, 3, 6).view(-1, 1, 1)
    tensor[2] = 0
    values, scale = squeeze(tensor)
    assert values.dtype == torch.int8 and values.shape == tensor.shape
    error = (expand(values, scale) - tensor).abs().flatten(1).amax(1)
    assert (error <= tensor.abs().flatten(1).amax(1) / 254 * 1.001).all()


def test_a_tall_matrix_has_one_factor_per_column():
    tensor = torch.randn(40, 3) * torch.tensor([1e-3, 1.0, 1e3])
    values, scale = squeeze(tensor)
    assert scale.shape == (1, 3)
    error = (expand(values, scale) - tensor).abs().amax(0)
    assert (error <= tensor.abs().amax(0) / 254 * 1.001).all()
