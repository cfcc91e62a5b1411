"""Ctrl-C at any moment, and exceptions of users' own code: leaving the block always restores."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

import corematching
from corematching.methods import CoreMatching, Sparsifier
from corematching.runtime import is_attached
from tests.models import build, make_inputs
from tests.runtime.families import generate
from tests.runtime.test_families import fingerprint

OURS = str(Path(corematching.__file__).parent)
TRIES = 60


class Interrupter:
    """Raises KeyboardInterrupt in front of the n-th line of this library that runs."""

    def __init__(self, at=None, where=OURS):
        self.at, self.where, self.lines = at, where, 0

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(self.where) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def use(model, inputs, method, engine):
    with method(model, engine=engine):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        with torch.no_grad():
            model(**inputs)


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("method", [CoreMatching(), CoreMatching.paper(), Sparsifier()])
def test_an_interrupt_at_any_moment_leaves_nothing(method, engine):
    model = build("llava")
    inputs = make_inputs("llava", model)
    use(model, inputs, method, engine)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    dense, before = generate(model, inputs).logits, fingerprint(model)
    with Interrupter() as count:
        use(model, inputs, method, engine)
    rng = random.Random(7)
    ends = [*range(1, 12), *range(count.lines - 12, count.lines + 1)]
    for at in [*ends, *(rng.randrange(1, count.lines) for _ in range(TRIES))]:
        with Interrupter(at), pytest.raises(KeyboardInterrupt):
            use(model, inputs, method, engine)
        assert not is_attached(model), at
        assert fingerprint(model) == before, at
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]) and tensor.stride() == strides[name]
    assert torch.equal(generate(model, inputs).logits, dense)


@pytest.mark.parametrize("where", ["hook", "streamer"])
def test_an_exception_of_the_users_own_leaves_nothing(where):
    model = build("llava")
    inputs = make_inputs("llava", model)
    dense, before = generate(model, inputs).logits, fingerprint(model)
    calls = []

    def explode(*_):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("theirs")

    class Streamer:
        put, end = explode, explode

    with pytest.raises(ValueError, match="theirs"), CoreMatching()(model):
        if where == "hook":
            layer = model.get_decoder().layers[3]
            handle = layer.register_forward_pre_hook(explode)
            try:
                model.generate(**inputs, max_new_tokens=5, do_sample=False)
            finally:
                handle.remove()
        else:
            model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert fingerprint(model) == before
    assert torch.equal(generate(model, inputs).logits, dense)
