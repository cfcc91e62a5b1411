"""One prefill: shows each layer to the policies and drops the other tokens.

The hooks are on the decoder layers for one prefill only, so decode steps run (and compile) without
any. Tokens are dropped before layer ``l + 1``, after layer ``l`` and any additions to its output.
Shapes: B samples, T tokens of the prompt, K tokens still present, d hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from corematching import devices
from corematching.backends.choice_checks import check_tokens
from corematching.backends.sparse_ffn import SparseFFN
from corematching.cache.layers import compact, is_fresh, widen_sliding_layers
from corematching.cache.masks import take
from corematching.cache.pruned_prompt import PrunedPrompt
from corematching.errors import ALL_TOKENS, UnsupportedModelError
from corematching.model.gate_store import GateRequest, make_gate_request
from corematching.model.hooks import Reader, stay_eager
from corematching.model.layer_inputs import find_cache, name_inputs, no_cache_error
from corematching.model.linear import weight_of
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec
from corematching.protocol import (
    ACTIVATIONS,
    ATTENTION,
    CONTRIBUTIONS,
    EMBEDDINGS,
    GATE,
    INPUTS,
    KEPT,
    VISION,
    Method,
    PrefillView,
)
from corematching.runtime.prefill.between_layers import BetweenLayers
from corematching.runtime.prefill.known import KnownTokens
from corematching.runtime.prefill.layer_inputs import LayerInputs, Present
from corematching.runtime.prefill.left import find_survivors
from corematching.runtime.prefill.selection import Selection, Stage
from corematching.runtime.prefill.tower import TowerObserver
from corematching.runtime.prefill.view import AttentionObserver, FFNObserver
from corematching.runtime.token_count_bias import can_weigh


class Prefill:
    """The hooks and the state of one prefill.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.
    method : Method
        The method.
    sparse : dict
        The sparse FFNs, by layer; without the dense layers.
    valid, image : Tensor
        (B, T) bool, the prompt's tokens without padding, and its image tokens.
    tower : TowerObserver or None
        Observes the vision tower for a token policy that reads it.
    """

    def __init__(
        self,
        parts: ModelSpec,
        method: Method,
        sparse: Mapping[int, SparseFFN],
        valid: Tensor,
        image: Tensor,
        tower: TowerObserver | None = None,
    ) -> None:
        self.parts, self.method = parts, method
        self.sparse = sparse if method.neurons else {}
        self.tower = tower
        self.valid, self.image = valid, image
        self.prompt_valid, self.prompt_image = valid, image
        batch, self.length = valid.shape
        self.origin = torch.arange(self.length, device=valid.device).expand(batch, -1)
        self.selection = Selection()
        self.weights: Tensor | None = None
        self.log_weights: Tensor | None = None
        self.shortened = False
        self.cache: Any = None
        depth = len(parts.layers)
        tokens = method.tokens
        self.known = KnownTokens(valid, image)
        drops = tokens is not None and not (devices.on_host(image) and not bool(image.any()))
        self.cuts: tuple[int, ...] = tokens.drop_after(depth) if tokens and drops else ()
        self.token_needs = tokens.needs if tokens and drops else frozenset()
        self.neuron_needs = method.neurons.needs if method.neurons else frozenset()
        self.memory: dict[type, Any] = {}
        self._activations: Tensor | None = None
        self._ffn: FFNObserver | None = None
        self._gate_requested: GateRequest | None = None
        self._waiting: list[tuple[Tensor, PrefillView]] = []
        self._embeddings: Tensor | None = None
        self._observer: AttentionObserver | None = None
        self._inputs = LayerInputs(parts, self.length)
        self._between = BetweenLayers(parts, self.length)
        self._left: Present | None = None
        self._patches = Patches()

    def install(self) -> None:
        """Put the hooks on the layers."""
        if not self.cuts and not self.sparse:
            return
        for index, layer in enumerate(self.parts.layers):
            hook = functools.partial(self._before_layer, index)
            self._patches.add_pre_hook(layer, hook, with_kwargs=True)
            needs = self._needs(index)
            if ACTIVATIONS in needs:
                reader = Reader(functools.partial(self._see_activations, index))
                down = self.parts.down_projs[index]
                self._patches.add_pre_hook(down, reader)
            if {ATTENTION, CONTRIBUTIONS} & needs:
                self._observe_attention(index)
            if {INPUTS, GATE} & needs:
                self._observe_ffn(index)
        if self.cuts:
            self._between.install(self._patches, self._present)

    def remove(self) -> None:
        """Remove the hooks and release the tensors."""
        self._patches.undo()
        if self._observer is not None:
            self._observer.disarm()
        self._observer = self._activations = self._embeddings = None
        self._ffn = self._gate_requested = None
        self.parts.gates.forget()
        self._waiting.clear()
        self._inputs.forget()
        self._left = None

    def make_pruned_prompt(self, record: int) -> PrunedPrompt:
        """The prompt for the cache; ``record`` is the number of its record."""
        chosen = self.selection
        return PrunedPrompt(
            self.valid,
            self.length,
            dropped=self.length - self.valid.shape[1],
            neurons=chosen.neurons,
            shortened=bool(chosen.stages),
            record=record,
            log_counts=self._log_counts(),
            origin=self.origin,
            full=self.known.is_full,
        )

    def cache_of(self, output: Any) -> Any:
        """The KV cache of this prompt, from its layers or from the model's output; or None.

        Raises
        ------
        UnsupportedModelError
            Tokens were dropped, but no layer showed the cache that holds them.
        """
        found = getattr(output, "past_key_values", None) if self.cache is None else self.cache
        if self.shortened and self.cache is None and found is not None:
            raise no_cache_error(self.parts.layers[0])
        return found

    def learn(self) -> bool:
        """Find out what the host can know; returns whether the prompt has images to cut."""
        self.known.read()
        view = self.known.view
        if view is not None and not any(view.image_counts):
            self.cuts, self.token_needs = (), frozenset()
        return bool(self.cuts)

    def _log_counts(self) -> Tensor | None:
        """(B, K) float32, the logarithms of the weights."""
        if self.weights is None or self.log_weights is not None:
            return self.log_weights
        return self.weights.float().log()

    def _needs(self, index: int) -> frozenset[str]:
        """The parts of this layer's view that policies read, out of `NEEDS`."""
        needs: frozenset[str] = frozenset()
        if index in self.cuts:
            needs |= self.token_needs
        if index in self.sparse:
            needs |= self.neuron_needs | {ACTIVATIONS}
        return needs

    def _observe_attention(self, index: int) -> None:
        attention = self.parts.attentions[index]

        def arm(*_: Any) -> None:
            self._observer = AttentionObserver(attention)
            self._observer.arm()

        self._patches.add_pre_hook(attention, arm)

    def _observe_ffn(self, index: int) -> None:
        ffn, wanted = self.parts.ffns[index], GATE in self._needs(index)

        def begin(observer: FFNObserver) -> None:
            self._ffn = observer
            self.parts.gates.ask(ffn, self._gate_request() if wanted else None)

        observer = FFNObserver(ffn, self.parts.gates, begin)
        self._patches.add_pre_hook(ffn, observer)
        activation = observer.activation
        # a view that waits would keep all tokens' gates
        seen = wanted and KEPT not in self.neuron_needs and not devices.on_host(self.valid)
        if seen and activation is not None:
            self._patches.add_hook(activation, observer.see)

    def _gate_request(self) -> GateRequest | None:
        """A request for the gates of the text tokens, which policies read; on a CPU only."""
        if not devices.on_host(self.valid):
            return None
        if self._gate_requested is None:
            self._gate_requested = make_gate_request(self.valid & ~self.image)
        return self._gate_requested

    @stay_eager
    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Drop tokens if the previous layer is a cut; shorten the layer's inputs."""
        hidden, kwargs = name_inputs(layer, args, kwargs)
        if index == 0:
            self._begin(layer, hidden, kwargs)
        if hidden.device != self.valid.device:  # a model spread over several devices
            self.valid, self.image = self.valid.to(hidden.device), self.image.to(hidden.device)
            self.origin = self.origin.to(hidden.device)
            self.weights = None if self.weights is None else self.weights.to(hidden.device)
            self._left = self.log_weights = None
            self._inputs.forget()
        if self.shortened:
            hidden = self._between.gather(hidden, self.origin)
        if index - 1 in self.cuts:
            hidden = self._cut(index - 1, hidden)
        if self._ffn is not None:
            self._ffn.forget()
        self._activations = self._observer = self._ffn = None
        if not self.shortened:
            return None
        present = self._present()
        assert present is not None
        return (hidden,), self._inputs.shorten(index, hidden, kwargs, present, self.cache)

    def _present(self) -> Present | None:
        """The tokens still present, or None before any is dropped."""
        if self._left is None and self.shortened:
            full = self.known.is_full
            self._left = Present(self.origin, self.valid, full, self._log_counts())
        return self._left

    def _begin(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        self.learn()
        if self.cuts and hidden.ndim != 3:
            raise UnsupportedModelError(
                f"{type(layer).__name__} takes hidden states of {hidden.ndim} dimensions, whose "
                f"tokens cannot be dropped: {ALL_TOKENS}"
            )
        cache = find_cache(kwargs)
        if cache is not None and is_fresh(cache, self.length):
            self.cache = cache
            if self.cuts:
                widen_sliding_layers(cache, self.length)
        if EMBEDDINGS in self.token_needs | (self.neuron_needs if self.sparse else frozenset()):
            self._embeddings = hidden

    @stay_eager
    def _see_activations(self, index: int, activations: Tensor) -> None:
        """Choose this layer's neurons from the input of its down projection."""
        self._activations = activations
        if index in self.sparse:
            with torch.no_grad():
                view = self._view(index, None, self.neuron_needs | {ACTIVATIONS})
                if KEPT in self.neuron_needs and self.cuts and index <= self.cuts[-1]:
                    self._waiting.append((self.origin, view))
                else:
                    view.kept = self.valid if KEPT in self.neuron_needs else None
                    self._choose_neurons(view)

    def _choose_neurons(self, view: PrefillView) -> None:
        assert self.method.neurons is not None
        ffn = self.sparse[view.layer]
        with ffn.weights_present():
            choice = self.method.neurons.choose(view, ffn.count)
            ffn.take(choice)
        self.selection.neurons[view.layer] = choice

    def _choose_waiting(self) -> None:
        """Choose the neurons of the layers so far, after the last cut."""
        alive = torch.zeros_like(self.prompt_valid)
        alive = alive.scatter(1, self.origin.to(alive.device), self.valid.to(alive.device))
        for origin, view in self._waiting:
            view.kept = alive.to(origin.device).gather(1, origin) & view.valid
            self._choose_neurons(view)
        self._waiting.clear()

    def _view(self, layer: int, hidden: Tensor | None, needs: frozenset[str]) -> PrefillView:
        observer, valid = self._observer, self.valid
        view = PrefillView(layer, len(self.parts.layers), valid, self.image, hidden=hidden)
        view.memory, view.origin, view.weights = self.memory, self.origin, self.weights
        view.host = self.known.view
        if ACTIVATIONS in needs and layer >= 0:
            view.activations = self._activations
            view.down_proj = weight_of(self.parts.down_projs[layer])
        if self._ffn is not None and self._activations is not None:
            view.inputs = self._ffn.inputs if INPUTS in needs else None
            view.gate = self._ffn.gate(self._activations) if GATE in needs else None
        if VISION in needs and self.tower is not None:
            view.vision = self.tower.show(self.image)
        if EMBEDDINGS in needs and self._embeddings is not None:
            whole = not self.shortened
            shown = self._embeddings if whole else take(self._embeddings, self.origin)
            view.embeddings = shown.to(valid.device)
        if ATTENTION in needs and observer is not None:
            view.attention = functools.partial(observer.rows, valid=valid)
        if CONTRIBUTIONS in needs and observer is not None:
            view.contributions = lambda: observer.contributions(view.last, valid)
        return view

    @torch.no_grad()
    def _cut(self, layer: int, hidden: Tensor) -> Tensor:
        """Drop tokens after ``layer``; hidden states (B, K, d) to (B, K', d) of the survivors."""
        assert self.method.tokens is not None
        choice = self.method.tokens.choose(self._view(layer, hidden, self.token_needs))
        check_tokens(choice, self.valid, hidden, layer)
        if choice.weights is not None and not can_weigh(self.parts.config):
            choice = replace(choice, weights=None)
        merged = hidden if choice.hidden is None else choice.hidden.to(hidden)
        weights = self.weights if choice.weights is None else choice.weights
        most = self.known.follow(choice, self.image)
        left = find_survivors(choice.keep, self.valid, self.image, self.origin, weights, most)
        choice = replace(choice, keep=left.keep, hidden=None)
        self.selection.stages.append(Stage(layer, self.origin, self.valid, choice))
        order, self.origin = left.order, left.origin
        self.image, self.valid = left.image, left.valid
        self.weights, self.log_weights = left.weights, left.log_weights
        compact(self.cache, layer + 1, order)
        self.shortened = True
        if self._waiting and layer == self.cuts[-1]:
            self._choose_waiting()
        self._inputs.forget()
        self._left = None
        self._gate_requested = None
        return take(merged, order)
