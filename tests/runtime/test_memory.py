"""Models under a cap on memory: the same results, with their FFNs outside."""

from __future__ import annotations

import json
import mmap

import pytest
import torch
from transformers import CompileConfig

from corematching.errors import (
    ConfigError,
    MemoryCapError,
)
from corematching.methods import CoreMatching
from corematching.runtime import attach
from corematching.sizes import format_size, parse_size
from tests.models import HIDDEN, build, make_inputs
from tests.runtime.capped import (
    CAP,
    FAMILIES,
    LAYER_BYTES,
    STREAMED,
    answer,
    in_memory,
    method,
    same,
    snapshot,
    unchanged,
)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_model_answers_as_in_memory(name, batch):
    model, chosen = build(name), method(name)
    inputs = make_inputs(name, model, batch=batch)
    expected, before = in_memory(model, inputs, chosen), snapshot(model)
    with chosen(model, memory=CAP):
        assert same(answer(model, inputs), expected)
    assert unchanged(model, before)


@pytest.mark.parametrize("over", ["kept", "question"])
@pytest.mark.parametrize("score", ["griffin", "output-weighted"])
@pytest.mark.parametrize("firing", [None, 0.5])
def test_every_choice_sees_its_weights(over, score, firing):
    model = build("llava")
    chosen = method(over=over, neuron_score=score, layer=2, firing=firing)
    inputs = make_inputs("llava", model)
    expected = in_memory(model, inputs, chosen)
    with chosen(model, memory=CAP):
        assert same(answer(model, inputs), expected)


def test_beams_answer_as_in_memory():
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    expected = in_memory(model, inputs, chosen, num_beams=2)
    with chosen(model, memory=CAP):
        assert same(answer(model, inputs, num_beams=2), expected)


def test_a_second_prompt_streams_and_chooses_again():
    model, chosen = build("llava"), method()
    first, second = (make_inputs("llava", model, seed=seed) for seed in (1, 2))
    expected = [in_memory(model, inputs, chosen) for inputs in (first, second)]
    with chosen(model, memory=CAP) as run:
        assert same(answer(model, first), expected[0])
        assert same(answer(model, second), expected[1])
        assert run.report.memory.streamed_bytes >= (STREAMED - 1) * LAYER_BYTES
        assert same(answer(model, first), expected[0])


def test_a_second_turn_keeps_its_choices():
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)

    def two_turns(**where):
        with chosen(model, **where) as run, torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
            )
            longer = torch.cat([out.sequences, torch.tensor([[7, 8, 9]])], dim=1)
            again = model.generate(
                input_ids=longer, past_key_values=out.past_key_values, max_new_tokens=4,
                do_sample=False, attention_mask=torch.ones_like(longer),
            )  # fmt: skip
            return again, run.report

    expected, _ = two_turns(engine="torch")
    got, report = two_turns(memory=CAP)
    assert torch.equal(got, expected)
    assert report.continued and report.memory.streamed_bytes >= (STREAMED - 1) * LAYER_BYTES


def test_decoding_streams_nothing():
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    with chosen(model, memory=CAP) as run:
        answer(model, inputs, steps=2)
        few = run.report.memory.streamed_bytes
        answer(model, inputs, steps=2)
        again = run.report.memory.streamed_bytes
        answer(model, inputs, steps=12)
        assert run.report.memory.streamed_bytes == again <= few == STREAMED * LAYER_BYTES


def test_report_adds_up():
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    whole = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    with chosen(model, memory=CAP) as run:
        answer(model, inputs)
        memory = run.report.memory
        json.loads(run.report.to_json())
    assert memory.cap_bytes == 16 << 20
    assert memory.resident_bytes == whole - STREAMED * LAYER_BYTES
    assert memory.slot_bytes == 2 * LAYER_BYTES
    bias = STREAMED * HIDDEN * 4
    assert memory.chosen_bytes == STREAMED * LAYER_BYTES // 2 + bias
    held = memory.resident_bytes + memory.slot_bytes
    assert held < memory.peak_bytes <= memory.cap_bytes
    assert held + memory.chosen_bytes - bias < memory.planned_bytes < memory.cap_bytes
    assert memory.streamed_bytes == STREAMED * LAYER_BYTES
    after = run.report.memory
    assert after.chosen_bytes == memory.chosen_bytes
    assert after.streamed_bytes == memory.streamed_bytes


def test_no_cap_reports_no_memory():
    model = build("llama")
    with method("llama")(model, "torch") as run:
        answer(model, make_inputs("llama", model))
        assert run.report.memory is None


def fresh_pages(megabytes):
    # Not from the allocator: it may hand out pages again that it never gave back.
    pages = mmap.mmap(-1, megabytes << 20)
    pages.write(b"1" * (megabytes << 20))
    return pages


def test_the_peak_counts_what_the_process_takes():
    model = build("llama")
    with method("llama")(model, memory="2GiB") as run:
        ballast = []
        handle = model.lm_head.register_forward_hook(lambda *_: ballast.append(fresh_pages(256)))
        answer(model, make_inputs("llama", model), steps=1)
        handle.remove()
        assert run.report.memory.peak_bytes > 128 << 20


def test_too_small_a_cap_is_refused_with_numbers():
    model = build("llava")
    before = snapshot(model)
    with pytest.raises(MemoryCapError, match=r"do not fit under memory=600 KiB \(.*KiB") as error:
        method().install(model, memory="600KiB")
    for part in ("weights that stay", "on their way", "chosen neurons", "at least", "at most"):
        assert part in str(error.value)
    assert unchanged(model, before)
    with method()(model, "torch"):
        answer(model, make_inputs("llava", model))


def test_a_prompt_that_does_not_fit_is_refused():
    model, chosen = build("llava"), method()
    one, many = (make_inputs("llava", model, batch=n) for n in (1, 8))
    with chosen(model, memory="1MiB"):
        expected = answer(model, one)
        with pytest.raises(MemoryCapError, match=r"chosen neurons of 8 sample.*KV cache"):
            answer(model, many)
        assert same(answer(model, one), expected)


def test_native_steps_are_refused_under_a_cap():
    with pytest.raises(ConfigError, match="leave engine at 'auto'"):
        attach(build("llava"), method(), "native", CAP)


@pytest.mark.parametrize("text", ["12GiBx", "GiB", "12", "-1GiB", "0GiB", "", "1.5", 0, -5, True])
def test_bad_sizes_are_one_clear_error(text):
    with pytest.raises(ConfigError, match="is no size: give a number with its unit"):
        CoreMatching(memory=text)


def test_sizes():
    sizes = ("12GiB", "1.5 MiB", "800MB", "3kb", 17)
    read = [parse_size("memory", size) for size in sizes]
    assert read == [12 << 30, 3 << 19, 800_000_000, 3000, 17]
    assert [format_size(n) for n in (17, 1536, 12 << 30)] == ["17 B", "1.5 KiB", "12 GiB"]


def test_memory_is_no_parameter_of_the_method():
    capped = method(memory=CAP)
    assert capped == method() and capped.to_dict() == method().to_dict()
    model = build("llava")
    with capped(model) as run:
        answer(model, make_inputs("llava", model))
        assert run.report.memory.cap_bytes == 16 << 20
    assert "memory" not in run.report.method


def test_compiled_steps_answer_as_in_memory():
    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    config._compile_all_devices = True
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    options = {"cache_implementation": "static", "max_cache_len": 48, "compile_config": config}
    expected = in_memory(model, inputs, chosen, **options)
    with chosen(model, memory="1GiB"):
        assert same(answer(model, inputs, **options), expected)
