"""Llama's decoder layer for prompts, in one call or in a few.

Shapes: B samples, T tokens, d hidden size, F intermediate neurons, D head dimension.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corematching.backends.cpu.attention import PromptAttention, asks_for_more, inputs_of, is_causal
from corematching.backends.cpu.native import (
    HEAD_DIM_STEP,
    Gemm,
    Norm,
    PrefillLayer,
    Scratch,
    normalize,
    why_unsupported_gemm,
)
from corematching.cache.layers import store, stores_as_given
from corematching.model.ffn import FFNParts
from corematching.model.gate_store import GateStore
from corematching.model.hooks import may_run_late, promise_input, run_pre_hooks
from corematching.model.snapshot import WeightSnapshot


@dataclass
class Weights:
    """A layer's weights, norms and attention module.

    Attributes
    ----------
    attention : Any
        The attention module.
    inputs, input_biases : list
        Weights and biases of the query, key and value projections.
    output, output_bias : Tensor
        The output projection; the bias may be None.
    ffn : dict
        The FFN's weights, from `FFNParts.dense`.
    down_bias : Tensor or None
        The bias of the down projection.
    norms : tuple of Norm
        The norms of attention and FFN.
    whole : PrefillLayer or None
        The layer as one call, where the kernels support all of it.
    """

    attention: Any
    inputs: list[Tensor]
    input_biases: list[Tensor | None]
    output: Tensor
    output_bias: Tensor | None
    ffn: dict[str, Tensor]
    down_bias: Tensor | None
    norms: tuple[Norm, Norm]
    whole: PrefillLayer | None = None


class LlamaLayer:
    """Runs prompts through a layer, with the residuals fused into the matrix products.

    Parameters
    ----------
    layer : nn.Module
        A decoder layer of Llama's form.
    ffn : FFNParts
        The parts of its FFN.
    gemm : Gemm
        The matrix products.
    attention : PromptAttention
        The attention between the projections.
    gates : GateStore
        Keeps requested gates of the FFN.
    scratch : Scratch
        Working memory, shared by all layers.
    """

    def __init__(
        self,
        layer: nn.Module,
        ffn: FFNParts,
        gemm: Gemm,
        attention: PromptAttention,
        gates: GateStore,
        scratch: Scratch,
    ) -> None:
        self.layer: Any = layer
        self.ffn, self._gates, self._scratch = ffn, gates, scratch
        self._gemm, self._attend = gemm, attention
        self._watch = WeightSnapshot()
        self._weights: Weights | None = None

    def run(self, x: Tensor, mask: Any, cache: Any, cos_sin: Any, **kwargs: Any) -> Tensor | None:
        """(B, T, d) to (B, T, d), or None where the kernels do not support it.

        Parameters
        ----------
        x : Tensor
            Several tokens per sample, on the CPU, without autograd.
        mask, cache : object
            The layer's ``attention_mask`` and ``past_key_values``.
        cos_sin : tuple of Tensor
            Cosines and sines, (B or 1, T, D) each, of x's dtype.
        """
        weights = self._find_weights()
        if weights is None or x.dtype != weights.output.dtype:
            return None
        out = None
        if weights.whole is not None and self._goes_at_once(x, mask, cache, kwargs):
            out = self._run_at_once(weights.whole, x, mask, cache, cos_sin, kwargs)
        if out is None:
            out = self._run_in_parts(weights, x, mask, cache, cos_sin, kwargs)
        return out

    def _goes_at_once(self, x: Tensor, mask: Any, cache: Any, kwargs: dict[str, Any]) -> bool:
        """Whether attention reads this prompt's keys only, and the hooks may run late."""
        if cache is not None and not stores_as_given(cache, self.layer.self_attn.layer_idx):
            return False
        known = PrefillLayer.supports(x, mask) and not asks_for_more(kwargs)
        return known and may_run_late(self.ffn.down)

    def _run_at_once(
        self,
        whole: PrefillLayer,
        x: Tensor,
        mask: Any,
        cache: Any,
        cos_sin: Any,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        ffn, attention = self.ffn, self.layer.self_attn
        x, middle = x.contiguous(), torch.empty_like(x)
        if not promise_input(ffn.mlp, middle, functools.partial(normalize, middle, whole.ffn_norm)):
            return None
        kept = self._gates.make_room(ffn.mlp, middle, ffn.width)
        causal = is_causal(attention, mask, kwargs)
        done = whole.run(x, cos_sin, mask, causal, middle, kept)
        if cache is not None:
            assert done.key is not None and done.value is not None
            store(cache, done.key, done.value, attention.layer_idx)
        run_pre_hooks(ffn.down, done.active)
        return done.out

    def _run_in_parts(
        self,
        weights: Weights,
        x: Tensor,
        mask: Any,
        cache: Any,
        cos_sin: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        attention, gemm = weights.attention, self._gemm
        first, second = weights.norms
        qkv = gemm.joint(x, weights.inputs, weights.input_biases, first)
        qkv = qkv.view(*x.shape[:-1], -1, attention.head_dim)
        mixed = self._attend.attend(attention, qkv, cos_sin, mask, cache, **kwargs)[0]
        x = gemm.linear(mixed, weights.output, weights.output_bias, x)
        make = functools.partial(normalize, x, second)
        if promise_input(self.ffn.mlp, x, make):
            active = activate(gemm, self._gates, self.ffn, weights.ffn, x, second)
        else:
            normed = run_pre_hooks(self.ffn.mlp, make())
            active = activate(gemm, self._gates, self.ffn, weights.ffn, normed)
        active = run_pre_hooks(self.ffn.down, active)
        return gemm.linear(active, weights.ffn["down"], weights.down_bias, x)

    def _find_weights(self) -> Weights | None:
        """The weights, read again after a change; None if the kernels do not support them."""
        if not self._watch.unchanged():
            weights = self._list_weights()
            self._weights = weights if weights is not None and self._fit(weights) else None
            if self._weights is not None:
                self._weights.whole = self._prepare(self._weights)
            self._watch = WeightSnapshot([self.layer])
        return self._weights

    def _prepare(self, weights: Weights) -> PrefillLayer | None:
        """The layer as one call, or None where the kernels do not support all of it."""
        attention, ffn = weights.attention, self.ffn
        names = ("q", "k", "v")
        matrices = dict(zip(names, weights.inputs, strict=True))
        query, key, size = matrices["q"], matrices["k"], attention.head_dim
        fits = weights.output.shape[1] == query.shape[0] and not query.shape[0] % key.shape[0]
        if size % HEAD_DIM_STEP or not fits:
            return None
        biases = {
            f"{name}_bias": bias for name, bias in zip(names, weights.input_biases, strict=True)
        }
        everything = matrices | biases | weights.ffn
        everything |= {
            "o": weights.output,
            "o_bias": weights.output_bias,
            "down_bias": weights.down_bias,
        }
        assert ffn.activation_name is not None
        return PrefillLayer(
            everything, weights.norms, size, ffn.activation_name, attention.scaling, self._scratch
        )

    def _fit(self, weights: Weights) -> bool:
        every = [*weights.inputs, weights.output, *weights.ffn.values()]
        matrices = [part for part in every if part.ndim == 2]
        if any(why_unsupported_gemm(part) is not None for part in matrices):
            return False
        norms = [norm.weight for norm in weights.norms]
        if len({part.dtype for part in (*matrices, *norms)}) > 1:
            return False
        return all(part.is_contiguous() for part in matrices if part is not weights.ffn["down"])

    def _list_weights(self) -> Weights | None:
        """The layer's present weights; None if its modules are no longer plain."""
        layer, ffn = self.layer, self.ffn
        attention = layer.self_attn
        inputs = inputs_of(attention)
        linears = {attention.o_proj, *inputs, *ffn.list_linears()}
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if any(type(x) is not nn.Linear for x in linears) or not linears <= set(layer.modules()):
            return None
        first, second = (Norm(norm.weight, norm.variance_epsilon) for norm in norms)
        return Weights(
            attention=attention,
            inputs=[linear.weight for linear in inputs],
            input_biases=[linear.bias for linear in inputs],
            output=attention.o_proj.weight,
            output_bias=attention.o_proj.bias,
            ffn=ffn.dense(),
            down_bias=ffn.down.bias,
            norms=(first, second),
        )


def activate(
    gemm: Gemm,
    gates: GateStore,
    ffn: FFNParts,
    weights: dict[str, Tensor],
    x: Tensor,
    norm: Norm | None = None,
) -> Tensor:
    """The activations (B, T, F) of a gated FFN on x (B, T, d), normalized first with a norm.

    ``weights`` are those of `FFNParts.dense`.
    """
    biases = weights.get("gate_bias"), weights.get("up_bias")
    assert ffn.activation_name is not None
    kept = gates.make_room(ffn.mlp, x, ffn.width)
    gate, up = weights["gate"], weights["up"]
    return gemm.gated(x, gate, up, *biases, ffn.activation_name, kept, norm)
