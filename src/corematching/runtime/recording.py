"""Lets several methods share what the layers of one prompt compute before any of them chooses.

`record_prompt` watches a prompt that keeps everything. Inside `replay_prompt`, the layers up to a
method's first cut give back what was recorded for the same prompt instead of computing it again;
policies and caches see what they always see. What a layer shows to attention probes is not
recorded, so such layers run.
Shapes: B samples, T tokens of the prompt, d hidden size, F intermediate neurons, G heads for keys
and values, D their size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from corematching.errors import InputError
from corematching.model.hooks import run_pre_hooks
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec
from corematching.protocol import VISION
from corematching.runtime.attach import Run


@dataclass
class Recording:
    """What the layers of one prompt computed; of the first ones where a later one cannot be kept.

    Attributes
    ----------
    start : Tensor or None
        (B, T, d), what entered the first layer.
    outputs : list of Tensor
        (B, T, d) each.
    keys, values : list of Tensor
        (B, G, T, D) each.
    inputs, activations : list of Tensor
        (B, T, d) and (B, T, F) each, of the FFNs; empty where they were not asked for.
    features : Any
        What the model's ``get_image_features`` gave; None where it was not called.
    """

    start: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    activations: list[Tensor] = field(default_factory=list)
    features: Any = None
    whole: bool = True

    def add_layer(self, index: int, output: Any, cache: Any) -> None:
        """Keep what a layer gave, if all layers before were kept and its cache stores all of it."""
        layer: Any = None if cache is None else cache.layers[index]
        plain = isinstance(output, Tensor) and type(layer) is DynamicLayer
        if not self.whole or not plain or layer.keys.shape[2] != output.shape[1]:
            self.whole = False
            return
        self.outputs.append(output.clone())
        self.keys.append(layer.keys)
        self.values.append(layer.values)


@contextmanager
def record_prompt(run: Run, activations: bool = False, inputs: bool = False) -> Iterator[Recording]:
    """Record the prompt that the model reads in this block.

    Parameters
    ----------
    run : Run
        Of a method that keeps all tokens, on the model.
    activations : bool
        Keep the FFNs' activations too, for methods that choose neurons.
    inputs : bool
        Keep what enters the FFNs too, for methods that read it or the gate.
    """
    parts, recording = run._session.parts, Recording()
    handles = []
    for index, layer in enumerate(parts.layers):
        see = functools.partial(_see_layer, recording, index)
        handles.append(layer.register_forward_hook(see, with_kwargs=True))
        if activations:
            keep = functools.partial(_see_input, recording.activations)
            handles.append(parts.down_projs[index].register_forward_pre_hook(keep))
        if inputs:
            keep = functools.partial(_see_input, recording.inputs)
            handles.append(parts.ffns[index].register_forward_pre_hook(keep))
    patches = Patches()
    if _has_features(run.model):
        patches.wrap(run.model.base_model, "get_image_features", _keep_features(recording))
    try:
        yield recording
    finally:
        patches.undo()
        for handle in handles:
            handle.remove()


@contextmanager
def replay_prompt(run: Run, recording: Recording) -> Iterator[None]:
    """Spare the model what was recorded of the prompt that it reads in this block.

    Parameters
    ----------
    run : Run
        Of a method on the same model.
    recording : Recording
        Of the same prompt; another one is refused when the model reads it.
    """
    parts, policy = run._session.parts, run.method.tokens
    depth = len(parts.layers)
    cuts = () if policy is None else policy.drop_after(depth)
    last = min(cuts, default=depth - 1)
    replay, patches = _Replay(parts, recording), Patches()
    for index, layer in enumerate(parts.layers[: min(last + 1, len(recording.outputs))]):
        patches.wrap(layer, "forward", functools.partial(replay.run_layer, index))
    needs = frozenset() if policy is None else policy.needs
    if recording.features is not None and VISION not in needs:
        features = recording.features
        patches.wrap(
            run.model.base_model, "get_image_features", lambda original, *args, **kwargs: features
        )
    try:
        yield
    finally:
        patches.undo()


class _Replay:
    """Gives back what was recorded, layer by layer."""

    def __init__(self, parts: ModelSpec, recording: Recording) -> None:
        self.parts, self.recording = parts, recording

    def run_layer(self, index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What the layer gave in the recording; what it gives now, where that may be another."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache: Any = kwargs.get("past_key_values")
        kept = self.recording
        fresh = cache is not None and not cache.get_seq_length(index)
        if not fresh or hidden.shape[1] == 1:
            return original(*args, **kwargs)
        if index == 0 and (kept.start is None or not torch.equal(hidden, kept.start)):
            raise InputError("the recording is of another prompt: record this one first")
        if not self._shows_enough(index):
            return original(*args, **kwargs)
        cache.update(kept.keys[index], kept.values[index], index)
        ffn, down = self.parts.ffns[index], self.parts.down_projs[index]
        if ffn._forward_pre_hooks:
            run_pre_hooks(ffn, kept.inputs[index])
        if down._forward_pre_hooks:
            run_pre_hooks(down, kept.activations[index])
        return kept.outputs[index]

    def _shows_enough(self, index: int) -> bool:
        """Whether all that somebody watches of this layer was recorded."""
        layer, ffn = self.parts.layers[index], self.parts.ffns[index]
        down = self.parts.down_projs[index]
        for module in layer.modules():
            if module is layer:
                continue
            if module._forward_hooks:
                return False
            if module._forward_pre_hooks and module is not ffn and module is not down:
                return False
        if ffn._forward_pre_hooks and index >= len(self.recording.inputs):
            return False
        return not down._forward_pre_hooks or index < len(self.recording.activations)


def _see_layer(
    recording: Recording, index: int, _: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    if index == 0:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        recording.start = hidden.clone()
    recording.add_layer(index, output, kwargs.get("past_key_values"))


def _see_input(kept: list[Tensor], _: nn.Module, args: tuple[Any, ...]) -> None:
    kept.append(args[0])


def _keep_features(recording: Recording) -> Any:
    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        recording.features = original(*args, **kwargs)
        return recording.features

    return around


def _has_features(model: Any) -> bool:
    return hasattr(getattr(model, "base_model", None), "get_image_features")
