"""Every way of decoding gives what the plain one gives, and that is what the reference says."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig
from transformers.generation.streamers import BaseStreamer

from corematching.errors import UnsupportedModelError
from tests.models import build, image_mask, make_inputs
from tests.runtime.families import (
    BANNED,
    STEPS,
    RandomNeurons,
    RandomTokens,
    TestMethod,
    assert_same,
    generate,
    reference,
)
from tests.runtime.reference import hidden_tokens, overwritten_neurons

FAMILIES = ["llava", "qwen3_vl", "gemma3"]


def make(name="llava", batch=1, layers=(1,), neurons=True, **inputs):
    """A model with a random method on it, and its inputs."""
    model = build(name)
    tokens = RandomTokens(layers, tuple(range(1, batch + 1)), share=0.5)
    choice = RandomNeurons(tuple(range(1, batch + 1)), True) if neurons else None
    method = TestMethod(tokens, choice)
    return model, method, make_inputs(name, model, batch=batch, **inputs)


@pytest.mark.parametrize("layers", [(1,), (0, 2), (-1,), (-1, 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_schedule_equals_the_reference(name, layers, attached):
    model, method, inputs = make(name, batch=2, layers=layers)
    expected = reference(name, inputs, method)
    attached(model, method)
    assert_same(generate(model, inputs), expected)


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("name", [*FAMILIES, "gemma3_window", "llava_mistral_window"])
def test_a_static_cache_equals_a_dynamic_one(name, layers, attached):
    model, method, inputs = make(name, batch=2, layers=layers)
    attached(model, method)
    static = generate(model, inputs, cache_implementation="static")
    assert_same(static, generate(model, inputs))


def test_no_image_uses_sparse_neurons_only(attached):
    model, method, _ = make(neurons=True)
    method.tokens.seeds = (1,)
    inputs = make_inputs("llava", model, images=0)
    expected = reference("llava", inputs, TestMethod(None, method.neurons))
    run = attached(model, method)
    assert_same(generate(model, inputs), expected)
    assert run.report.samples[0].image_tokens == 0 and run.report.drop_layers == []


def test_several_sequences_of_one_prompt(attached):
    model, method, inputs = make()
    method.tokens.seeds = method.neurons.seeds = (1, 1, 1)
    run = attached(model, method)
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert out.shape[0] == 3 and len(run.report.samples) == 1


def test_sampling_draws_from_the_same_distribution(attached):
    model, method, inputs = make()
    attached(model, method)
    options = {"max_new_tokens": STEPS, "do_sample": True, "top_k": 20}
    torch.manual_seed(3)
    dynamic = model.generate(**inputs, **options)
    torch.manual_seed(3)
    assert torch.equal(dynamic, model.generate(**inputs, **options, cache_implementation="static"))


def test_a_streamer_gets_the_prompt_and_every_token(attached):
    class Listener(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, method, inputs = make()
    attached(model, method)
    listener = Listener()
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=listener)
    assert listener.seen == out[0].tolist() and listener.ended


def test_embeddings_instead_of_ids(attached):
    model, method, inputs = make(neurons=False)
    attached(model, method)
    expected = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_same(generate(model, {"inputs_embeds": embeds, **inputs}), expected)


def test_decode_compiles_once_for_all_prompts(attached):
    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    config._compile_all_devices = True
    model, method, _ = make()
    run = attached(model, method)
    kept = set()
    for seed, words in ((1, 9), (2, 12), (3, 7)):
        method.tokens.seeds = method.neurons.seeds = (seed,)
        inputs = make_inputs("llava", model, text_lengths=[words], seed=seed)
        expected = generate(model, inputs)
        torch._dynamo.utils.counters.clear()
        options = {"cache_implementation": "static", "max_cache_len": 48}
        assert_same(generate(model, inputs, **options, compile_config=config), expected)
        graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        assert graphs == (1 if not kept else 0)
        assert not torch._dynamo.utils.counters["graph_break"]
        kept.add(run.report.samples[0].kept_tokens)
    assert len(kept) > 1, "the prompts must keep different numbers of tokens"


def loop(model, inputs, cache, steps=STEPS, with_mask=True, with_positions=False):
    """A hand-written greedy loop, as users write it."""
    mask = inputs["attention_mask"]
    step = dict(inputs) if with_mask else {k: v for k, v in inputs.items() if k != "attention_mask"}
    positions = mask.cumsum(1) - 1
    logits, tokens = [], []
    for _ in range(steps):
        if with_positions:
            step["position_ids"] = positions.masked_fill(positions < 0, 0)
        with torch.no_grad():
            out = model(**step, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
        cache = out.past_key_values
        allowed = logits[-1].clone()
        allowed[:, BANNED] = -torch.inf
        tokens.append(allowed.argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
        positions = positions[:, -1:] + 1
        step = {"input_ids": tokens[-1]} | ({"attention_mask": mask} if with_mask else {})
    return torch.cat(tokens, 1), torch.stack(logits, 1)


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_a_hand_written_loop_equals_generate(kind, with_mask, attached):
    model, method, inputs = make(batch=2, text_lengths=[9, 9])
    attached(model, method)
    expected = generate(model, inputs)
    cache = {
        "none": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[kind]()
    tokens, logits = loop(model, inputs, cache, with_mask=with_mask)
    assert torch.equal(tokens, expected.tokens)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)


def test_a_hand_written_loop_over_a_padded_batch(attached):
    model, method, inputs = make(batch=2)
    run = attached(model, method)
    expected = generate(model, inputs)
    tokens, logits = loop(model, inputs, None, with_positions=True)
    assert torch.equal(tokens, expected.tokens)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    assert run.report.decode_steps == STEPS - 1


def test_a_compiled_hand_written_step(attached):
    torch._dynamo.reset()
    model, method, inputs = make(batch=2, text_lengths=[9, 9])
    attached(model, method)
    expected = generate(model, inputs)
    cache = StaticCache(config=model.config, max_cache_len=40)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = model(**inputs, past_key_values=cache)
        for step in range(1, STEPS):
            positions = torch.full((2, 1), inputs["input_ids"].shape[1] + step - 1)
            ids = expected.tokens[:, step - 1 : step]
            out = compiled(input_ids=ids, position_ids=positions, past_key_values=cache)
            torch.testing.assert_close(
                out.logits[:, -1], expected.logits[:, step], rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_second_turn_goes_on_from_the_pruned_cache(name, whole, static, attached):
    model, method, inputs = make(name, batch=2)
    prompt = inputs["input_ids"].shape[1]
    first = first_turn(model, inputs, method, attached, static)
    question = torch.tensor([[5, 6, 7], [8, 9, 10]])
    ids = torch.cat([first.sequences, question], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - prompt).long()], 1)
    given = {"input_ids": ids, "attention_mask": mask}
    # the last generated token was never fed: it belongs to the new input
    new = ids if whole else ids[:, prompt + STEPS - 1 :]
    second = generate(model, {**given, "input_ids": new}, past_key_values=first.past_key_values)
    model_for_reference = build(name, "eager")
    whole_inputs = {**inputs, **given}
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        more = types.new_zeros(2, ids.shape[1] - prompt)
        whole_inputs["mm_token_type_ids"] = torch.cat([types, more], 1)
    image, valid = image_mask(name, inputs), inputs["attention_mask"]
    choices = method.tokens.kept_after(image), method.tokens.weights_after(image)
    with (
        torch.no_grad(),
        hidden_tokens(model_for_reference, valid, *choices),
        sparse_first_turn(model_for_reference, prompt, prompt + STEPS - 1, method),
    ):
        expected = model_for_reference(**whole_inputs, use_cache=False).logits[:, -1]
    torch.testing.assert_close(second.logits[:, 0], expected, rtol=0, atol=1e-4)


def first_turn(model, inputs, method, attached, static):
    attached(model, method)
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    options = {} if cache is None else {"past_key_values": cache}
    return model.generate(
        **inputs,
        **options,
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=BANNED,
        return_dict_in_generate=True,
    )


def sparse_first_turn(model, prompt, end, method):
    """Neurons are dropped for the first answer's tokens; a later prompt is dense again."""
    stack = overwritten_neurons(model, prompt, method.neurons.masks(model))
    return _Until(model, stack, end)


class _Until:
    """Undo the overwriting from position ``end`` on."""

    def __init__(self, model, inner, end):
        self.model, self.inner, self.end, self.handles = model, inner, end, []

    def __enter__(self):
        downs = [layer.mlp.down_proj for layer in self.model.get_decoder().layers]
        dense = {}
        for i, down in enumerate(downs):

            def save(module, args, i=i):
                dense[i] = args[0]

            self.handles.append(down.register_forward_pre_hook(save))
        self.inner.__enter__()
        for i, down in enumerate(downs):

            def restore(module, args, i=i):
                late = torch.arange(args[0].shape[1]) >= self.end
                return (torch.where(late[:, None], dense[i], args[0]),)

            self.handles.append(down.register_forward_pre_hook(restore))

    def __exit__(self, *error):
        self.inner.__exit__(*error)
        for handle in self.handles:
            handle.remove()


def test_a_second_turn_is_reported_as_one(attached):
    model, method, inputs = make()
    run = attached(model, method)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    kept = run.report.samples[0].kept_tokens
    ids = torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)
    copied = copy.deepcopy(first.past_key_values)
    model.generate(input_ids=ids, past_key_values=copied, **options)
    report = run.report
    assert report.continued and not run.reports[0].continued
    assert report.samples[0].kept_tokens == kept
    assert report.samples[0].prompt_tokens == 3  # two, and the answer's last token
    assert report.samples[0].kv_bytes < report.samples[0].dense_kv_bytes
    model.generate(**make_inputs("llava", model, images=0), **options)
    model.generate(input_ids=ids, past_key_values=first.past_key_values, **options)
    assert run.report.samples[0].kept_tokens == kept, "its own first turn, not the last run"


def test_each_conversation_keeps_its_own_neurons(attached):
    model, method, inputs = make()
    attached(model, method)
    expected = loop(model, inputs, None)[1]
    with torch.no_grad():
        a = model(**inputs, use_cache=True).past_key_values
    method.tokens.seeds = method.neurons.seeds = (2,)
    other = make_inputs("llava", model, seed=7)
    with torch.no_grad():
        model(**other, use_cache=True)
        first = expected[:, 0].clone()
        first[:, BANNED] = -torch.inf
        step = model(input_ids=first.argmax(-1, keepdim=True), past_key_values=a)
    torch.testing.assert_close(step.logits[:, -1], expected[:, 1], rtol=0, atol=1e-4)


def test_refuses_what_cannot_work_before_anything_runs(attached):
    model, method, inputs = make()
    run = attached(model, method)
    with pytest.raises(UnsupportedModelError, match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)
    with pytest.raises(UnsupportedModelError, match="assisted"):
        model.generate(**inputs, max_new_tokens=2, prompt_lookup_num_tokens=2)
    assert run.reports == []
    assert generate(model, inputs).tokens.shape == (1, STEPS)
