"""FFN weights outside fast memory: prompts stream them, decode steps use the chosen neurons.

While a layer's weights are in memory for the prompt, its neurons are chosen and copied. Afterwards
the layer after next reuses the buffer. Dense layers stay in memory.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn

from corematching.backends.sparse_ffn import SparseFFN
from corematching.errors import AlreadyInstalledError, ConfigError, CoreMatchingError, InputError
from corematching.memory_meter import MemoryMeter
from corematching.model.spec import ModelSpec
from corematching.offload.ffn import StreamedFFN
from corematching.offload.guard import WeightGuard
from corematching.offload.memory import MemoryPlan, MemoryUse, bytes_of
from corematching.offload.source import Scratch, Source, pin
from corematching.offload.stream import LayerStream, slot_bytes
from corematching.offload.weight import Outside, blank
from corematching.sizes import format_size, parse_size

log = logging.getLogger(__name__)

FFN_TENSORS, LAYER_TENSORS, SCORE_TENSORS = 3, 8, 2
"""Tensors of a layer during a prompt: of its FFN's width, of the hidden size, and of scores."""

# Models that were loaded without their FFNs: the source of each FFN weight, and the cap.
loaded_outside: weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, Source], int]] = (
    weakref.WeakKeyDictionary()
)


def find_offload(model: nn.Module, memory: str | int | None) -> Offload | None:
    """The offload of a model with a memory cap, given here or at loading; None without a cap.

    Raises
    ------
    ConfigError
        ``memory`` is no size.
    """
    if memory is not None:
        return Offload(model, parse_size("memory", memory))
    return Offload(model, loaded_outside[model][1]) if model in loaded_outside else None


class Offload:
    """Keeps one model's FFN weights outside fast memory while a method is on it.

    Parameters
    ----------
    model : nn.Module
        The model, whole or loaded without its FFNs.
    cap : int
        Cap on the model's fast memory, in bytes.

    Attributes
    ----------
    use : MemoryUse or None
        Memory of the latest run.
    """

    def __init__(self, model: nn.Module, cap: int) -> None:
        self.cap = cap
        self.use: MemoryUse | None = None
        self._model = weakref.ref(model)
        self._sources = loaded_outside[model][0] if model in loaded_outside else {}
        self._swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._places: dict[int, Outside] = {}
        self._moved: list[Outside] = []
        self._guard: WeightGuard | None = None
        self._stream: LayerStream | None = None
        self._scratch: Scratch | None = None
        self._ffns: dict[int, StreamedFFN] = {}

    def check_engine(self, engine: str) -> str:
        """The engine under a cap: always ``torch``.

        Raises
        ------
        ConfigError
            ``native`` was requested.
        """
        if engine == "native":
            raise ConfigError(
                "engine='native' reads all weights in place, but under a cap on memory only the "
                "chosen neurons are there: leave engine at 'auto', or memory out"
            )
        return "torch"

    def prepare(self) -> None:
        """Replace weights that were never loaded by placeholders of their shape, dtype and device.

        From here on `remove` has something to undo.
        """
        model = self._model()
        if not self._sources or model is None:
            return
        device = next(p.device for p in model.parameters() if not p.is_meta)
        for path, owner in model.named_modules():
            for name, old in list(owner._parameters.items()):
                source = self._sources.get(f"{path}.{name}")
                if old is None or not old.is_meta or source is None:
                    continue
                fresh = nn.Parameter(blank(old.shape, old.dtype, device), requires_grad=False)
                self._places[id(fresh)] = Outside(fresh, source)
                self._places[id(fresh)].put_away()
                self._swapped.append((owner, name, old))
                owner._parameters[name] = fresh

    def make_ffns(self, parts: ModelSpec, counts: dict[int, int]) -> dict[int, SparseFFN]:
        """The sparse FFNs of the layers with chosen neurons; ``counts`` has their neuron counts.

        Raises
        ------
        MemoryCapError
            The model does not fit under the cap.
        """
        weights = {index: _matrices(parts.ffns[index]) for index in counts}
        self.device = next(parts.layers[0].parameters()).device
        self._meter, self._held = MemoryMeter(self.device), 0
        self.plan = self._reckon(parts, counts, weights)
        self.plan.check()
        if self._sources:
            self._open_stream(weights)
            self._load_dense(parts, counts)
        for index, count in counts.items():
            with self.present(index) if not self._ffns else nullcontext():
                self._ffns[index] = StreamedFFN(parts.ffns[index], count, self._presence(index))
        self._parts = parts
        return dict(self._ffns)

    def present(self, layer: int) -> AbstractContextManager[None]:
        """A context in which a layer's weights are in its parameters."""
        return nullcontext() if self._stream is None else self._stream.present(layer)

    def install(self) -> None:
        """Move the FFNs of a whole model out of fast memory."""
        weights = {i: _matrices(self._parts.ffns[i]) for i in self._ffns}
        model = self._model()
        assert model is not None
        away = [parameter for own in weights.values() for parameter in own]
        make_error = functools.partial(_outside_error, model, self.cap)
        self._guard = WeightGuard(model, away, make_error)
        self._guard.install()
        if self._stream is None and self._ffns:
            self._move(weights)
        log.info(
            "FFN weights outside: %s stay in memory, %s under the cap of %s",
            format_size(self.plan.resident),
            format_size(self.plan.check()),
            format_size(self.cap),
        )

    def remove(self) -> None:
        """Restore the model and free everything; may run again after an interrupt."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        while self._moved:
            self._moved[-1].bring_back()
            self._moved.pop()
        while self._swapped:
            owner, name, parameter = self._swapped[-1]
            owner._parameters[name] = parameter
            self._swapped.pop()
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        self._places.clear()
        self._ffns = {}
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def start_prompt(self, samples: int, length: int, total: int, cache_bytes: int) -> None:
        """Plan a prompt's memory and begin to stream the first layer.

        Parameters
        ----------
        samples, length : int
            The prompt's shape.
        total : int
            Tokens of prompt and answer; 0 where unknown.
        cache_bytes : int
            Bytes of keys and values per token and sample.

        Raises
        ------
        MemoryCapError
            The prompt does not fit under the cap.
        """
        cache = samples * max(length, total) * cache_bytes
        need = self.plan.check(samples, cache, self._work_bytes(samples, length))
        streamed = 0 if self._stream is None else self._stream.streamed
        self.use = MemoryUse(self.plan, need, cache, streamed)
        self._held = self.plan.resident + self.plan.slots + self._copied_bytes()
        self._meter.reset()
        if self._stream is not None and length > 1:
            self._stream.expect_prompt()

    def measure(self, use: MemoryUse | None) -> None:
        """Update the memory of a run, if it is the latest one."""
        if use is None or use is not self.use:
            return
        if self._stream is not None:
            use.streamed = self._stream.streamed - use.streamed_before
        use.chosen = max(use.chosen, self._copied_bytes())
        use.peak = max(use.peak, self._meter.peak_with(self._held))
        if use.peak > self.cap:
            log.warning(
                "the model took %s, more than memory=%s: leave some room for what a prompt works "
                "with, such as the vision tower",
                format_size(use.peak),
                format_size(self.cap),
            )

    def _reckon(
        self, parts: ModelSpec, counts: dict[int, int], weights: dict[int, list[nn.Parameter]]
    ) -> MemoryPlan:
        model = self._model()
        assert model is not None
        layers = {index: bytes_of(own) for index, own in weights.items()}
        moved = bytes_of(parameter for own in weights.values() for parameter in own)
        whole = bytes_of([*model.parameters(), *model.buffers()])
        chosen = sum(
            -(-size * counts[index] // parts.widths[index]) for index, size in layers.items()
        )
        return MemoryPlan(self.cap, whole - moved, slot_bytes(weights), chosen)

    def _open_stream(self, weights: dict[int, list[nn.Parameter]]) -> None:
        """Open the stream of a model that was loaded without its FFNs."""
        layers = {i: [self._places[id(p)] for p in own] for i, own in weights.items()}
        self._stream = LayerStream(layers, self.device)

    def _load_dense(self, parts: ModelSpec, counts: dict[int, int]) -> None:
        """Load the FFNs of the layers that keep all their neurons."""
        for index, ffn in enumerate(parts.ffns):
            for parameter in _matrices(ffn) if index not in counts else ():
                self._places[id(parameter)].bring_back()

    def _move(self, weights: dict[int, list[nn.Parameter]]) -> None:
        """Move the layers of a whole model out of fast memory, one after the other."""
        on_disk = self.device.type == "cpu"
        if on_disk:
            self._scratch = Scratch(sum(bytes_of(own) for own in weights.values()))
        outside: dict[int, Outside] = {}
        for own in weights.values():
            fresh = [parameter for parameter in own if id(parameter) not in outside]
            sources: Sequence[Source]
            if self._scratch is not None:
                sources = self._scratch.write(fresh)
            else:
                sources = [pin(parameter, parameter.dtype) for parameter in fresh]
            for parameter, source in zip(fresh, sources, strict=True):
                outside[id(parameter)] = Outside(parameter, source)
                self._moved.append(outside[id(parameter)])
                self._moved[-1].put_away()
        layers = {index: [outside[id(p)] for p in own] for index, own in weights.items()}
        self._stream = LayerStream(layers, self.device)

    def _presence(self, index: int) -> Callable[[], AbstractContextManager[None]]:
        return functools.partial(self.present, index)

    def _copied_bytes(self) -> int:
        return sum(ffn.copied_bytes for ffn in self._ffns.values())

    def _work_bytes(self, samples: int, length: int) -> int:
        """Bytes of a layer's activations for a prompt, and of the scores of its neurons."""
        weight = next(self._parts.layers[0].parameters())
        width, hidden = max(self._parts.widths), int(self._parts.config.hidden_size)
        each = (FFN_TENSORS * width + LAYER_TENSORS * hidden) * weight.element_size()
        work = samples * length * (each + SCORE_TENSORS * width * torch.float32.itemsize)
        return work + self._packed_bytes(weight.dtype)

    def _packed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the largest matrix, which CPUs repack for 16-bit products of single rows."""
        if self.device.type != "cpu" or dtype == torch.float32:
            return 0
        model = self._model()
        assert model is not None
        return max(bytes_of([p]) for p in model.parameters())


def _outside_error(model: nn.Module, cap: int, what: str) -> CoreMatchingError:
    """The error for an operation that needs weights that a method keeps outside memory."""
    if model in loaded_outside:
        return loaded_outside_error(type(model).__name__, what)
    return AlreadyInstalledError(
        f"{what} needs all weights, but with memory={format_size(cap)} FFN weights of this "
        f"{type(model).__name__} are outside of memory: remove the method first (leave its `with` "
        "block, or call remove(model))"
    )


def loaded_outside_error(kind: str, what: str) -> CoreMatchingError:
    """The error for an operation that a model loaded without its FFNs cannot do."""
    return InputError(
        f"{what} needs all weights, but this {kind} was loaded without its FFNs "
        f"(load(..., memory=...)): use {kind}.from_pretrained(...) for that, or tell load() the "
        "dtype and the device"
    )


def _matrices(mlp: nn.Module) -> list[nn.Parameter]:
    """The weights of an FFN's linear layers."""
    linears = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    return [cast(nn.Parameter, linear.weight) for linear in linears]
