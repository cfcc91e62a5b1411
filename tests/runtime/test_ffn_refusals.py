"""FFNs and choices that are refused, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from corematching.backends.sparse_ffn import SparseFFN
from corematching.errors import ConfigError, UnsupportedModelError
from corematching.model.ffn import find_ffn
from corematching.protocol import NeuronChoice
from tests.models import build
from tests.runtime.ffns import HIDDEN, KEPT, WIDTH, GatedFFN, PlainFFN, choose, make


@pytest.mark.parametrize("count", [0, -1, WIDTH + 1])
def test_refuses_a_count_out_of_range(count):
    with pytest.raises(ConfigError, match="choose a count from 1 to 24"):
        SparseFFN(GatedFFN(), count)


def test_refuses_a_choice_of_another_size():
    sparse = make()
    with pytest.raises(ConfigError, match="as many neurons as it was asked for"):
        sparse.take(choose(1, count=KEPT + 1))
        sparse.gather()
    with pytest.raises(ConfigError, match="one mean per neuron"):
        sparse.take(NeuronChoice(choose(1).indices, torch.zeros(2, WIDTH)))
        sparse.gather()
    assert not sparse.active


def test_refuses_what_computes_something_else():
    class Scaled(GatedFFN):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(UnsupportedModelError, match="Scaled computes more"):
        SparseFFN(Scaled(), KEPT)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_weights_that_are_nan_are_named(name, bad):
    ffn = GatedFFN()
    with torch.no_grad():
        getattr(ffn, name).weight[3, 5] = bad
    with pytest.raises(UnsupportedModelError, match=rf"GatedFFN's {name}.weight hold NaN or inf"):
        SparseFFN(ffn, KEPT)


def test_weights_that_overflow_are_spoken_of():
    ffn = GatedFFN().half()
    with torch.no_grad():
        ffn.down_proj.weight.fill_(6e4)
        ffn.up_proj.weight.fill_(6e4)
    with pytest.raises(UnsupportedModelError, match=r"GatedFFN overflows in torch\.float16"):
        SparseFFN(ffn, KEPT)


def test_refuses_quantised_and_adapted_and_offloaded_weights():
    class Linear4bit(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    quantised, adapted, offloaded = GatedFFN(), GatedFFN(), GatedFFN().to("meta")
    quantised.up_proj = Linear4bit(HIDDEN, WIDTH)
    adapted.down_proj.base_layer = nn.Linear(WIDTH, HIDDEN)
    with pytest.raises(UnsupportedModelError, match="Linear4bit is quantised"):
        SparseFFN(quantised, KEPT)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        SparseFFN(adapted, KEPT)
    with pytest.raises(UnsupportedModelError, match="off-loaded"):
        SparseFFN(offloaded, KEPT)


def test_refuses_an_unknown_form_by_name():
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Linear(HIDDEN, WIDTH)

    with pytest.raises(UnsupportedModelError, match=r"Strange is no FFN .* \(it has w1\)"):
        SparseFFN(Strange(), KEPT)


def test_finds_the_ffn_of_a_decoder_layer():
    layer = build("llama").get_decoder().layers[0]
    assert find_ffn(layer) is layer.mlp


def test_names_a_mixture_of_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    layer = transformers.MixtralForCausalLM(config).get_decoder().layers[0]
    with pytest.raises(UnsupportedModelError, match="MixtralSparseMoeBlock"):
        find_ffn(layer)


def test_names_a_layer_without_an_ffn():
    with pytest.raises(UnsupportedModelError, match="Identity has no FFN"):
        find_ffn(nn.Identity())


def test_a_gate_threshold_needs_a_gate():
    ffn = make(PlainFFN)
    choice = choose(2)
    choice.gate_threshold = torch.zeros(2)
    with pytest.raises(ConfigError, match=r"PlainFFN has no gate .* without a rule on the gate"):
        ffn.take(choice)
