"""Finds the parts of a model, and refuses unsupported models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from corematching.errors import ALL_TOKENS, ConfigError, UnsupportedModelError
from corematching.model.attention import find_attention
from corematching.model.ffn import find_ffn
from corematching.model.gate_store import GateStore
from corematching.model.layer_inputs import needs_positions, no_cache_error, takes_cache
from corematching.model.linear import linear_shape
from corematching.protocol import (
    ACTIVATIONS,
    ATTENTION,
    CONTRIBUTIONS,
    Method,
    NeuronPolicy,
    TokenPolicy,
)

DOWN_NAMES = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
VISION_NAMES = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_encoder")
PROJECTOR_NAMES = ("multi_modal_projector", "connector", "aligner")
IMAGE_IDS = ("image_token_id", "video_token_id")
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass
class ModelSpec:
    """The parts of a model.

    Attributes
    ----------
    decoder : nn.Module
        The text model.
    layers : list of nn.Module
        Its decoder layers.
    attentions, ffns, down_projs : list of nn.Module
        Each layer's attention, FFN and down projection.
    config : Any
        The text model's configuration.
    image_ids : tuple of int
        Ids of image (or video) placeholder tokens; empty for text-only models.
    vision, projector : nn.Module or None
        The vision tower, and the projector to image tokens where it is a separate module.
    gates : GateStore
        Keeps gates between the FFNs' computation and the policies.
    """

    decoder: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    ffns: list[nn.Module]
    down_projs: list[nn.Module]
    config: Any
    image_ids: tuple[int, ...]
    vision: nn.Module | None
    projector: nn.Module | None = None
    gates: GateStore = field(default_factory=GateStore)

    @property
    def widths(self) -> list[int]:
        """F of every layer."""
        return [linear_shape(down)[0] for down in self.down_projs]


def check_model(model: nn.Module, method: Method) -> ModelSpec:
    """Find a model's parts and check that a method can run on it.

    Parameters
    ----------
    model : nn.Module
        A loaded model.
    method : Method
        The method to install.

    Returns
    -------
    ModelSpec
        The model's parts.

    Raises
    ------
    UnsupportedModelError
        The method cannot run on the model; the message names the part and the fix.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model: {_find_inner(model)}"
        )
    if isinstance(getattr(model, "thinker", None), PreTrainedModel):
        raise UnsupportedModelError(
            f"{_kind(model)} is a model for text and one for speech: pass the one for text, "
            "model.thinker, and call its generate()"
        )
    config = model.config.get_text_config(decoder=True)
    _check_architecture(model, config)
    _check_weights(model)
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(
            f"{_kind(model)}: its decoder ({type(decoder).__name__}) has no list of layers "
            "named 'layers'; pass the whole model with its language model head"
        )
    ids = [getattr(model.config, name, None) for name in IMAGE_IDS]
    parts = ModelSpec(
        decoder=decoder,
        layers=list(layers),
        attentions=[_attention(model, i, layer) for i, layer in enumerate(layers)],
        ffns=[_ffn(model, layer) for layer in layers],
        down_projs=[],
        config=config,
        image_ids=tuple(i for i in ids if isinstance(i, int)),
        vision=_named(model, VISION_NAMES),
        projector=_named(model, PROJECTOR_NAMES),
    )
    parts.down_projs = [_down_proj(model, ffn) for ffn in parts.ffns]
    _check_shared(model, "layer", parts.layers)
    if method.neurons is not None:
        _check_shared(model, "FFN", parts.ffns)
    if method.tokens is not None:
        _check_tokens(model, config, parts, method)
    return parts


def _find_inner(model: Any) -> str:
    """What to pass instead of an object around a transformers model."""
    if hasattr(model, "get_base_model"):
        return "pass model.get_base_model(), or merge its adapters (model.merge_and_unload())"
    for name in ("_orig_mod", "module"):
        if isinstance(getattr(model, name, None), PreTrainedModel):
            return f"pass the one inside it, model.{name}"
    return "pass the PreTrainedModel that from_pretrained returned"


def _kind(model: Any) -> str:
    return f"{type(model).__name__} (model_type '{model.config.model_type}')"


def _check_architecture(model: PreTrainedModel, config: Any) -> None:
    """Refuse encoder-decoders, recurrent and chunked layers, shared caches, cross-attention."""
    kind = _kind(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder, whose image tokens are in no decoder layer: "
            "use a decoder-only vision-language model"
        )
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{kind} has no generate(): load it with AutoModelForImageTextToText or "
            "AutoModelForCausalLM"
        )
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if odd:
        raise UnsupportedModelError(
            f"{kind} has layers of type {', '.join(odd)}: recurrent, linear and chunked attention "
            "carry dropped tokens in their state; use a model with full or sliding attention"
        )
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError(
            f"{kind} attends in chunks of {config.attention_chunk_size} tokens, which dropped "
            "tokens would shift: use a model with full or sliding attention"
        )
    modes = getattr(config, "kv_sharing_modes", None) or ()
    if getattr(config, "num_kv_shared_layers", 0) or any(mode == "reuse" for mode in modes):
        raise UnsupportedModelError(
            f"{kind} shares keys and values between layers (KV sharing), so one layer's cache "
            "cannot be shortened alone: use a model without num_kv_shared_layers"
        )
    if getattr(config, "cross_attention_layers", None):
        raise UnsupportedModelError(
            f"{kind} shows images through cross-attention layers, so there are no image tokens to "
            "drop in the decoder: use a model that puts image tokens into the prompt"
        )


def _check_shared(model: PreTrainedModel, what: str, modules: list[nn.Module]) -> None:
    """Refuse modules used at several depths, as each depth makes its own choice."""
    seen: dict[int, int] = {}
    for index, module in enumerate(modules):
        first = seen.setdefault(id(module), index)
        if first != index:
            raise UnsupportedModelError(
                f"{_kind(model)} runs one {what} as layers {first} and {index}, which cannot "
                "choose apart from each other: give each layer modules of its own (their weights "
                "may be shared)"
            )


def _check_weights(model: PreTrainedModel) -> None:
    """Refuse off-loaded weights."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise UnsupportedModelError(
                f"{_kind(model)}: '{name}' is on the 'meta' device (off-loaded or never loaded): "
                "load the whole model on one device, e.g. device_map=None and model.to('cuda'), "
                "in a smaller dtype if it does not fit"
            )
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        slow = ", ".join(sorted(devices & {"cpu", "disk"}))
        raise UnsupportedModelError(
            f"{_kind(model)} is partly off-loaded to {slow}:"
            " load the whole model on one device, in a smaller dtype if it does not fit"
        )


def _attention(model: nn.Module, index: int, layer: nn.Module) -> nn.Module:
    attention = find_attention(layer)
    if attention is None:
        names = ", ".join(name for name, _ in layer.named_children())
        raise UnsupportedModelError(
            f"{_kind(model)}: layer {index} ({type(layer).__name__}: {names}) has no "
            "self-attention, it is recurrent or of an unknown form; use a model whose layers are "
            "all attention and FFN"
        )
    return attention


def _ffn(model: nn.Module, layer: nn.Module) -> nn.Module:
    try:
        return find_ffn(layer)
    except UnsupportedModelError as error:
        reason = str(error).split(":")[0]
        raise UnsupportedModelError(
            f"{_kind(model)}: {reason}; use a model whose layers have one dense FFN each"
        ) from error


def _down_proj(model: nn.Module, ffn: nn.Module) -> nn.Module:
    for name in DOWN_NAMES:
        module = getattr(ffn, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UnsupportedModelError(
        f"{_kind(model)}: its FFN ({type(ffn).__name__}) has none of {', '.join(DOWN_NAMES)}; "
        "use a model with a standard dense FFN"
    )


def _named(model: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for owner in (model, getattr(model, "base_model", None), getattr(model, "model", None)):
        for name in names:
            module = getattr(owner, name, None)
            if isinstance(module, nn.Module):
                return module
    return None


def _check_tokens(model: nn.Module, config: Any, parts: ModelSpec, method: Method) -> None:
    """Refuse models that cannot drop tokens, and cuts out of range."""
    assert method.tokens is not None
    if not parts.image_ids:
        raise UnsupportedModelError(
            f"{_kind(model)} has no image tokens to drop: {' and '.join(IMAGE_IDS)} of "
            f"{type(model.config).__name__} are not set; if its prompts hold placeholders for "
            f"images, set model.config.image_token_id to their id, else {ALL_TOKENS}"
        )
    if config._attn_implementation == "flex_attention":
        raise UnsupportedModelError(
            f"{_kind(model)} runs on flex_attention, whose block masks cannot be shortened: "
            "call model.set_attn_implementation('sdpa')"
        )
    _check_layer_inputs(model, config, parts)
    depth = len(parts.layers)
    after = method.tokens.drop_after(depth)
    if list(after) != sorted(set(after)) or any(not -1 <= i <= depth - 2 for i in after):
        raise UnsupportedModelError(
            f"the method drops tokens after layers {list(after)}, but {_kind(model)} has "
            f"{depth} layers: choose ascending layers from -1 to {depth - 2}"
        )
    shown = {ACTIVATIONS, ATTENTION, CONTRIBUTIONS} & set(method.tokens.needs)
    if -1 in after and shown:
        raise UnsupportedModelError(
            f"the method drops tokens before layer 0 and reads {', '.join(sorted(shown))}, which "
            "no layer has computed by then: drop after layer 0 or later"
        )


def _check_layer_inputs(model: nn.Module, config: Any, parts: ModelSpec) -> None:
    """Refuse layers without a known cache input, and positions that FlashAttention misreads."""
    for layer in parts.layers:
        if not takes_cache(layer):
            raise no_cache_error(layer)
    flash = "flash" in (config._attn_implementation or "")
    if flash and any(needs_positions(attention) for attention in parts.attentions):
        raise UnsupportedModelError(
            f"{_kind(model)} scales its attention by positions, and FlashAttention takes the gaps "
            "that dropped tokens leave between them for several prompts: call "
            "model.set_attn_implementation('sdpa')"
        )


def choose_counts(parts: ModelSpec, neurons: NeuronPolicy | None) -> list[int]:
    """The number of kept neurons in each layer; all of them without a policy."""
    widths = parts.widths
    if neurons is None:
        return list(widths)
    counts = {width: neurons.counts(len(widths), width) for width in set(widths)}
    return [counts[width][index] for index, width in enumerate(widths)]


def check_policies(method: Method) -> None:
    """Refuse a method whose policies do not subclass those of `corematching.protocol`.

    Raises
    ------
    ConfigError
        A policy has another type; the message names the class to subclass.
    """
    pairs = ("tokens", method.tokens, TokenPolicy), ("neurons", method.neurons, NeuronPolicy)
    for name, policy, base in pairs:
        if policy is not None and not isinstance(policy, base):
            raise ConfigError(
                f"{name} is a {type(policy).__name__}, which is no {base.__name__}: let the class "
                f"subclass corematching.protocol.{base.__name__}"
            )
