"""Models under a cap on memory: the same results, with their FFNs outside."""

from __future__ import annotations

import gc
import json
import mmap
import weakref

import pytest
import torch
from transformers import AutoModelForImageTextToText

from corematching.errors import (
    AlreadyInstalledError,
    ConfigError,
    InputError,
    MemoryCapError,
    UnsupportedModelError,
)
from corematching.methods import CoreMatching
from corematching.runtime import attach, detach, load, offload_source
from corematching.runtime.offload_source import FileSource, Scratch, open_checkpoint
from corematching.runtime.offload_stream import LayerStream, Outside
from corematching.sizes import format_size, parse_size
from tests.models import HIDDEN, LAYERS, WIDTH, build, make_inputs

CAP = "16MiB"
DENSE_FIRST = 1
STREAMED = LAYERS - DENSE_FIRST
LAYER_BYTES = 3 * HIDDEN * WIDTH * 4
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "llama")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Scratch files go to the test's own directory."""
    monkeypatch.setenv("CORE_MATCHING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Directories of saved tiny models, by family."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(made[name])
        return made[name]

    return get


def method(name="llava", **changes):
    tokens = {"token_score": None} if name == "llama" else {"keep": 0.5, "layer": 1}
    plain = {"beta": 0.5, "dense_first": DENSE_FIRST, "dense_last": 0, "firing": None}
    return CoreMatching(**{**tokens, **plain, **changes})


def answer(model, inputs, steps=5, **options):
    """Sequences and the logits of every step."""
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return [out.sequences, *out.logits]


def in_memory(model, inputs, chosen, **options):
    """The same run with all weights in memory, on the same decode path."""
    with chosen(model, "torch"):
        return answer(model, inputs, **options)


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


def middle(model):
    return model.get_decoder().layers[2].mlp.up_proj


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_model_answers_as_in_memory(name, batch):
    model, chosen = build(name), method(name)
    inputs = make_inputs(name, model, batch=batch)
    expected, before = in_memory(model, inputs, chosen), snapshot(model)
    with chosen(model, memory=CAP):
        assert same(answer(model, inputs), expected)
    assert unchanged(model, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_loaded_without_its_ffns_answers_as_in_memory(name, stored):
    whole, chosen = build(name), method(name)
    inputs = make_inputs(name, whole)
    model = load(stored(name), CAP, device="cpu")
    with chosen(model):
        assert same(answer(model, inputs), in_memory(whole, inputs, chosen))


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


def test_bfloat16_from_float32_files(stored):
    chosen, path = method(), stored("llava")
    whole = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).eval()
    inputs = make_inputs("llava", whole)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    model = load(path, CAP, dtype=torch.bfloat16, device="cpu")
    with chosen(model):
        assert same(answer(model, inputs), in_memory(whole, inputs, chosen))


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


def test_weights_are_not_in_memory_behind_the_prompt():
    model = build("llava")
    held = weakref.ref(middle(model).weight.data.untyped_storage())
    with method()(model, memory=CAP):
        answer(model, make_inputs("llava", model))
        gc.collect()
        weight = middle(model).weight
        assert held() is None
        assert weight.shape == (WIDTH, HIDDEN) and weight.isnan().all()
        assert weight.untyped_storage().nbytes() == weight.element_size()
        assert not model.get_decoder().layers[0].mlp.up_proj.weight.isnan().any()
    assert not middle(model).weight.isnan().any()


def test_a_loaded_model_gets_its_meta_weights_back(stored):
    model = load(stored("llava"), CAP, device="cpu")
    before = dict(model.named_parameters())
    assert middle(model).weight.is_meta
    with method()(model):
        answer(model, make_inputs("llava", model))
        assert not middle(model).weight.is_meta
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


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


def test_an_exception_in_the_prompt_leaves_it_usable():
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    expected, before = in_memory(model, inputs, chosen), snapshot(model)

    def fail(*_):
        raise RuntimeError("halfway")

    with chosen(model, memory=CAP):
        handle = middle(model).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="halfway"):
            answer(model, inputs)
        handle.remove()
        assert middle(model).weight.isnan().all()
        assert same(answer(model, inputs), expected)
    assert unchanged(model, before)


def test_an_exception_while_moving_puts_all_back(monkeypatch):
    model = build("llava")
    before, write, calls = snapshot(model), Scratch.write, []

    def fail_later(self, weights):
        calls.append(weights)
        if len(calls) > 1:
            raise OSError("disk gone")
        return write(self, weights)

    monkeypatch.setattr(Scratch, "write", fail_later)
    with pytest.raises(OSError, match="disk gone"):
        method().install(model, memory=CAP)
    assert unchanged(model, before)
    detach(model)


def test_an_unreadable_file_is_an_error_and_no_wrong_answer(monkeypatch):
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    with chosen(model, memory=CAP):
        with monkeypatch.context() as patch:
            patch.setattr(FileSource, "copy_to", lambda *_: (_ for _ in ()).throw(OSError("gone")))
            with pytest.raises(OSError, match="gone"):
                answer(model, inputs)
        answer(model, inputs)


def test_a_full_disk_is_refused(monkeypatch):
    model = build("llava")
    before = snapshot(model)
    monkeypatch.setattr(offload_source, "SPARE_BYTES", 1 << 60)
    with pytest.raises(InputError, match=r"left, but the weights .* take .* KiB"):
        method().install(model, memory=CAP)
    assert unchanged(model, before)


def test_scratch_files_leave_nothing_behind(tmp_path):
    model = build("llava")
    with method()(model, memory=CAP):
        assert list((tmp_path / "cache").iterdir()) == []
    assert list((tmp_path / "cache").iterdir()) == []


def test_native_steps_are_refused_under_a_cap():
    with pytest.raises(ConfigError, match="leave engine at 'auto'"):
        attach(build("llava"), method(), "native", CAP)


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


def test_a_layer_is_there_while_its_block_lasts():
    parameters = [torch.nn.Parameter(torch.full((3, 5), float(i))) for i in range(4)]
    scratch = Scratch(1 << 12)
    sources = scratch.write(parameters)
    outside = {i: [Outside(p, s)] for i, (p, s) in enumerate(zip(parameters, sources, strict=True))}
    for weight in outside.values():
        weight[0].put_away()
    stream = LayerStream(outside, torch.device("cpu"))
    for index in (0, 1, 2, 3, 1, 0, 3, 3, 2):
        with stream.present(index), stream.present(index):
            assert (parameters[index] == index).all()
            away = [i for i in range(4) if parameters[i].isnan().all()]
            assert away == [i for i in range(4) if i != index]
        assert parameters[index].isnan().all()
    stream.close()
    scratch.close()


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
