"""Installing, removing, and using a model that has a method on it."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from corematching.errors import AlreadyInstalledError, InputError
from corematching.runtime import attach, detach, is_attached
from tests.models import build, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod, generate
from tests.runtime.test_families import fingerprint


def random_method():
    return TestMethod(RandomTokens((1,), (1,)), RandomNeurons((1,), True))


@pytest.fixture
def model():
    model = build("llava")
    yield model
    detach(model)


def test_twice_on_one_model_is_refused(model):
    attach(model, random_method())
    with pytest.raises(AlreadyInstalledError, match="already installed"):
        attach(model, random_method())
    detach(model)
    assert not is_attached(model)
    attach(model, random_method())


def test_detaching_what_is_not_attached_does_nothing(model):
    before = fingerprint(model)
    detach(model)
    assert fingerprint(model) == before


def test_a_failed_attach_leaves_nothing(model, monkeypatch):
    before = fingerprint(model)

    def broken(self, patches):
        raise RuntimeError("broken")

    monkeypatch.setattr("corematching.runtime.generation.GenerationPatches.install", broken)
    with pytest.raises(RuntimeError, match="broken"):
        attach(model, random_method())
    assert fingerprint(model) == before and not is_attached(model)


def test_an_exception_in_the_middle_leaves_nothing(model):
    inputs = make_inputs("llava", model)
    dense = generate(model, inputs)
    before = fingerprint(model)
    attach(model, random_method())

    def explode(module, args):
        raise KeyboardInterrupt

    handle = model.get_decoder().layers[3].mlp.register_forward_pre_hook(explode)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    detach(model)
    assert fingerprint(model) == before
    assert torch.equal(generate(model, inputs).logits, dense.logits)


def test_an_exception_does_not_spoil_the_next_run(model):
    inputs = make_inputs("llava", model)
    attach(model, random_method())
    expected = generate(model, inputs)

    def explode(module, args):
        raise KeyboardInterrupt

    handle = model.get_decoder().layers[3].mlp.register_forward_pre_hook(explode)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    assert torch.equal(generate(model, inputs).logits, expected.logits)


def test_a_patch_of_the_users_is_put_back(model):
    def own(*args, **kwargs):
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    attach(model, random_method())
    assert model.generate is not own
    detach(model)
    assert model.generate is own


def test_generate_keeps_its_signature(model):
    before = inspect.signature(model.generate)
    attach(model, random_method())
    assert inspect.signature(model.generate) == before


class Interrupter(BaseStreamer):
    """Does something in the middle of a generate()."""

    def __init__(self, action):
        self.action, self.error = action, None

    def put(self, value):
        try:
            self.action()
        except AlreadyInstalledError as error:
            self.error = error

    def end(self):
        pass


@pytest.mark.parametrize("what", ["generate", "detach"])
def test_a_model_in_use_is_refused(model, what):
    inputs = make_inputs("llava", model)
    attach(model, random_method())
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    actions = {
        "generate": lambda: model.generate(**inputs, max_new_tokens=2),
        "detach": lambda: detach(model),
    }
    streamer = Interrupter(actions[what])
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, streamer=streamer)
    assert "in use" in str(streamer.error)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("what", ["generate", "forward"])
def test_another_thread_is_refused_while_the_model_is_in_use(model, what):
    inputs = make_inputs("llava", model)
    attach(model, random_method())
    errors = []

    def other():
        try:
            model.generate(**inputs, max_new_tokens=2) if what == "generate" else model(**inputs)
        except AlreadyInstalledError as error:
            errors.append(str(error))

    def action():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    model.generate(**inputs, max_new_tokens=2, do_sample=False, streamer=Interrupter(action))
    assert errors and all("in use by generate()" in error for error in errors)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_another_thread_is_refused_in_the_middle_of_a_forward(model):
    inputs = make_inputs("llava", model)
    run = attach(model, random_method())
    with torch.no_grad():
        expected = model(**inputs).logits
    errors = []

    def other():
        try:
            model(**inputs)
        except AlreadyInstalledError as error:
            errors.append(str(error))

    def action(module, args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handle = model.get_decoder().layers[0].mlp.register_forward_pre_hook(action)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    handle.remove()
    assert len(errors) == 1 and "another thread" in errors[0] and len(run.reports) == 2


def test_a_report_needs_a_run(model):
    run = attach(model, random_method())
    with pytest.raises(InputError, match="nothing has run"):
        _ = run.report
    assert run.reports == []


def test_reports_are_bounded(model):
    inputs = make_inputs("llava", model)
    run = attach(model, random_method())
    with torch.no_grad():
        for _ in range(20):
            model(**inputs)
    assert len(run.reports) == 16


def test_a_forgotten_model_can_go():
    model = build("llava")
    attach(model, random_method())
    generate(model, make_inputs("llava", model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_other_models_of_the_class_are_left_alone(model):
    other = build("llava", seed=1)
    before = fingerprint(other)
    attach(model, random_method())
    assert {k: v for k, v in fingerprint(other).items() if isinstance(k, tuple)} == {
        k: v for k, v in before.items() if isinstance(k, tuple)
    }
