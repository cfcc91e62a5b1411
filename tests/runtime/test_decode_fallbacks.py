"""Where native decode steps cannot run, PyTorch decodes; both leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from corematching.backends.cpu.native import find_kernels
from corematching.errors import ConfigError, UnsupportedModelError
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.engines import FFNS, STEP, generate_dict, make_method, on_both
from tests.runtime.families import STEPS, assert_same, generate

pytestmark = pytest.mark.skipif(find_kernels() is None, reason="no compiled kernels")


@pytest.mark.parametrize("way", ["hook", "hidden_states", "attentions", "batch", "grad", "static"])
def test_what_does_not_fit_runs_in_pytorch(way):
    model = build("llama", "eager")
    batch = 17 if way == "batch" else 2
    inputs = make_inputs("llama", model, batch=batch)
    options = {}
    if way in ("hidden_states", "attentions"):
        options[f"output_{way}"] = True
    if way == "static":
        options["cache_implementation"] = "static"
    run = attach(model, make_method(batch, neurons=False))
    seen = []
    try:
        if way == "hook":
            handle = model.model.layers[2].register_forward_hook(lambda *a: seen.append(1))
        if way == "grad":
            cache = DynamicCache()
            model(**inputs, past_key_values=cache)
            out = model(input_ids=torch.tensor([[4], [5]]), past_key_values=cache)
            out.logits.sum().backward()
            assert model.model.layers[0].mlp.up_proj.weight.grad is not None
            model.zero_grad()
        else:
            generate_dict(model, inputs, **options)
        assert run.report.kernel == "torch"
        if way == "hook":
            assert len(seen) == STEPS
            handle.remove()
        inputs = make_inputs("llama", model, batch=2)
        generate_dict(model, inputs)
        assert run.report.kernel.startswith(STEP)
    finally:
        detach(model)


def test_weights_that_change_are_seen():
    model = build("llama")
    inputs = make_inputs("llama", model)
    run = attach(model, make_method())
    try:
        first = generate(model, inputs)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.mul_(-1.0)
                layer.self_attn.o_proj.weight.data = -layer.self_attn.o_proj.weight.data
        ours = generate(model, inputs)
        assert run.report.kernel.startswith(STEP)
    finally:
        detach(model)
    attach(model, make_method(), "torch")
    assert_same(ours, generate(model, inputs))
    detach(model)
    assert not torch.allclose(first.logits, ours.logits, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "llava", "gemma2"])
def test_remove_leaves_nothing_behind(name):
    model = build(name)
    inputs = make_inputs(name, model)
    weights = {n: (id(p), p.shape, p.stride(), p.clone()) for n, p in model.named_parameters()}
    before = generate(model, inputs)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    attach(model, make_method())
    down = model.get_decoder().layers[1].mlp.down_proj.weight
    assert down.t().is_contiguous()
    generate(model, inputs)
    detach(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    for n, p in model.named_parameters():
        identity, shape, stride, value = weights[n]
        assert (id(p), p.shape, p.stride()) == (identity, shape, stride)
        assert torch.equal(p, value)
    assert torch.equal(generate(model, inputs).logits, before.logits)


def test_without_kernels_pytorch_decodes(monkeypatch):
    monkeypatch.setenv("CORE_MATCHING_NATIVE", "0")
    model = build("llama")
    inputs = make_inputs("llama", model)
    run = attach(model, make_method())
    try:
        ours = generate(model, inputs)
        assert run.report.kernel == "torch"
        assert model.model.layers[1].mlp.down_proj.weight.is_contiguous()
    finally:
        detach(model)
    attach(model, make_method(), "torch")
    assert_same(ours, generate(model, inputs), 0.0)
    detach(model)
    with pytest.raises(UnsupportedModelError, match=r"install a C.*or use engine='auto'"):
        attach(model, make_method(), "native")


def test_an_unknown_engine_is_named():
    with pytest.raises(ConfigError, match="choose auto, torch, native"):
        attach(build("llama"), make_method(), "fast")


def test_an_odd_decoder_is_found_out_by_the_probe(caplog):
    """It looks like Llama's, and computes something else."""
    model = build("llama")
    norm = type(model.model.norm)

    class Shifted(norm):
        def forward(self, x):
            return super().forward(x) + 0.5

    model.model.layers[2].input_layernorm.__class__ = Shifted
    inputs = make_inputs("llama", model)
    with caplog.at_level("INFO"):
        theirs, ours, report = on_both(model, make_method(), lambda m: generate(m, inputs))
    assert_same(ours, theirs)
    assert report.kernel.startswith(FFNS)
    assert "a probe gave other numbers" in caplog.text


@pytest.mark.parametrize("shift", [0.0, 0.03])
def test_the_probe_tells_a_rounding_from_another_form(shift, caplog):
    """In bf16 the whole step may differ by 8 %, but the first layers only by a rounding."""
    model = build("llama").to(torch.bfloat16)
    norm = type(model.model.norm)

    class Scaled(norm):
        def forward(self, x):
            return super().forward(x) * (1 + shift)

    model.model.layers[1].input_layernorm.__class__ = Scaled
    with caplog.at_level("INFO"):
        attach(model, make_method())
        detach(model)
    assert ("a probe gave other numbers" in caplog.text) == bool(shift)
