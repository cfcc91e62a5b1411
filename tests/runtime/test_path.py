"""The report's counters of native layers, native steps and replayed steps."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from corematching import Sparsifier, TopNeurons
from corematching.backends.cpu.native import find_kernels, prefers_native
from corematching.report import PathReport
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod, generate
from tests.runtime.replaying import replaying
from tests.runtime.test_graph import StandIn

compiled = pytest.mark.skipif(find_kernels() is None, reason="no compiled kernels here")
LAYERS = 3


def build_llama():
    """A model whose prompts of 64 tokens and more run in compiled code, where any do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def prompt(length):
    return torch.arange(length)[None] * 7 % 97


def make_method():
    return TestMethod(RandomTokens((1,), (1,), share=0.5), RandomNeurons((1,)))


def test_nothing_but_pytorch():
    model = build("llava")
    run = attach(model, make_method(), engine="torch")
    generate(model, make_inputs("llava", model))
    assert run.report.path == PathReport(0, 0, 0) and run.report.kernel == "torch"


@compiled
def test_each_run_counts_its_own_steps():
    model = build("llava")
    inputs = make_inputs("llava", model)
    run = attach(model, make_method(), engine="native")
    for steps in (5, 1, 3):
        generate(model, inputs, steps)
    assert [report.path.native_steps for report in run.reports] == [4, 0, 2]
    assert [report.decode_steps for report in run.reports] == [4, 0, 2]
    assert not any(report.path.graph_replays for report in run.reports)
    assert run.report.to_dict()["path"]["native_steps"] == 2


def test_replayed_steps_are_counted():
    model = build("llava")
    inputs = make_inputs("llava", model)
    run = attach(model, make_method(), engine="torch")
    with replaying(run, StandIn):
        for _ in range(2):
            generate(model, inputs, 5)
        first, second = (report.path for report in run.reports)
    assert first == PathReport(graph_replays=3), "all steps but the very first"
    assert second == PathReport(graph_replays=4)


@pytest.mark.skipif(not prefers_native(torch.bfloat16), reason="prompts stay PyTorch's here")
@torch.no_grad()
def test_each_prompt_counts_its_own_layers():
    model = build_llama()
    run = Sparsifier(neurons=TopNeurons(0.5, dense_first=0, dense_last=0)).install(model)
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt(80), past_key_values=cache)
    assert run.report.path == PathReport(native_layers=LAYERS)
    steps = 0
    for _ in range(2):
        model(input_ids=prompt(1), past_key_values=cache)
        steps += 1
    assert run.report.path == PathReport(native_layers=LAYERS, native_steps=steps)
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: None)
    model(input_ids=prompt(80))
    assert run.report.path.native_layers == LAYERS - 1, "the hook sees its layer's own forward"
    handle.remove()
    model(input_ids=prompt(70), past_key_values=cache)
    assert run.report.continued
    paths = [report.path.native_layers for report in run.reports]
    assert paths == [LAYERS, LAYERS - 1, LAYERS]
    detach(model)
