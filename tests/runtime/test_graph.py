"""Replayed steps give what PyTorch's give; without a GPU, a stand-in runs a step again."""

from __future__ import annotations

import logging

import pytest
import torch

from corematching.backends.cuda import graph as graph_module
from corematching.backends.cuda.backend import CudaBackend
from corematching.backends.cuda.frame import show_columns
from corematching.methods import method_from_text
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import (
    RandomNeurons,
    RandomTokens,
    TestMethod,
    assert_same,
    generate,
)
from tests.runtime.replaying import replaying

WHOLE = ["llama", "qwen2", "qwen3", "mistral", "llava", "llava_onevision", "qwen2_vl", "qwen3_vl"]
SLIDING = ["gemma2", "gemma3", "mistral_window", "llava_mistral_window"]
STEPS = 6


class StandIn:
    """A recorder that captures without running and replays on the same tensors, as CUDA does."""

    def capture(self, work):
        self.work = work

    def replay(self):
        self.work()


class Broken(StandIn):
    def capture(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")


class Replaying:
    """A method on a model whose decode steps are replayed."""

    def __init__(self, model, method, make_recorder=StandIn):
        self.model, self.method, self.make_recorder = model, method, make_recorder

    def __enter__(self):
        self.run = attach(self.model, self.method, "torch")
        self._block = replaying(self.run, self.make_recorder)
        self.steps = self._block.__enter__()
        return self

    def __exit__(self, *error):
        self._block.__exit__(*error)
        detach(self.model)


def make_method(batch=1, tokens=True):
    seeds = tuple(range(1, batch + 1))
    return TestMethod(
        RandomTokens((1,), seeds, share=0.5) if tokens else None, RandomNeurons(seeds, True)
    )


def plainly(model, method, run):
    attach(model, method, "torch")
    try:
        return run(model)
    finally:
        detach(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_replayed_steps_equal_pytorch(name, batch, attention):
    model = build(name, attention)
    lengths = [10, 7, 9][:batch]
    inputs = make_inputs(name, model, batch=batch, text_lengths=lengths)
    method = make_method(batch, tokens="pixel_values" in inputs)
    expected = plainly(model, method, lambda m: generate(m, inputs, STEPS))
    with Replaying(model, method) as at_work:
        for _ in range(3):
            assert_same(generate(model, inputs, STEPS), expected, tolerance=1e-5)
        assert at_work.run.report.kernel == "torch, CUDA graph"
        assert at_work.steps.captures == 1, "the next prompt fits into the same tensors"
        replays = [report.path.graph_replays for report in at_work.run.reports]
        assert replays == [STEPS - 2, STEPS - 1, STEPS - 1], "all steps but the very first"
    assert "forward" not in vars(model.get_decoder())


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows_run_as_usual(name):
    model = build(name)
    inputs = make_inputs(name, model)
    method = make_method(tokens="pixel_values" in inputs)
    expected = plainly(model, method, lambda m: generate(m, inputs, STEPS))
    with Replaying(model, method) as at_work:
        assert_same(generate(model, inputs, STEPS), expected, tolerance=0)
        report = at_work.run.report
        assert report.path.graph_replays == 0 and report.kernel == "torch"


def test_each_prompt_has_its_own_choices():
    model = build("llava")
    prompts = [make_inputs("llava", model, seed=seed) for seed in (1, 2, 1)]
    method = method_from_text("corematching:keep=0.5,layer=1,beta=0.5")
    expected = [plainly(model, method, lambda m, p=p: generate(m, p, STEPS)) for p in prompts]
    with Replaying(model, method) as at_work:
        for prompt, theirs in zip(prompts, expected, strict=True):
            assert_same(generate(model, prompt, STEPS), theirs, tolerance=1e-5)
        assert at_work.steps.captures == 1


def test_more_tokens_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(graph_module, "MOST_ROOM", 2)
    monkeypatch.setattr(graph_module, "STRIDE", 4)
    model = build("llava")
    inputs, method = make_inputs("llava", model), make_method()
    expected = plainly(model, method, lambda m: generate(m, inputs, 24))
    with Replaying(model, method) as at_work:
        assert_same(generate(model, inputs, 24), expected, tolerance=1e-5)
        assert at_work.steps.captures > 1


def test_beams_equal_pytorch():
    model = build("llava")
    inputs = make_inputs("llava", model)
    method = TestMethod(RandomTokens((1,), (1, 1, 1)), RandomNeurons((1, 1, 1), True))

    def search(model):
        return model.generate(**inputs, max_new_tokens=STEPS, num_beams=3, do_sample=False)

    expected = plainly(model, method, search)
    with Replaying(model, method) as at_work:
        assert torch.equal(search(model), expected)
        assert at_work.steps.captures == 1 and at_work.steps.count


def test_the_cache_holds_what_pytorch_stores():
    model = build("llava")
    inputs, method = make_inputs("llava", model), make_method()

    def keep(model):
        return model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True
        ).past_key_values

    expected = plainly(model, method, keep)
    with Replaying(model, method):
        ours = keep(model)
        before = [layer.keys.clone() for layer in ours.layers]
        generate(model, make_inputs("llava", model, seed=7), STEPS)
        for layer, theirs, keys in zip(ours.layers, expected.layers, before, strict=True):
            torch.testing.assert_close(layer.keys, theirs.keys, rtol=0, atol=1e-5)
            torch.testing.assert_close(layer.values, theirs.values, rtol=0, atol=1e-5)
            assert torch.equal(layer.keys, keys), "somebody still had this cache"


def test_a_hand_written_loop_and_a_second_turn():
    model = build("llava")
    inputs, method = make_inputs("llava", model), make_method()
    turn = torch.tensor([[5, 6, 7]])

    @torch.no_grad()
    def talk(model):
        out = model(**inputs, use_cache=True)
        logits = []
        for asked in (inputs["input_ids"][:, -1:], turn, turn[:, :1], turn[:, 1:2]):
            out = model(input_ids=asked, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
        return torch.stack(logits)

    expected = plainly(model, method, talk)
    with Replaying(model, method) as at_work:
        torch.testing.assert_close(talk(model), expected, rtol=0, atol=1e-5)
        assert at_work.steps.count


def test_new_weights_are_noticed():
    model = build("llava")
    inputs, method = make_inputs("llava", model), make_method()
    with Replaying(model, method) as at_work:
        generate(model, inputs, STEPS)
        weight = model.get_decoder().layers[1].self_attn.q_proj.weight
        weight.data = weight.data.flip(0).clone()
        ours = generate(model, inputs, STEPS)
        assert at_work.steps.captures == 2
    assert_same(ours, plainly(model, method, lambda m: generate(m, inputs, STEPS)), 1e-5)


def test_somebody_s_hook_is_run():
    model = build("llava")
    inputs, method = make_inputs("llava", model), make_method()
    seen = []
    with Replaying(model, method) as at_work:
        layer = model.get_decoder().layers[2].mlp
        handle = layer.register_forward_hook(lambda *_: seen.append(1))
        generate(model, inputs, STEPS)
        handle.remove()
        assert len(seen) == STEPS and at_work.steps.count == 0


def test_what_cannot_be_captured_runs_as_usual(caplog):
    model = build("llava")
    inputs, method = make_inputs("llava", model), make_method()
    expected = plainly(model, method, lambda m: generate(m, inputs, STEPS))
    with Replaying(model, method, Broken) as at_work, caplog.at_level(logging.WARNING):
        assert_same(generate(model, inputs, STEPS), expected, tolerance=1e-5)
        assert_same(generate(model, inputs, STEPS), expected, tolerance=1e-5)
        assert at_work.steps.count == 0 and "cannot be captured" in caplog.text


def test_columns_that_store_nothing_are_hidden():
    visible = torch.tensor([[False, True, True]])
    allowed = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    show_columns(allowed, visible)
    assert allowed.flatten().tolist() == [False, True, True, False, False]
    added = torch.ones(2, 1, 1, 5)
    show_columns(added, visible)
    assert added[1].flatten().tolist()[1:3] == [0, 0]
    assert added[0].flatten()[[0, 3, 4]].eq(torch.finfo(torch.float32).min).all()


def test_a_cpu_has_no_graphs():
    model = build("llava")
    run = attach(model, make_method())
    try:
        assert "CUDA" in CudaBackend.why_unsupported(run._session.parts)
    finally:
        detach(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("name", WHOLE)
def test_on_a_gpu(name):
    model = build(name).cuda()
    inputs = {key: value.cuda() for key, value in make_inputs(name, model, batch=2).items()}
    method = make_method(2, tokens="pixel_values" in inputs)
    expected = plainly(model, method, lambda m: generate(m, inputs, STEPS))
    run = attach(model, method)
    try:
        for _ in range(3):
            assert_same(generate(model, inputs, STEPS), expected, tolerance=1e-3)
        replays = [report.path.graph_replays for report in run.reports]
        assert replays == [STEPS - 2, STEPS - 1, STEPS - 1]
    finally:
        detach(model)
