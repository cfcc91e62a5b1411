"""Ctrl-C at any line of what streams weights: the model is as it was, and answers stay right."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

import corematching.offload
from corematching.runtime import is_attached, load
from tests.models import build, make_inputs
from tests.runtime.capped import CAP, answer, in_memory, method, same, snapshot, unchanged
from tests.runtime.test_interrupts import Interrupter

pytestmark = pytest.mark.usefixtures("own_cache")

OFFLOAD = str(Path(corematching.offload.__file__).parent)
NAME = "llama"
TRIES = 100


class Lines(Interrupter):
    """Notes which lines of the offload's files run."""

    def __init__(self):
        super().__init__(where=OFFLOAD)
        self.seen = []

    def _line(self, frame, event, arg):
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
        return super()._line(frame, event, arg)

    def points(self):
        """Some of the moments at which each line runs for the first and for the last time."""
        first, last = {}, {}
        for at, place in enumerate(self.seen, 1):
            first.setdefault(place, at)
            last[place] = at
        return random.Random(7).sample(sorted({*first.values(), *last.values()}), TRIES)


@pytest.fixture(params=["whole", "loaded"])
def model(request, stored, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of no use here
    if request.param == "whole":
        return build(NAME)
    return load(stored(NAME), CAP, device="cpu")


def test_leaving_the_block_restores(model):
    inputs = make_inputs(NAME, model)
    chosen, before = method(NAME), snapshot(model)

    def use():
        with chosen(model, memory=CAP):
            answer(model, inputs, steps=2)

    use()
    with Lines() as lines:
        use()
    for at in lines.points():
        with Interrupter(at, OFFLOAD), pytest.raises(KeyboardInterrupt):
            use()
        assert not is_attached(model), at
        assert torch._C._is_torch_function_enabled(), at
        assert unchanged(model, before), at


def test_answers_after_it_are_right_or_none(model):
    inputs = make_inputs(NAME, model)
    expected, chosen = in_memory(build(NAME), inputs, method(NAME), steps=2), method(NAME)
    with chosen(model, memory=CAP):
        answer(model, inputs, steps=2)
        with Lines() as lines:
            answer(model, inputs, steps=2)
        interrupts = 0
        for at in lines.points():
            try:
                with Interrupter(at, OFFLOAD):
                    answer(model, inputs, steps=2)
            except KeyboardInterrupt:
                interrupts += 1
            assert same(answer(model, inputs, steps=2), expected), at
        assert interrupts > TRIES // 2  # what an earlier one left in its place is not read again
