"""What a decoder hands to its layers: the inputs' names, and which have an entry per token."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from corematching.errors import ALL_TOKENS, UnsupportedModelError

CACHE_NAMES = ("past_key_values", "layer_past")
"""Names under which decoder layers take the KV cache."""
PER_TOKEN = frozenset({"per_layer_input"})
"""Inputs of a layer, (B, T, ...), beside its hidden states, masks, positions and rotations."""
LAYER_INPUTS = frozenset(
    {
        "attention_mask",
        "cache_position",
        "hidden_states",
        "output_attentions",
        "position_embeddings",
        "position_ids",
        "shared_kv_states",
        "use_cache",
        *CACHE_NAMES,
        *PER_TOKEN,
    }
)
DECODER_INPUTS = frozenset(
    {
        "attention_mask",
        "cache_position",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "input_ids",
        "inputs_embeds",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "per_layer_inputs",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
DEEPSTACK_INPUTS = frozenset({"visual_pos_masks", "deepstack_visual_embeds"})
"""Inputs of decoders with a method ``_deepstack_process``, which adds them between layers."""


VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the forward of a module's class, without ``self`` and ``**kwargs``."""
    kind: Any = type(module)
    return _read_parameters(kind)


@functools.cache
def _read_parameters(kind: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    every = list(inspect.signature(kind.forward).parameters.items())[1:]
    return {name: parameter for name, parameter in every if parameter.kind not in VARIABLE}


def name_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """A layer's hidden states, which are its first input, and its other inputs by name."""
    first, *rest = [*parameters_of(layer)] or ["hidden_states"]
    named = dict(zip(rest, args[1:], strict=False)) | dict(kwargs)
    return (args[0], named) if args else (named.pop(first), named)


def find_cache(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among a layer's keyword inputs, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def takes_cache(layer: nn.Module) -> bool:
    """Whether a layer's forward has a parameter for the KV cache under a known name."""
    return any(name in parameters_of(layer) for name in CACHE_NAMES)


def no_cache_error(layer: nn.Module) -> UnsupportedModelError:
    """The error for layers that take their KV cache under an unknown name."""
    return UnsupportedModelError(
        f"{type(layer).__name__} takes no KV cache named {' or '.join(CACHE_NAMES)}, so dropped "
        f"tokens would stay in it: {ALL_TOKENS}"
    )


def needs_positions(attention: nn.Module) -> bool:
    """Whether an attention computes with position ids, beside the rotation."""
    found = parameters_of(attention).get("position_ids")
    return found is not None and found.default is inspect.Parameter.empty


def list_odd_inputs(*modules: nn.Module) -> frozenset[str]:
    """The names of inputs of a layer or its attention that cannot be shortened if they are long."""
    return frozenset(name for module in modules for name in parameters_of(module)) - LAYER_INPUTS


def may_add_between_layers(decoder: nn.Module) -> bool:
    """Whether a decoder may add to hidden states between its layers, by its inputs' names."""
    known = DECODER_INPUTS
    if hasattr(decoder, "_deepstack_process"):
        known = known | DEEPSTACK_INPUTS
    return not known >= parameters_of(decoder).keys()
