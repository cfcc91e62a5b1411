"""Tells prefills from decode steps on one model, and keeps the choices between them."""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from corematching.errors import AlreadyInstalledError, InputError
from corematching.protocol import Method

from .cache import check_cache, fit_mask, is_fresh, widen_sliding_layers
from .checks import Parts, check_model, choose_counts
from .choices import HeldChoices
from .count import Record, layer_costs, mark
from .decode import Backend, check_engine
from .ffn import SparseFFN
from .generation import GenerationPatches, replay_error
from .lock import UseLock
from .offload import Offload
from .prefill import Prefill
from .prompt import batch_size, query_length, read_prompt
from .remembering import memory_of, remember
from .selection import Selection
from .tower import find_tower
from .vision import VisionMeter
from .weights import LayerWeights

MAX_RECORDS = 16
FIRST_NUMBERS = itertools.count(0, 1 << 32)
"""Of the records of each engine, so that no cache takes another engine's for its own."""


class Engine:
    """A method at work on one model.

    Parameters
    ----------
    model : nn.Module
        The model.
    method : Method
        What chooses.
    engine : str
        What may run decode steps and prompts: ``auto``, ``torch`` or ``native``.
    offload : Offload or None
        Keeps FFN weights outside fast memory; their layers decode in PyTorch.

    Raises
    ------
    MemoryCapError
        The model does not fit under the offload's cap.
    UnsupportedModelError
        The model cannot be shortened.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        engine: str = "auto",
        offload: Offload | None = None,
    ) -> None:
        self.offload = offload
        engine = check_engine(engine) if offload is None else offload.check_engine(engine)
        in_place = engine != "torch"
        self.parts: Parts = check_model(model, method)
        self._model, self.method = weakref.ref(model), method
        self.lock = UseLock()
        self.prefill: Prefill | None = None
        self.records: deque[Record] = deque(maxlen=MAX_RECORDS)
        counts = choose_counts(self.parts, method.neurons)
        per_token = getattr(method.neurons, "per_token", False)
        chosen = {i: n for i, n in enumerate(counts) if n < self.parts.widths[i] or per_token}
        self.sparse: dict[int, SparseFFN] = (
            {i: SparseFFN(self.parts.ffns[i], n, in_place) for i, n in chosen.items()}
            if offload is None
            else offload.make_ffns(self.parts, chosen)
        )
        share = getattr(method.neurons, "decode_share", 1.0)
        self.counts = [max(1, round(share * count)) for count in counts]
        self.backend = Backend(model, self.parts, self.sparse, engine)
        self._patches = GenerationPatches(self)
        self._weights = LayerWeights(self.parts, method.tokens)
        self._handles: list[Any] = []
        self._names = list(inspect.signature(model.forward).parameters)
        self._start: Any = None
        self._vision = VisionMeter(self.parts.vision, self._device)
        self._tower = find_tower(model, self.parts.vision, method.tokens)
        self._prompt_width, self._expand_from, self._total = 0, 0, 0
        self._ends: tuple[int, ...] = ()
        self._first: Record | None = None
        self._counting: Record | None = None
        self.choices = HeldChoices(self.sparse)
        self._thread, self._numbers = 0, next(FIRST_NUMBERS)
        self.generating = self._stepping = False
        self._resumed: Record | None = None

    @property
    def model(self) -> nn.Module:
        """The model."""
        model = self._model()
        assert model is not None
        return model

    def install(self) -> None:
        """Put the hooks and patches on the model."""
        model = self.model
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._vision.install()
        if self._tower is not None:
            self._tower.install()
        if self.offload is not None:
            self.offload.install()
        for ffn in self.sparse.values():
            ffn.install()
        self.backend.install()
        self._weights.install()
        self._patches.install()

    def remove(self) -> None:
        """Take everything off the model again."""
        self._drop_prefill()
        self._patches.remove()
        self._weights.remove()
        self.backend.remove()
        for ffn in self.sparse.values():
            ffn.remove()
        if self.offload is not None:
            self.offload.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._vision.remove()
        if self._tower is not None:
            self._tower.remove()

    def begin_generate(self, prompt_width: int) -> None:
        """A generate() starts."""
        self._drop_prefill()
        self.generating, self._first = True, None
        self._vision.take()
        self._prompt_width, self._expand_from, self._ends = prompt_width, 0, ()
        self._total = 0

    @property
    def answering(self) -> bool:
        """Whether the prompt of the generate() under way is done."""
        return self._first is not None

    def gather_neurons(self, cache: Any = None) -> None:
        """A token will be decoded: fetch the weights of what the prompt's layers chose.

        Not before, so that the first token need not wait for it and an answer of one token never
        pays for it.
        """
        compiled = cache is not None and cache.is_compileable
        for ffn in self.sparse.values():
            ffn.gather(copies=compiled)

    def follow(self, cache: Any, batch: int) -> None:
        """``batch`` rows of tokens go on from a cache: FFNs get what it chose for its rows.

        Raises
        ------
        InputError
            The cache is of other prompts, of another number of them, or of another method's.
        """
        if self.choices.follow(cache, batch):
            self.backend.refresh()

    def settle(self, record: Record) -> None:
        """Note what the decode steps of the latest record have read."""
        if record is not self._counting or record.tally is None or record.settled == record.steps:
            return
        record.settled = record.steps
        if self.offload is not None:
            self.offload.measure(record.memory)
        now, before, rows = self.backend.count(), record.tally, len(record.valid)
        record.kernel = self.backend.name(before, now)
        record.decode_bytes = self.backend.bytes_per_step(before, now, record.steps, rows)
        record.dense_decode_bytes = self.backend.dense_bytes()

    def note_generation(self, config: Any, ends: Tensor | None) -> None:
        """generate() has settled its configuration."""
        self._expand_from = max(config.num_beams or 1, config.num_return_sequences or 1)
        self._total = config.max_length or 0
        self.backend.expect(self._total - self._prompt_width)
        self._ends = () if ends is None else tuple(int(x) for x in ends.flatten())

    def note_step(self) -> None:
        """generate() has taken one more token."""
        if self._first is not None:
            self._first.steps += 1

    def note_output(self, output: Any) -> None:
        """generate() has come to its end."""
        if self._first is not None:
            sequences = output if isinstance(output, Tensor) else output.sequences
            self._first.sequences = sequences.detach()
            self._first.prompt_width, self._first.ends = self._prompt_width, self._ends

    def end_generate(self) -> None:
        """A generate() is over, also after an exception."""
        self._drop_prefill()
        self.generating = False
        if self._first is not None:
            self._first.steps = max(self._first.steps - 1, 0)
            self.settle(self._first)
            self._first.last = mark(self._device)
        self._first = None

    @property
    def _device(self) -> torch.device:
        return next(self.parts.layers[0].parameters()).device

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find out what this forward is; compiled decode steps only get their mask fitted."""
        length = query_length(args, kwargs)
        cache = kwargs.get("past_key_values")
        if length == 1 and (torch.compiler.is_compiling() or self.generating):
            if self._first is not None and cache is not None:
                return None
            if torch.compiler.is_compiling():
                return args, self._fit(kwargs, cache, length)
        return self._begin(args, kwargs, length)

    @torch.compiler.disable
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], length: int) -> Any:
        """A prefill starts, an earlier turn goes on, or a hand-written loop takes a step."""
        self.lock.check()
        self._check_thread()
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        if not is_fresh(cache, length):
            self._resume(kwargs, cache, length)
            return (), self._fit(kwargs, cache, length)
        self._drop_prefill()
        self.backend.refresh()
        self._start_prefill(kwargs, cache, length)
        return (), kwargs

    def _start_streaming(self, valid: Tensor) -> None:
        """A prompt begins, whose layers stream their weights."""
        if self.offload is not None:
            each = sum(cost.kv_bytes for cost in layer_costs(self.parts))
            self.offload.start_prompt(valid.shape[0], valid.shape[1], self._total, each)

    def _start_prefill(self, kwargs: dict[str, Any], cache: Any, length: int) -> None:
        if self._first is not None and cache is None and (self.method.tokens or self.sparse):
            raise replay_error()
        valid, image = read_prompt(self.model, kwargs, self.parts.image_ids, length)
        if self.method.tokens is not None and cache is not None:
            check_cache(cache)
            widen_sliding_layers(cache, length)
        self._start_streaming(valid)
        self.choices.clear()
        if not self.generating:
            self._vision.take()
        prefill = Prefill(self.parts, self.method, self.sparse, valid, image, self._tower)
        if prefill.cuts and kwargs.get("labels") is not None:
            raise InputError(
                "labels do not fit a prompt that gets shorter: remove the method before training "
                "or computing a loss"
            )
        self.prefill = prefill
        earlier = memory_of(cache)
        if earlier is not None:
            earlier.forget()
        self._thread = threading.get_ident()
        self._start = mark(self._device)
        if length > 1:
            prefill.install()

    def _after(self, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """The forward is over; output is None after an exception."""
        if torch.compiler.is_compiling():
            return
        if self.prefill is not None:
            if self._thread == threading.get_ident():
                self._finish(output)
        elif self._resumed is not None:
            self._resumed.filled = self._resumed.last = mark(self._device)
            self._resumed = None
        elif self._stepping and output is not None:
            self._count_step()

    @torch.compiler.disable
    def _finish(self, output: Any) -> None:
        prefill = self.prefill
        assert prefill is not None
        self._drop_prefill()
        if output is None or (self.generating and self._first is not None):
            return
        cache = prefill.cache
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        selection = prefill.selection
        if not self.generating:
            self.gather_neurons(cache)
        if cache is not None and (selection.stages or selection.neurons):
            memory = prefill.make_memory(self._numbers)
            remember(cache, memory)
            self.choices.hold(memory)
        logits = getattr(output, "logits", None)
        batch = prefill.valid.shape[0]
        self._add(
            Record(
                valid=prefill.prompt_valid,
                image=prefill.prompt_image,
                context=torch.zeros(batch, 2, dtype=torch.long),
                selection=selection,
                counts=self.counts if selection.neurons else self.parts.widths,
                cached=cache is not None,
                logit_rows=1 if logits is None else logits.shape[1],
            )
        )

    def _resume(self, kwargs: dict[str, Any], cache: Any, length: int) -> None:
        """A cache that is not empty comes in: its own choices hold."""
        self.backend.refresh()
        self.follow(cache, batch_size(kwargs))
        self.gather_neurons(cache)
        self._stepping = length == 1 and not self.generating
        if self._stepping:
            return
        memory = memory_of(cache)
        number = -1 if memory is None else memory.record
        earlier = next((r for r in self.records if r.number == number and number >= 0), None)
        if not self.generating:
            self._vision.take()
        valid, image = read_prompt(self.model, kwargs, self.parts.image_ids, length)
        self._start_streaming(valid)
        seen = int(cache.get_seq_length())
        dropped = 0 if memory is None else int(memory.dropped)
        context = torch.tensor([[seen, seen - dropped]]).expand(valid.shape[0], 2)
        self._start = mark(self._device)
        self._add(
            Record(
                valid=valid,
                image=image if earlier is None else torch.zeros_like(image),
                context=context,
                selection=Selection(length),
                counts=self.counts if memory is not None and memory.neurons else self.parts.widths,
                continued=True,
                earlier=earlier,
                rows=None if memory is None else memory.rows,
                cached=True,
            )
        )
        self._resumed = self.records[-1]

    def _add(self, record: Record) -> None:
        if self._counting is not None:
            self.settle(self._counting)
        self._counting, record.tally = record, self.backend.count()
        record.memory = None if self.offload is None else self.offload.use
        record.number, self._numbers = self._numbers, self._numbers + 1
        record.start, record.filled = self._start, mark(self._device)
        record.last = record.filled
        record.vision, record.vision_flops = self._vision.take()
        record.vision_inside = not self.generating
        record.expand = max(self._expand_from, 1) if self.generating else 1
        if self.records:
            self.records[-1].selection.forget_neurons()
        self.records.append(record)
        if self.generating:
            self._first = record

    def _count_step(self) -> None:
        """A hand-written loop has taken a decode step."""
        self._stepping = False
        if self.records:
            self.records[-1].steps += 1
            self.records[-1].last = mark(self._device)

    def _check_thread(self) -> None:
        """Raise if another thread is in the middle of a prefill of its own."""
        if self.prefill is None or self._thread == threading.get_ident():
            return
        if self._thread in {thread.ident for thread in threading.enumerate()}:
            raise AlreadyInstalledError(
                "the model is in use by another thread's forward pass: one run at a time per "
                "model with a method installed; wait for it, or load the model twice"
            )

    def _fit(self, kwargs: dict[str, Any], cache: Any, length: int) -> dict[str, Any]:
        """A caller's mask made to fit the cache; generate() gets one that fits by itself."""
        if torch.compiler.is_compiling():
            self.choices.check_compiled(cache)
        return kwargs if self.generating else fit_mask(kwargs, cache, length)

    def _drop_prefill(self) -> None:
        if self.prefill is not None:
            self.prefill.remove()
            if self._tower is not None:
                self._tower.clear()
        self.prefill = None
