"""Streams weights into fast memory layer by layer, and prefetches the next layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corematching.offload.weight import Outside

ALIGNMENT = 64
SLOTS = 2


@dataclass
class Slot:
    """A buffer in fast memory for one layer's weights.

    Attributes
    ----------
    memory : Tensor
        The buffer, in bytes.
    views : dict
        The weights' views of the buffer, by layer.
    layer : int or None
        The layer that it holds or loads; set once loading has begun.
    filled : bool
        Whether loading has finished (GPU: is enqueued up to the event ``ready``).
    loading : Future or None
        The read of the layer (CPU).
    ready, free : Any
        Events (GPU): the layer has arrived; its last use is over.
    """

    memory: Tensor
    views: dict[int, list[Tensor]] = field(default_factory=dict)
    layer: int | None = None
    filled: bool = False
    loading: Future[None] | None = None
    ready: Any = None
    free: Any = None


class LayerStream:
    """Puts weights into the parameters of one layer at a time.

    It stays usable after an exception or an interrupt at any point: a layer's weights are shown
    only after all of them have arrived, and a context that was never left ends with the next one.

    Parameters
    ----------
    layers : dict
        The weights of each layer, in the order of the forward pass.
    device : torch.device
        The layers' device.

    Attributes
    ----------
    streamed : int
        Bytes streamed so far.
    """

    def __init__(self, layers: Mapping[int, Sequence[Outside]], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.streamed = 0
        order = list(layers)
        self._next = dict(itertools.pairwise(order))
        self._first = order[0] if order else None
        self._shown: int | None = None  # the layer with all weights in its parameters
        self._touched: int | None = None  # the layer that may have some of them
        with torch.inference_mode(False):
            self._slots = [self._make_slot() for _ in range(min(SLOTS, len(order)))]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="corematching-weights")
        cuda = device.type == "cuda"
        self._side: Any = torch.cuda.Stream(device) if cuda else None

    def present(self, layer: int) -> AbstractContextManager[None]:
        """A context in which the layer's weights are in its parameters."""
        return _Present(self, layer)

    def show(self, layer: int) -> bool:
        """Put the layer's weights into its parameters; False if they are there already."""
        if self._shown == layer:
            return False
        self.hide()
        slot = self._wait_for(layer)
        self._touched = layer
        try:
            for outside, view in zip(self.layers[layer], slot.views[layer], strict=True):
                outside.show(view)
            self._shown = layer
            following = self._next.get(layer)
            if following is not None:
                self._start(following)
        except BaseException:
            self.hide()
            raise
        return True

    def hide(self) -> None:
        """Take the shown weights out of their parameters."""
        self._shown = None
        if self._touched is None:
            return
        for outside in self.layers[self._touched]:
            outside.put_away()
        if self._side is not None:
            done = torch.cuda.current_stream(self.device).record_event()
            for slot in self._slots:
                slot.free = done if slot.layer == self._touched else slot.free
        self._touched = None

    def expect_prompt(self) -> None:
        """Begin to load the first layer."""
        self.hide()
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        if self._first is not None:
            self._start(self._first)

    def close(self) -> None:
        """Wait for pending loads, and free the slots."""
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
        """The slot with the layer, after its load has finished."""
        slot = self._start(layer)
        if not slot.filled:
            try:
                assert slot.loading is not None
                slot.loading.result()
            except BaseException:
                slot.layer = None
                raise
            slot.filled = True
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        return slot

    def _start(self, layer: int) -> Slot:
        """Begin to load a layer into a slot, unless one holds it already."""
        for slot in self._slots:
            if slot.layer == layer:
                return slot
        unused = [s for s in self._slots if s.layer is None or s.layer != self._touched]
        idle = [s for s in unused if s.layer is None or s.filled]
        slot = (idle or unused)[0]
        slot.layer, slot.filled = None, False
        if self._side is None:
            slot.loading = self._worker.submit(self._read, layer, slot.views[layer])
        else:
            self._copy(layer, slot)
            slot.filled = True
        self.streamed += sum(outside.nbytes for outside in self.layers[layer])
        slot.layer = layer
        return slot

    def _read(self, layer: int, views: list[Tensor]) -> None:
        with torch.no_grad():
            for outside, view in zip(self.layers[layer], views, strict=True):
                outside.source.copy_to(view)

    def _copy(self, layer: int, slot: Slot) -> None:
        """Copy a layer on the side stream, after the slot's previous layer has finished."""
        if slot.free is not None:
            self._side.wait_event(slot.free)
        with torch.cuda.stream(self._side):
            self._read(layer, slot.views[layer])
            slot.ready = self._side.record_event()


class _Present(AbstractContextManager[None]):
    """The context of `LayerStream.present`.

    Not a generator: a suspended one would run its end at garbage collection, perhaps after the
    weights are back in the model for good.
    """

    def __init__(self, stream: LayerStream, layer: int) -> None:
        self._stream, self._layer, self._shows = stream, layer, False

    def __enter__(self) -> None:
        self._shows = self._stream.show(self._layer)

    def __exit__(self, *_: Any) -> None:
        if self._shows:
            self._stream.hide()


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _layer_bytes(weights: Sequence[Tensor]) -> int:
    return sum(_align(weight.numel() * weight.element_size()) for weight in weights)


def slot_bytes(layers: Mapping[int, Sequence[Tensor]]) -> int:
    """Bytes of all slots of a stream of these layers."""
    sizes = [_layer_bytes(weights) for weights in layers.values()]
    return min(SLOTS, len(sizes)) * max(sizes, default=0)
