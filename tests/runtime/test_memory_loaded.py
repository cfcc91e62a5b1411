"""Models that were loaded without their FFNs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from corematching.errors import (
    AlreadyInstalledError,
    InputError,
    MemoryCapError,
    UnsupportedModelError,
)
from corematching.offload.source import open_checkpoint
from corematching.runtime import load
from tests.models import build, make_inputs
from tests.runtime.capped import (
    CAP,
    FAMILIES,
    answer,
    in_memory,
    method,
    middle,
    same,
)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_loaded_without_its_ffns_answers_as_in_memory(name, stored):
    whole, chosen = build(name), method(name)
    inputs = make_inputs(name, whole)
    model = load(stored(name), CAP, device="cpu")
    with chosen(model):
        assert same(answer(model, inputs), in_memory(whole, inputs, chosen))


def test_bfloat16_from_float32_files(stored):
    chosen, path = method(), stored("llava")
    whole = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).eval()
    inputs = make_inputs("llava", whole)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    model = load(path, CAP, dtype=torch.bfloat16, device="cpu")
    with chosen(model):
        assert same(answer(model, inputs), in_memory(whole, inputs, chosen))


def test_a_loaded_model_gets_its_meta_weights_back(stored):
    model = load(stored("llava"), CAP, device="cpu")
    before = dict(model.named_parameters())
    assert middle(model).weight.is_meta
    with method()(model):
        answer(model, make_inputs("llava", model))
        assert not middle(model).weight.is_meta
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_what_stays_must_fit_before_anything_is_loaded(stored):
    with pytest.raises(MemoryCapError, match="beside the FFNs takes"):
        load(stored("llava"), "64KiB", device="cpu")


def test_dense_layers_count_as_resident(stored):
    model = load(stored("llava"), "600KiB", device="cpu")
    with method(dense_first=0, beta=0.1)(model), pytest.raises(AlreadyInstalledError):
        method().install(model)
    with pytest.raises(MemoryCapError, match="fewer end layers dense"):
        method(dense_first=3, beta=0.1).install(model)
    assert middle(model).weight.is_meta


def test_layers_that_compute_more_are_refused_at_the_first_prompt(stored):
    model = load(stored("llava"), CAP, device="cpu")
    ffn = model.get_decoder().layers[3].mlp
    own = ffn.forward
    ffn.forward = lambda x: own(x) + 1
    with method()(model), pytest.raises(UnsupportedModelError, match="computes more than"):
        answer(model, make_inputs("llava", model))


def test_a_loaded_model_without_a_method_does_not_run(stored):
    model = load(stored("llava"), CAP, device="cpu")
    with pytest.raises(InputError, match="without its FFNs and runs with a method only"):
        answer(model, make_inputs("llava", model))


def test_tokens_only_keeps_everything_in_memory(stored):
    whole, chosen = build("llava"), method(neuron_score=None)
    inputs = make_inputs("llava", whole)
    model = load(stored("llava"), CAP, device="cpu")
    with chosen(model) as run:
        assert same(answer(model, inputs), in_memory(whole, inputs, chosen))
        assert run.report.memory.streamed_bytes == run.report.memory.slot_bytes == 0


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00no json!")
    with pytest.raises(InputError, match="no safetensors file"):
        open_checkpoint([broken])
    with pytest.raises(InputError, match="no model"):
        load(tmp_path / "nowhere", CAP)


def test_mixtures_of_experts_are_refused(tmp_path):
    import transformers

    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, vocab_size=32,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        load(tmp_path, CAP)


def test_a_sample_of_nan_in_the_first_prompt_changes_no_other(stored):
    whole, chosen = build("llava"), method()
    model = load(stored("llava"), CAP, device="cpu")
    inputs = make_inputs("llava", whole, batch=2)
    inputs["pixel_values"][0] = torch.nan
    expected = in_memory(whole, inputs, chosen)
    with chosen(model):
        for ours, theirs in zip(answer(model, inputs), expected, strict=True):
            torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-5)
