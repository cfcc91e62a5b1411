"""Launches and waits of prompts on a GPU's code path; `test_triton.py` runs this file.

Without a GPU the library takes the CPU for one, and Triton's interpreter runs its kernels. The
models are as deep as SceneVLM, since each layer has its launches.
"""

import contextlib
import functools

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from corematching.errors import ConfigError
from corematching.lab.bench.launches import LaunchCounter, gpu_stand_in
from corematching.methods import CoreMatching, FastV, TopNeurons
from corematching.policies.budgets import Knee
from corematching.policies.token_scores import TextOverlap
from tests.models import build, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST = 1.08
DEFAULT, BY_HAND = CoreMatching(), CoreMatching(keep_ratio=0.2, neurons=TopNeurons(0.4))
TEXT, IMAGE = 20, 64
IMAGE_ID = 100


@functools.cache
def build_scene():
    """A model of SceneVLM's depth, and a question about a picture."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=7, num_attention_heads=2,
        image_size=32, patch_size=4,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=30, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, vocab_size=120, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    model = LlavaForConditionalGeneration(config).eval().to(DEVICE, torch.bfloat16)
    ids = torch.arange(3, 3 + TEXT)
    ids = torch.cat([ids[:4], torch.full((IMAGE,), IMAGE_ID), ids[4:]])[None].to(DEVICE)
    pixels = torch.randn(1, 3, 32, 32).to(DEVICE, torch.bfloat16)
    mask = torch.ones_like(ids)
    return model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@functools.cache
def count(method=None, tokens=1):
    """The counter of a prompt and of ``tokens`` new tokens."""
    model, inputs = build_scene()
    counter = LaunchCounter()
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(gpu_stand_in())
        if method is not None:
            stack.enter_context(method(model, engine="torch"))
        stack.enter_context(counter.counting())
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return counter


@pytest.mark.parametrize("method", [DEFAULT, BY_HAND], ids=["default", "20 %, 40 %"])
def test_a_prompt_launches_little_more_than_dense_and_waits_no_more(method):
    dense, found = count(), count(method)
    assert found.launches.total() <= MOST * dense.launches.total(), found.launches.most_common()
    assert found.waits.total() <= dense.waits.total(), found.waits


def test_one_launch_per_layer_chooses_neurons():
    tokens = count(CoreMatching(neurons=None))
    for method, per_layer in ((DEFAULT, "index_select"), (BY_HAND, "_sum_both_kernel")):
        found = count(method)
        more = found.launches - tokens.launches
        sparse = len(method.neurons.counts(30, 64)) if method is DEFAULT else 23
        assert more[per_layer] == sparse
        assert more.total() - sparse <= 5, more


@pytest.mark.parametrize("stages", [1, 2])
def test_a_knee_waits_once_per_cut(stages):
    layers = (0.2, 0.5)[:stages]
    method = CoreMatching(budget=Knee(), layer=layers, neurons=None)
    assert count(method).waits.total() <= count().waits.total() + stages


def test_what_decoding_needs_is_found_for_all_layers_at_once():
    """The ranking, the means and the thresholds of 23 or 30 layers."""
    for method, name in ((DEFAULT, "_narrow_kernel"), (BY_HAND, "_pick_highest_kernel")):
        found = count(method, tokens=2)
        assert found.launches[name] == 1


CASES = [
    (DEFAULT, {}),
    (DEFAULT, {"batch": 2}),
    (DEFAULT, {"batch": 2, "images": [2, 1], "text_lengths": [12, 9]}),
    (DEFAULT, {"batch": 2, "images": [1, 0]}),
    (BY_HAND, {"batch": 2}),
    (CoreMatching(keep_ratio=0.15, layer=(0, 1, 2)), {"batch": 2, "images": [2, 1]}),
    (CoreMatching(keep_tokens=5, cover=0.0, proportional=False, neurons=None), {}),
    (CoreMatching(budget=Knee(), neurons=None), {"batch": 2}),
    (CoreMatching.paper(), {"batch": 2, "images": [1, 2]}),
    (FastV(), {}),
]


def assert_near(found, expected):
    if found is None or expected is None:
        assert found is expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("method", "prompt"), CASES)
def test_a_gpu_chooses_what_the_cpu_chooses(method, prompt):
    model = build("llava").float()
    inputs = make_inputs("llava", model, **prompt)

    def run(block):
        with block, method(model, engine="torch") as session:
            out = model.generate(
                **inputs, max_new_tokens=2, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            return out, session.choices

    (expected, theirs), (found, ours) = run(contextlib.nullcontext()), run(gpu_stand_in())
    for there, here in zip(theirs, ours, strict=True):
        assert torch.equal(here.prompt_mask, there.prompt_mask)
        assert here.cut_layers == there.cut_layers
        assert_near(here.scores, there.scores)
        for cut, other in zip(here.cuts, there.cuts, strict=True):
            assert torch.equal(cut.prompt_mask, other.prompt_mask)
            assert_near(cut.lowest, other.lowest)
        for layer, other in zip(here.neurons, there.neurons, strict=True):
            assert (layer is None) == (other is None)
            if layer is not None:
                assert torch.equal(layer.indices, other.indices)
                assert_near(layer.gate_threshold, other.gate_threshold)
                assert_near(layer.mean, other.mean)
    assert_near(torch.stack(found.logits), torch.stack(expected.logits))


def test_broken_scores_are_refused_when_the_first_token_is_there(monkeypatch):
    model = build("llava").float()
    broken = property(lambda self: lambda view: view.hidden[..., 0] * float("nan"))
    monkeypatch.setattr(TextOverlap, "score", broken)
    inputs = make_inputs("llava", model)
    with (
        gpu_stand_in(),
        CoreMatching(neurons=None)(model, engine="torch"),
        pytest.raises(ConfigError, match="NaN"),
    ):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
