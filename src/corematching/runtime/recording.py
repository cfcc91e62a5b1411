"""Records a dense prompt and replays it for several methods, up to each one's first cut.

`record_prompt` records a prompt without dropped tokens. Inside `replay_prompt`, the layers up to a
method's first cut return their recorded outputs for the same prompt; policies and caches see the
usual tensors. Queries are not recorded, so layers with an attention observer run.
Shapes: B samples, T tokens of the prompt, d hidden size, F intermediate neurons, G key-value heads,
D head dimension.
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
from corematching.model.layer_inputs import find_cache
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec
from corematching.protocol import VISION
from corematching.runtime.attach import Run


@dataclass
class Recording:
    """The tensors of one prompt's layers, up to the first layer that cannot be recorded.

    Attributes
    ----------
    start : Tensor or None
        (B, T, d), the input of the first layer.
    outputs : list of Tensor
        (B, T, d) each.
    keys, values : list of Tensor
        (B, G, T, D) each.
    inputs, activations : list of Tensor
        (B, T, d) and (B, T, F) each, of the FFNs; empty unless requested.
    features : Any
        The output of ``get_image_features``; None where it was not called.
    whole : bool
        Whether all layers so far were recorded.
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
        """Record a layer's output, unless an earlier layer or its cache is incomplete."""
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
    """Record the prompt that runs in this block.

    Parameters
    ----------
    run : Run
        A method that keeps all tokens, installed on the model.
    activations : bool
        Also record the FFNs' activations, for methods that choose neurons.
    inputs : bool
        Also record the FFNs' inputs, for methods that read them or the gate.
    """
    parts, recording, patches = run._session.parts, Recording(), Patches()
    for index, layer in enumerate(parts.layers):
        see = functools.partial(_see_layer, recording, index)
        patches.add_hook(layer, see, with_kwargs=True)
        if activations:
            keep = functools.partial(_see_input, recording.activations)
            patches.add_pre_hook(parts.down_projs[index], keep)
        if inputs:
            keep = functools.partial(_see_input, recording.inputs)
            patches.add_pre_hook(parts.ffns[index], keep)
    if _has_features(run.model):
        patches.wrap(run.model.base_model, "get_image_features", _keep_features(recording))
    try:
        yield recording
    finally:
        patches.undo()


@contextmanager
def replay_prompt(run: Run, recording: Recording) -> Iterator[None]:
    """Replay recorded layers for the prompt that runs in this block.

    Another prompt raises `InputError` at its first layer.

    Parameters
    ----------
    run : Run
        A method installed on the same model.
    recording : Recording
        The recording of the same prompt.
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
    """Replays the recorded layers one by one."""

    def __init__(self, parts: ModelSpec, recording: Recording) -> None:
        self.parts, self.recording = parts, recording

    def run_layer(self, index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's recorded output, or its own forward where that may differ."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache: Any = find_cache(kwargs)
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
        """Whether the recording serves every hook inside this layer."""
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
    recording.add_layer(index, output, find_cache(kwargs))


def _see_input(kept: list[Tensor], _: nn.Module, args: tuple[Any, ...]) -> None:
    kept.append(args[0])


def _keep_features(recording: Recording) -> Any:
    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        recording.features = original(*args, **kwargs)
        return recording.features

    return around


def _has_features(model: Any) -> bool:
    return hasattr(getattr(model, "base_model", None), "get_image_features")
