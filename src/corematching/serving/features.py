"""Vision features of pictures that were seen before."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from corematching.model.patching import Patches
from corematching.protocol import VISION, Method
from corematching.serving.observer import Observer

UNREAD = ("last_hidden_state", "hidden_states", "attentions")
"""What a vision tower gives besides the features that go into the prompt."""


class FeatureCache:
    """Keeps the features of the pictures of recent prompts; those unused for longest go first.

    A question about the same pictures, or a further turn of their chat, does not run the vision
    tower again and reads the same features. The key is a hash of what the processor gave: pixels,
    sizes, and options.

    Parameters
    ----------
    model : PreTrainedModel
    memory : int
        Bytes of features; 0: none are kept.
    observer : Observer
        Told what was found.

    Attributes
    ----------
    used : int
        Bytes of features now.
    """

    def __init__(self, model: Any, memory: int, observer: Observer) -> None:
        self.owner = getattr(model, "base_model", None)
        self.memory, self.observer, self.used = memory, observer, 0
        self._known: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

    @contextmanager
    def use(self, method: Method) -> Iterator[None]:
        """Let the prompt that runs in this block find its features here.

        A method that reads the vision tower makes it run.
        """
        reads = method.tokens is not None and VISION in method.tokens.needs
        if not self.memory or reads or not hasattr(self.owner, "get_image_features"):
            yield
            return
        patches = Patches()
        patches.wrap(self.owner, "get_image_features", self._find)
        try:
            yield
        finally:
            patches.undo()

    def _find(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        key = _key([*args, *(part for pair in sorted(kwargs.items()) for part in pair)])
        if key is None:
            return original(*args, **kwargs)
        found = self._known.get(key)
        self.observer.on_pictures(found is not None)
        if found is not None:
            self._known.move_to_end(key)
            return found[0]
        features = _only_features(original(*args, **kwargs))
        size = sum(tensor.nbytes for tensor in _tensors(features))
        if size <= self.memory:
            self._known[key], self.used = (features, size), self.used + size
        while self.used > self.memory:
            _, (_, gone) = self._known.popitem(last=False)
            self.used -= gone
        return features


def _only_features(output: Any) -> Any:
    if not isinstance(output, ModelOutput):
        return output
    return type(output)(**{name: x for name, x in output.items() if name not in UNREAD})


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an output, however they are nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _key(parts: Iterable[Any]) -> bytes | None:
    """A hash of tensors and plain values; None where there is anything else."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype} ".encode())
            digest.update(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        elif part is None or isinstance(part, bool | int | float | str):
            digest.update(f"{part!r} ".encode())
        elif isinstance(part, list | tuple) and all(isinstance(x, int) for x in part):
            digest.update(f"{list(part)} ".encode())
        else:
            return None
    return digest.digest()
