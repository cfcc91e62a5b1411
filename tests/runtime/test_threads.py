"""Several threads on one model: each run is right or refused, and the model comes out whole."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from corematching.errors import AlreadyInstalledError
from corematching.methods import CoreMatching
from corematching.runtime import attach, detach, is_attached
from tests.models import build, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod, generate
from tests.runtime.test_families import fingerprint

THREADS, ROUNDS, STEPS = 4, 6, 3


def random_method():
    return TestMethod(RandomTokens((1,), (1,)), RandomNeurons((1,), True))


def in_threads(work):
    """Run ``work(number)`` in several threads that start together; their unexpected errors."""
    barrier, errors = threading.Barrier(THREADS), []

    def run(number):
        try:
            barrier.wait(timeout=60)
            for _ in range(ROUNDS):
                work(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=400)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def hand_written(model, inputs, call):
    """A prompt and some steps; a refused forward is tried again."""
    found = []

    def forward(**kwargs):
        end = time.monotonic() + 300
        while time.monotonic() < end:
            try:
                with torch.no_grad():
                    return call(model, **kwargs)
            except AlreadyInstalledError as error:
                assert "in use by" in str(error)
                time.sleep(0.001)
        raise AssertionError("never got its turn")

    out = forward(**inputs, use_cache=True)
    for _ in range(STEPS):
        found.append(out.logits[:, -1])
        token = out.logits[:, -1:].argmax(-1)
        out = forward(input_ids=token, past_key_values=out.past_key_values)
    return torch.cat([*found, out.logits[:, -1]])


CALLS = {
    "model": lambda model, **kwargs: model(**kwargs),
    "model.forward": lambda model, **kwargs: model.forward(**kwargs),
}


@pytest.fixture(autouse=True)
def _one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    model = build("llava")
    yield model
    detach(model)


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("call", CALLS)
def test_hand_written_loops_in_threads(model, call, engine):
    prompts = [make_inputs("llava", model, seed=n) for n in range(THREADS)]
    dense = [generate(model, p).logits for p in prompts]
    before = fingerprint(model)
    attach(model, random_method(), engine=engine)
    expected = [hand_written(model, p, CALLS[call]) for p in prompts]
    marks = fingerprint(model)

    def work(number):
        found = hand_written(model, prompts[number], CALLS[call])
        torch.testing.assert_close(found, expected[number], rtol=0, atol=0)

    assert in_threads(work) == []
    assert fingerprint(model) == marks
    detach(model)
    assert fingerprint(model) == before
    assert all(
        torch.equal(generate(model, p).logits, d) for p, d in zip(prompts, dense, strict=True)
    )


def test_generate_in_threads_is_right_or_refused(model):
    inputs = make_inputs("llava", model)
    attach(model, random_method())
    expected, refused = generate(model, inputs).logits, []

    def work(_):
        try:
            torch.testing.assert_close(generate(model, inputs).logits, expected, rtol=0, atol=0)
        except AlreadyInstalledError as error:
            refused.append(str(error))

    assert in_threads(work) == []
    assert all("in use by" in reason for reason in refused)
    torch.testing.assert_close(generate(model, inputs).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [random_method, CoreMatching])
def test_with_blocks_in_threads(model, make):
    inputs = make_inputs("llava", model)
    dense = generate(model, inputs).logits
    before = fingerprint(model)
    method = make()
    run = attach(model, method)
    expected = generate(model, inputs).logits
    run.remove()

    def work(_):
        try:
            run = attach(model, method)
        except AlreadyInstalledError:
            return
        try:
            torch.testing.assert_close(generate(model, inputs).logits, expected, rtol=0, atol=0)
        finally:
            run.remove()

    assert in_threads(work) == []
    assert not is_attached(model) and fingerprint(model) == before
    assert torch.equal(generate(model, inputs).logits, dense)


def test_removal_waits_for_another_threads_run(model):
    inputs = make_inputs("llava", model)
    dense = generate(model, inputs).logits
    before = fingerprint(model)
    run = attach(model, random_method())
    expected, entered, found = generate(model, inputs).logits, threading.Event(), []

    def show(module, args):
        entered.set()

    handle = model.get_decoder().layers[0].mlp.register_forward_pre_hook(show)
    thread = threading.Thread(target=lambda: found.append(generate(model, inputs).logits))
    thread.start()
    assert entered.wait(timeout=60)
    run.remove()
    thread.join(timeout=60)
    handle.remove()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    assert fingerprint(model) == before
    assert torch.equal(generate(model, inputs).logits, dense)


def test_a_run_that_is_off_already_takes_nothing_else_off(model):
    first = attach(model, random_method())
    first.remove()
    attach(model, random_method())
    first.remove()
    assert is_attached(model)


@pytest.mark.parametrize("what", ["prompt", "step"])
def test_a_streamer_cannot_run_the_model_for_another_prompt(model, what):
    inputs = make_inputs("llava", model)
    attach(model, random_method())
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    other = {
        "prompt": inputs,
        "step": {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache},
    }
    refused = []

    class Nosy:
        def put(self, _):
            try:
                model(**other[what])
            except AlreadyInstalledError as error:
                refused.append(str(error))

        def end(self):
            pass

    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=Nosy())
    assert torch.equal(out, expected)
    assert len(refused) >= 3 and "load the model twice" in refused[-1]


def test_a_hook_cannot_run_the_model_inside_its_own_forward(model):
    inputs = make_inputs("llava", model)
    attach(model, random_method())
    with torch.no_grad():
        expected, refused = model(**inputs).logits, []

    def nosy(module, args):
        try:
            model(**inputs)
        except AlreadyInstalledError as error:
            refused.append(str(error))

    handle = model.get_decoder().layers[2].register_forward_pre_hook(nosy)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    handle.remove()
    assert len(refused) == 1
