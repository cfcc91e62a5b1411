"""Brings one layer's weights at a time into fast memory, the next layer's while it works."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .offload_source import Source

ALIGNMENT = 64
SLOTS = 2


@dataclass
class Outside:
    """A weight that is not in fast memory.

    Attributes
    ----------
    parameter : nn.Parameter
        Its place in the model. While the weight is away, the parameter has its shape, dtype and
        device, takes one number of memory, and is NaN all over.
    source : Source
        Where the weight is.
    """

    parameter: nn.Parameter
    source: Source

    @property
    def nbytes(self) -> int:
        """Bytes in fast memory."""
        return self.parameter.numel() * self.parameter.element_size()

    def put_away(self) -> None:
        """Take the weight out of fast memory."""
        old = self.parameter
        self.parameter.data = blank(old.shape, old.dtype, old.device)

    def bring_back(self) -> None:
        """Put the weight into fast memory of its own, for good."""
        with torch.inference_mode(False), torch.no_grad():
            old = self.parameter
            fresh = torch.empty(tuple(old.shape), dtype=old.dtype, device=old.device)
            self.source.copy_to(fresh)
            self.parameter.data = fresh


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN in any shape, in the memory of one number."""
    with torch.inference_mode(False):
        return torch.full((1,), torch.nan, dtype=dtype, device=device).expand(tuple(shape))


def is_blank(tensor: Tensor) -> bool:
    """Whether a tensor is one of `blank`'s."""
    return tensor.untyped_storage().nbytes() == tensor.element_size() < tensor.nbytes


@dataclass
class Slot:
    """Fast memory for one layer's weights."""

    memory: Tensor
    views: dict[int, list[Tensor]] = field(default_factory=dict)
    layer: int | None = None
    loading: Future[None] | None = None
    ready: Any = None
    free: Any = None


class LayerStream:
    """Shows layers their weights, one layer at a time.

    Parameters
    ----------
    layers : dict
        The weights of each layer, in the order in which a prompt runs through them.
    device : torch.device
        Where the layers run.

    Attributes
    ----------
    streamed : int
        Bytes brought in so far.
    """

    def __init__(self, layers: Mapping[int, Sequence[Outside]], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.streamed = 0
        order = list(layers)
        self._next = dict(itertools.pairwise(order))
        self._first = order[0] if order else None
        self._bound: int | None = None
        with torch.inference_mode(False):
            self._slots = [self._make_slot() for _ in range(min(SLOTS, len(order)))]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="corematching-weights")
        cuda = device.type == "cuda"
        self._side: Any = torch.cuda.Stream(device) if cuda else None

    @contextmanager
    def present(self, layer: int) -> Iterator[None]:
        """The layer's weights are in its parameters for as long as the block lasts."""
        if self._bound == layer:
            yield
            return
        slot = self._wait_for(layer)
        self._bound = layer
        for outside, view in zip(self.layers[layer], slot.views[layer], strict=True):
            outside.parameter.data = view
        try:
            following = self._next.get(layer)
            if following is not None:
                self._start(following)
            yield
        finally:
            for outside in self.layers[layer]:
                outside.put_away()
            self._bound = None
            if self._side is not None:
                slot.free = torch.cuda.current_stream(self.device).record_event()

    def expect_prompt(self) -> None:
        """Begin to bring in the first layer."""
        if self._first is not None:
            self._start(self._first)

    def close(self) -> None:
        """Wait for what is under way, and free the slots."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._slots.clear()

    def _make_slot(self) -> Slot:
        size = max(_layer_bytes([o.parameter for o in own]) for own in self.layers.values())
        slot = Slot(torch.zeros(size, dtype=torch.uint8, device=self.device))
        for layer, weights in self.layers.items():
            offset, views = 0, []
            for outside in weights:
                piece = slot.memory[offset : offset + outside.nbytes]
                views.append(piece.view(outside.parameter.dtype).view(outside.parameter.shape))
                offset += _align(outside.nbytes)
            slot.views[layer] = views
        return slot

    def _wait_for(self, layer: int) -> Slot:
        """The slot that holds the layer, once it is filled."""
        slot = self._start(layer)
        try:
            if slot.loading is not None:
                slot.loading.result()
        except BaseException:
            slot.layer = None
            raise
        finally:
            slot.loading = None
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        return slot

    def _start(self, layer: int) -> Slot:
        """Begin to fill a slot with a layer, unless one holds it already."""
        for slot in self._slots:
            if slot.layer == layer:
                return slot
        unused = [s for s in self._slots if s.layer is None or s.layer != self._bound]
        idle = [s for s in unused if s.loading is None]
        slot = (idle or unused)[0]
        slot.layer = layer
        self.streamed += sum(outside.nbytes for outside in self.layers[layer])
        if self._side is None:
            slot.loading = self._worker.submit(self._read, layer, slot.views[layer])
        else:
            self._copy(layer, slot)
        return slot

    def _read(self, layer: int, views: list[Tensor]) -> None:
        with torch.no_grad():
            for outside, view in zip(self.layers[layer], views, strict=True):
                outside.source.copy_to(view)

    def _copy(self, layer: int, slot: Slot) -> None:
        """Copy a layer on the side stream, once the layer before is done with the slot."""
        if slot.free is not None:
            self._side.wait_event(slot.free)
        with torch.cuda.stream(self._side):
            self._read(layer, slot.views[layer])
            slot.ready = self._side.record_event()


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _layer_bytes(weights: Sequence[Tensor]) -> int:
    return sum(_align(weight.numel() * weight.element_size()) for weight in weights)


def slot_bytes(layers: Mapping[int, Sequence[Tensor]]) -> int:
    """Bytes of all the slots that a stream of these layers has."""
    sizes = [_layer_bytes(weights) for weights in layers.values()]
    return min(SLOTS, len(sizes)) * max(sizes, default=0)
