"""Shows every decoder layer of one forward pass, with nothing dropped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corematching.errors import AlreadyInstalledError, ConfigError, InputError
from corematching.methods import Sparsifier
from corematching.model.patching import Patches
from corematching.protocol import PrefillView
from corematching.runtime import check_model, is_attached
from corematching.runtime.prefill.prompt import read_prompt
from corematching.runtime.prefill.view import AttentionObserver

Look = Callable[[PrefillView], None]


def watch_layers(
    model: Any, inputs: Mapping[str, Any], look: Look, layers: Collection[int] | None = None
) -> None:
    """Run a prompt and show each of its layers, whole, as soon as it has run.

    A view holds what the layer's own modules computed: activations, attention rows and
    contributions on request, hidden states and input embeddings. It is valid during the call
    only.

    Parameters
    ----------
    model : PreTrainedModel
        A model without a method.
    inputs : mapping
        The processor's output: ``input_ids``, pixels and the rest.
    look : callable
        Gets one view after the other.
    layers : collection of int, optional
        The layers to show, counted from 0. Default: all.

    Raises
    ------
    InputError
        The prompt holds no image token.
    ConfigError
        The model does not have one of the layers.
    AlreadyInstalledError
        A method is installed on the model, and would drop tokens.
    UnsupportedModelError
        The model's layers cannot be watched.
    """
    if is_attached(model):
        raise AlreadyInstalledError(
            f"a method is installed on this {type(model).__name__}: remove it before you analyze"
        )
    parts = check_model(model, Sparsifier())
    wanted = check_layers(layers, len(parts.layers))
    valid, image = read_prompt(model, dict(inputs), parts.image_ids, inputs["input_ids"].shape[1])
    if not image.any():
        raise InputError("the prompt holds no image token: give a picture and a model that sees it")
    watcher = _Watcher(parts, valid, image, look)
    try:
        watcher.install(wanted)
        with torch.inference_mode():
            model(**inputs, use_cache=False)
    finally:
        watcher.remove()


def check_layers(layers: Collection[int] | None, depth: int) -> list[int]:
    """The layers to look at, ascending; all of them for None.

    Raises
    ------
    ConfigError
        One of them does not exist, or there is none.
    """
    wanted = sorted(set(range(depth) if layers is None else layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= depth:
        raise ConfigError(f"layers {wanted}: the model has the layers 0 to {depth - 1}")
    return wanted


class _Watcher:
    """The hooks of one forward pass."""

    def __init__(self, parts: Any, valid: Tensor, image: Tensor, look: Look) -> None:
        self.parts, self.valid, self.image, self.look = parts, valid, image, look
        self.memory: dict[type, Any] = {}
        self._patches = Patches()
        self._observer: AttentionObserver | None = None
        self._activations: Tensor | None = None
        self._embeddings: Tensor | None = None

    def install(self, layers: Collection[int]) -> None:
        first = self.parts.layers[0]
        self._patches.add_pre_hook(first, self._begin, with_kwargs=True)
        for index in layers:
            attention = self.parts.attentions[index]
            self._patches.add_pre_hook(attention, functools.partial(self._arm, attention))
            self._patches.add_pre_hook(self.parts.down_projs[index], self._keep)
            show = functools.partial(self._show, index)
            self._patches.add_hook(self.parts.layers[index], show)

    def remove(self) -> None:
        self._patches.undo()
        if self._observer is not None:
            self._observer.disarm()
        self._observer = self._activations = self._embeddings = None

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._embeddings = args[0] if args else kwargs["hidden_states"]

    def _arm(self, attention: nn.Module, *_: Any) -> None:
        self._observer = AttentionObserver(attention)
        self._observer.arm()

    def _keep(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._activations = args[0]

    def _show(self, index: int, _: nn.Module, args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        valid, image = self.valid.to(hidden.device), self.image.to(hidden.device)
        observer = self._observer
        assert observer is not None
        view = PrefillView(
            layer=index,
            num_layers=len(self.parts.layers),
            valid=valid,
            image=image,
            activations=self._activations,
            hidden=hidden,
            embeddings=self._embeddings,
            attention=functools.partial(observer.rows, valid=valid),
            down_proj=getattr(self.parts.down_projs[index], "weight", None),
            memory=self.memory,
        )
        view.contributions = lambda: observer.contributions(view.last, valid)
        self.look(view)
        self._observer = self._activations = None
