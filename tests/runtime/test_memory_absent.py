"""Weights that are outside of memory: what may be done with them, and what brings them back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from corematching.errors import (
    InputError,
)
from corematching.model.absent import AbsentWeight
from corematching.offload import source as offload_source
from corematching.offload.source import FileSource, Scratch
from corematching.offload.stream import LayerStream
from corematching.offload.weight import Outside
from corematching.runtime import detach
from tests.models import HIDDEN, WIDTH, build, make_inputs
from tests.runtime.capped import (
    CAP,
    answer,
    in_memory,
    method,
    middle,
    same,
    snapshot,
    unchanged,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def test_weights_are_not_in_memory_behind_the_prompt():
    model = build("llava")
    held = weakref.ref(middle(model).weight.data.untyped_storage())
    with method()(model, memory=CAP):
        answer(model, make_inputs("llava", model))
        gc.collect()
        weight = middle(model).weight
        assert held() is None
        assert weight.shape == (WIDTH, HIDDEN) and isinstance(weight, AbsentWeight)
        with torch._C.DisableTorchFunctionSubclass():
            assert weight.untyped_storage().nbytes() == weight.element_size()
        assert not model.get_decoder().layers[0].mlp.up_proj.weight.isnan().any()
    assert not middle(model).weight.isnan().any()


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
        assert isinstance(middle(model).weight, AbsentWeight)
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
            away = [i for i in range(4) if isinstance(parameters[i], AbsentWeight)]
            assert away == [i for i in range(4) if i != index]
        assert isinstance(parameters[index], AbsentWeight)
    stream.close()
    scratch.close()
