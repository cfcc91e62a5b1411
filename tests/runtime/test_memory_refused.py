"""What would save, load, convert or read weights that are not there is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import save_file, save_model
from torch.nn.utils import parameters_to_vector

from corematching.errors import AlreadyInstalledError, InputError
from corematching.runtime import load
from tests.models import build, make_inputs
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


def decoder(model):
    return model.get_decoder()


WHOLE = {
    "save_pretrained": lambda model, to: model.save_pretrained(to),
    "push_to_hub": lambda model, _: model.push_to_hub("nobody/nothing"),
    "state_dict": lambda model, _: model.state_dict(),
    "state_dict of a part": lambda model, _: decoder(model).state_dict(),
    "state_dict of a layer": lambda model, _: middle(model).state_dict(),
    "save_model": lambda model, to: save_model(model, to / "model.safetensors"),
    "torch.save": lambda model, to: torch.save(model.state_dict(), to / "model.pt"),
    "deepcopy": lambda model, _: copy.deepcopy(model.state_dict()),
    "unwrapped": lambda model, _: extract_model_from_parallel(model).state_dict(),
    "wrapped": lambda model, _: torch.nn.Sequential(model).state_dict(),
    "load_state_dict": lambda model, _: model.load_state_dict(build("llava", seed=1).state_dict()),
    "load_state_dict with assign": lambda model, _: model.load_state_dict(
        build("llava", seed=1).state_dict(), assign=True
    ),
    "load_state_dict of a layer": lambda model, _: middle(model).load_state_dict(
        middle(build("llava", seed=1)).state_dict()
    ),
}
CONVERSIONS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to a dtype": lambda model: model.to(torch.bfloat16),
    "to a dtype of a part": lambda model: decoder(model).to(torch.bfloat16),
    "to a dtype of a layer": lambda model: middle(model).to(torch.bfloat16),
    "to a device": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "share_memory": lambda model: model.share_memory(),
}
READERS = {
    "norm": lambda weight: weight.norm(),
    "sum": lambda weight: torch.sum(weight.detach()),
    "foreach": lambda weight: torch._foreach_norm([weight]),
    "a copy": lambda weight: weight.clone(),
    "to": lambda weight: weight.to(torch.float64),
    "data": lambda weight: weight.data,
    "numpy": lambda weight: weight.detach().numpy(),
    "vector": lambda weight: parameters_to_vector([weight]),
    "save_file": lambda weight: save_file({"weight": weight}, "/dev/null"),
    "deepcopy": copy.deepcopy,
    "linear": lambda weight: torch.nn.functional.linear(torch.ones(1, weight.shape[1]), weight),
    "row": lambda weight: weight[0],
}
WRITERS = {
    "zero_": lambda weight: weight.detach().zero_(),
    "copy_": lambda weight: weight.copy_(torch.ones(weight.shape)),
    "add_": lambda weight: weight.add_(1),
    "data": lambda weight: setattr(weight, "data", torch.ones(weight.shape)),
    "normal_": torch.nn.init.normal_,
}


@pytest.mark.parametrize("attempt", WHOLE.values(), ids=WHOLE)
def test_what_needs_all_weights_is_refused_and_writes_nothing(attempt, tmp_path):
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    expected, before = in_memory(model, inputs, chosen), snapshot(model)
    target = tmp_path / "saved"
    target.mkdir()
    with chosen(model, memory=CAP):
        with pytest.raises(AlreadyInstalledError, match=r"memory=16 MiB.*remove the method first"):
            attempt(model, target)
        assert same(answer(model, inputs), expected)
    assert not list(target.iterdir())
    assert unchanged(model, before)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversions_are_refused_before_any_weight_has_changed(convert):
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    expected, before = in_memory(model, inputs, chosen), snapshot(model)
    with chosen(model, memory=CAP):
        with pytest.raises(AlreadyInstalledError, match=r"a conversion .*remove the method first"):
            convert(model)
        assert same(answer(model, inputs), expected)
    assert unchanged(model, before)


@pytest.mark.parametrize("use", [*READERS.values(), *WRITERS.values()], ids=[*READERS, *WRITERS])
def test_numbers_that_are_not_there_are_neither_read_nor_written(use):
    model = build("llava")
    before, held = snapshot(model), middle(model).weight
    with method()(model, memory=CAP):
        assert held is middle(model).weight
        with (
            torch.no_grad(),
            pytest.raises(InputError, match=r"outside of memory.*remove the"),
        ):
            use(held)
    assert unchanged(model, before)


def test_what_changes_no_number_passes():
    model, chosen = build("llava"), method()
    inputs = make_inputs("llava", model)
    expected, before = in_memory(model, inputs, chosen), snapshot(model)
    size, count = model.get_memory_footprint(), model.num_parameters()
    with chosen(model, memory=CAP):
        for same_as_before in (model.to("cpu"), model.float(), model.cpu(), model.to(model.dtype)):
            assert same_as_before is model
        assert (model.get_memory_footprint(), model.num_parameters()) == (size, count)
        assert model.dtype == torch.float32 and model.device == torch.device("cpu")
        assert "AbsentWeight(shape=(" in repr(middle(model).weight)
        assert "up_proj" in repr(model)
        assert model.train().training and not model.eval().training
        model.zero_grad()
        assert same(answer(model, inputs), expected)
    assert unchanged(model, before)


def test_requires_grad_is_as_it_was_set_meanwhile():
    model = build("llava")
    with method()(model, memory=CAP):
        model.requires_grad_(False)
        answer(model, make_inputs("llava", model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradients_through_streamed_layers_are_refused():
    model = build("llava")
    inputs = make_inputs("llava", model)
    with method(token_score=None)(model, memory=CAP):
        logits = model(**inputs).logits
        with pytest.raises(InputError, match=r"gradients need the FFN weights.*without memory"):
            logits.logsumexp(-1).sum().backward()
    model.requires_grad_(False)
    with method(token_score=None)(model, memory=CAP):
        assert not model(**inputs).logits.requires_grad


def test_layers_that_share_a_weight_get_it_back():
    model, chosen = build("llava"), method()
    layers = model.get_decoder().layers
    layers[3].mlp.up_proj.weight = layers[2].mlp.up_proj.weight
    inputs = make_inputs("llava", model)
    expected, before = in_memory(model, inputs, chosen), snapshot(model)
    with chosen(model, memory=CAP):
        assert same(answer(model, inputs), expected)
    assert unchanged(model, before)
    assert layers[3].mlp.up_proj.weight is layers[2].mlp.up_proj.weight


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("attempt", WHOLE.values(), ids=WHOLE)
def test_a_model_loaded_without_its_ffns_is_not_saved(attempt, installed, stored, tmp_path):
    model, target = load(stored("llava"), CAP, device="cpu"), tmp_path / "saved"
    target.mkdir()
    before = snapshot(model)
    run = method().install(model) if installed else None
    with pytest.raises(InputError, match=r"without its FFNs .*Llava.*\.from_pretrained"):
        attempt(model, target)
    if run is not None:
        method().remove(model)
    assert not list(target.iterdir())
    assert unchanged(model, before)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_model_loaded_without_its_ffns_stays_as_it_was_loaded(convert, stored):
    model = load(stored("llava"), CAP, device="cpu")
    before = snapshot(model)
    assert model.to("cpu") is model and model.float() is model
    with pytest.raises(InputError, match=r"a conversion .*without its FFNs.*tell load"):
        convert(model)
    assert unchanged(model, before)
