"""Reads the weights of a decoder of Llama's form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corematching.backends.cpu.native import LayerWeights, Shape, why_unsupported_matrix
from corematching.model.ffn import FFNParts
from corematching.model.layer_inputs import needs_positions
from corematching.model.linear import is_plain_linear
from corematching.model.patching import has_foreign_forward
from corematching.model.spec import ModelSpec

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}


class OddDecoderError(Exception):
    """The decoder does not have Llama's form."""


@dataclass(frozen=True)
class Layout:
    """A decoder's weights: views, no copies.

    Attributes
    ----------
    layers : list of LayerWeights
        Per layer, without the FFNs.
    ffns : list of FFNParts
        Per layer.
    final_norm : Tensor
        (d,).
    shape : Shape
        The shape of every layer.
    """

    layers: list[LayerWeights]
    ffns: list[FFNParts]
    final_norm: Tensor
    shape: Shape

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that the kernels read by its address."""
        own = [t for layer in self.layers for t in vars(layer).values() if t is not None]
        return [*own, self.final_norm, *(t for ffn in self.ffns for t in ffn.dense().values())]


def read_layout(parts: ModelSpec, ffns: list[FFNParts]) -> Layout:
    """Read a decoder's weights.

    Raises
    ------
    OddDecoderError
        The decoder does not have Llama's form; the message names the difference.
    """
    decoder: Any = parts.decoder
    config = parts.config
    _refuse_foreign_forwards(parts)
    missing = [
        name for name in ("norm", "rotary_emb", "embed_tokens") if not hasattr(decoder, name)
    ]
    if missing:
        raise OddDecoderError(f"{type(decoder).__name__} has no {', '.join(missing)}")
    _refuse_windows(parts)
    if any(needs_positions(attention) for attention in parts.attentions):
        raise OddDecoderError("its attention computes with positions")
    norms = [*(n for layer in parts.layers for n in _norms(layer)), decoder.norm]
    epsilons = {_epsilon(norm) for norm in norms}
    shapes = {_attention_shape(config, attention) for attention in parts.attentions}
    if len(epsilons) != 1 or len(shapes) != 1:
        raise OddDecoderError("its layers differ in shape")
    heads, kv_heads, head_dim, scaling = shapes.pop()
    with torch.inference_mode(False), torch.no_grad():
        layers = [_read_layer(layer) for layer in parts.layers]
        final: Any = decoder.norm.weight
        shape = Shape(heads, kv_heads, head_dim, epsilons.pop(), scaling)
        layout = Layout(layers, ffns, final.detach(), shape)
    _check_tensors(layout)
    return layout


def _refuse_foreign_forwards(parts: ModelSpec) -> None:
    """Refuse layers with a forward that other code replaced on its instance."""
    final = getattr(parts.decoder, "norm", None)
    modules = [m for layer in parts.layers for m in layer.modules()]
    for module in [*modules, *([] if final is None else [final])]:
        if has_foreign_forward(module):
            raise OddDecoderError(f"a {type(module).__name__} has a forward of its own")


def _refuse_windows(parts: ModelSpec) -> None:
    config = parts.config
    kinds = getattr(config, "layer_types", None) or []
    windows = [getattr(config, "sliding_window", None)] if not kinds else []
    windows += [getattr(attention, "sliding_window", None) for attention in parts.attentions]
    if any(kind != "full_attention" for kind in kinds) or any(windows):
        raise OddDecoderError("it has sliding windows")
    caps = ("attn_logit_softcapping", "attn_logit_softcap")
    if any(getattr(config, name, None) for name in caps):
        raise OddDecoderError("it caps its attention scores")


def _attention_shape(config: Any, attention: Any) -> tuple[int, int, int, float]:
    heads = config.num_attention_heads
    size = getattr(attention, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return heads, groups, int(size), float(getattr(attention, "scaling", size**-0.5))


def _norms(layer: Any) -> Iterable[nn.Module]:
    names = {name for name, _ in layer.named_children()}
    if names != LAYER_PARTS:
        raise OddDecoderError(f"{type(layer).__name__} has {', '.join(sorted(names))}")
    yield layer.input_layernorm
    yield layer.post_attention_layernorm
    for name in HEAD_NORMS:
        if hasattr(layer.self_attn, name):
            yield getattr(layer.self_attn, name)


def _epsilon(norm: Any) -> float:
    value = getattr(norm, "variance_epsilon", None)
    if value is None or not isinstance(getattr(norm, "weight", None), Tensor):
        raise OddDecoderError(f"{type(norm).__name__} is no RMSNorm of Llama's form")
    return float(value)


def _read_layer(layer: Any) -> LayerWeights:
    attention = layer.self_attn
    names = {name for name, _ in attention.named_children()}
    if names not in (ATTENTION_PARTS, ATTENTION_PARTS | HEAD_NORMS):
        raise OddDecoderError(f"{type(attention).__name__} has {', '.join(sorted(names))}")
    linears = [getattr(attention, f"{name}_proj") for name in "qkvo"]
    for linear in linears:
        if not is_plain_linear(linear):
            raise OddDecoderError(f"{type(attention).__name__} has a {type(linear).__name__}")
    q, k, v, o = (linear.weight.detach() for linear in linears)
    biases = [None if x.bias is None else x.bias.detach() for x in linears]
    head_norms = [attention.q_norm, attention.k_norm] if names >= HEAD_NORMS else []
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        layer.post_attention_layernorm.weight.detach(),
        *(q, k, v, o),
        *biases,
        *(norm.weight.detach() for norm in head_norms),
    )


def _check_tensors(layout: Layout) -> None:
    """Refuse tensors that the kernels cannot read by their address."""
    dtype, shape = layout.final_norm.dtype, layout.shape
    hidden = layout.final_norm.shape[0]
    for tensor in layout.tensors:
        reason = why_unsupported_matrix(tensor if tensor.is_contiguous() else tensor.t())
        if reason is not None or tensor.dtype != dtype or type(tensor.data) is not Tensor:
            raise OddDecoderError(reason or "its weights are of several kinds")
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in layout.layers:
        found = [tuple(w.shape) for w in (layer.q, layer.k, layer.v, layer.o)]
        if found != [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]:
            raise OddDecoderError("its attention has other shapes than its configuration says")
        if layer.q_norm is not None and layer.q_norm.shape != (shape.head_dim,):
            raise OddDecoderError("it normalises all heads together")
