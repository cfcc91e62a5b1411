"""Llama's decoder layer for prompts, in one call or in a few.

Shapes: B samples, T tokens, d hidden size, F intermediate neurons, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corematching.backends.cpu.attention import PromptAttention, asks_for_more, inputs_of, is_causal
from corematching.backends.cpu.layer_weights import (
    INPUTS,
    PrefillWeights,
    WeightReader,
    list_tensors,
)
from corematching.backends.cpu.native import Gemm, Norm, PrefillLayer, Scratch, normalize
from corematching.cache.layers import store, stores_as_given
from corematching.model.ffn import FFNParts
from corematching.model.gate_store import GateStore
from corematching.model.hooks import may_run_late, promise_input, run_pre_hooks
from corematching.model.linear import is_plain_linear


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
        self.ffn, self._gates = ffn, gates
        self._gemm, self._attend = gemm, attention
        self._weights = WeightReader(layer, self._read, scratch)

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
        weights = self._weights.find()
        if weights is None or x.dtype != weights.matrix("o").dtype:
            return None
        whole, out = self._weights.whole, None
        if whole is not None and self._goes_at_once(x, mask, cache, kwargs):
            out = self._run_at_once(whole, x, mask, cache, cos_sin, kwargs)
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
        weights: PrefillWeights,
        x: Tensor,
        mask: Any,
        cache: Any,
        cos_sin: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        attention, gemm = self.layer.self_attn, self._gemm
        first, second = weights.norms
        matrices, biases = map(weights.matrix, INPUTS), map(weights.bias, INPUTS)
        qkv = gemm.joint(x, list(matrices), list(biases), first)
        qkv = qkv.view(*x.shape[:-1], -1, attention.head_dim)
        mixed = self._attend.attend(attention, qkv, cos_sin, mask, cache, **kwargs)[0]
        x = gemm.linear(mixed, weights.matrix("o"), weights.bias("o"), x)
        make = functools.partial(normalize, x, second)
        if promise_input(self.ffn.mlp, x, make):
            active = activate(gemm, self._gates, self.ffn, weights.tensors, x, second)
        else:
            normed = run_pre_hooks(self.ffn.mlp, make())
            active = activate(gemm, self._gates, self.ffn, weights.tensors, normed)
        active = run_pre_hooks(self.ffn.down, active)
        return gemm.linear(active, weights.matrix("down"), weights.bias("down"), x)

    def _read(self) -> PrefillWeights | None:
        """The layer's present weights; None if its modules are no longer plain."""
        layer, ffn, attention = self.layer, self.ffn, self.layer.self_attn
        inputs = inputs_of(attention)
        linears = {attention.o_proj, *inputs, *ffn.list_linears()}
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if not all(map(is_plain_linear, linears)) or not linears <= set(layer.modules()):
            return None
        assert ffn.activation_name is not None
        first, second = (Norm(norm.weight, norm.variance_epsilon) for norm in norms)
        projections = dict(zip((*INPUTS, "o"), (*inputs, attention.o_proj), strict=True))
        return PrefillWeights(
            list_tensors(projections) | ffn.dense() | {"down_bias": ffn.down.bias},
            (first, second),
            attention.head_dim,
            ffn.activation_name,
            attention.scaling,
        )


def activate(
    gemm: Gemm,
    gates: GateStore,
    ffn: FFNParts,
    weights: Mapping[str, Tensor | None],
    x: Tensor,
    norm: Norm | None = None,
) -> Tensor:
    """The activations (B, T, F) of a gated FFN on x (B, T, d), normalized first with a norm.

    ``weights`` are those of `FFNParts.dense`, maybe among others.
    """
    biases = weights.get("gate_bias"), weights.get("up_bias")
    assert ffn.activation_name is not None
    kept = gates.make_room(ffn.mlp, x, ffn.width)
    gate, up = weights["gate"], weights["up"]
    assert gate is not None and up is not None
    return gemm.gated(x, gate, up, *biases, ffn.activation_name, kept, norm)
