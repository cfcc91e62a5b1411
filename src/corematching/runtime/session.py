"""Tells prefills from decode steps on one model, and keeps the choices between them."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from corematching.backends.backend import Backend, check_engine
from corematching.backends.choice_checks import check_settled
from corematching.backends.sparse_ffn import SparseFFN
from corematching.cache.layers import check_cache, fit_mask, is_fresh, widen_sliding_layers
from corematching.cache.remembering import memory_of, remember
from corematching.errors import AlreadyInstalledError, InputError, UnsupportedModelError
from corematching.model.patching import Patches
from corematching.model.snapshot import ModuleSnapshot
from corematching.model.spec import Parts, check_model, choose_counts
from corematching.offload.offload import Offload
from corematching.protocol import Method
from corematching.runtime.generation import GenerationPatches, replay_error
from corematching.runtime.held_choices import HeldChoices
from corematching.runtime.lock import UseLock
from corematching.runtime.prefill.prefill import Prefill
from corematching.runtime.prefill.prompt import batch_size, query_length, read_prompt
from corematching.runtime.prefill.selection import Selection
from corematching.runtime.prefill.tower import find_tower
from corematching.runtime.prefill.vision import VisionMeter
from corematching.runtime.record import Record, layer_costs, mark
from corematching.runtime.token_count_bias import LayerWeights

MAX_RECORDS = 16
FIRST_NUMBERS = itertools.count(0, 1 << 32)
"""Of the records of each engine, so that no cache takes another engine's for its own."""
NO_CACHE_YET = object()
"""Stands for the cache of a generate() that has not made one, so that no forward fits it."""


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
        self._kind = check_engine(engine) if offload is None else offload.check_engine(engine)
        self._model, self.method = weakref.ref(model), method
        self.lock, self._pass = UseLock(), UseLock()
        self.prefill: Prefill | None = None
        self.records: deque[Record] = deque(maxlen=MAX_RECORDS)
        self._patches, self._inner = Patches(), Patches()
        if offload is not None:
            offload.prepare()
        self._names = list(inspect.signature(model.forward).parameters)
        self._read_model()
        self._start: Any = None
        self._prompt_width, self._expand_from, self._total = 0, 0, 0
        self._ends: tuple[int, ...] = ()
        self._first: Record | None = None
        self._counting: Record | None = None
        self._cache: Any = None
        self._numbers = next(FIRST_NUMBERS)
        self.generating = self._stepping = False
        self._resumed: Record | None = None
        self._snapshot: ModuleSnapshot | None = None

    @property
    def model(self) -> nn.Module:
        """The model."""
        model = self._model()
        assert model is not None
        return model

    def _read_model(self) -> None:
        """Find the model's parts, and make what is put on each of them."""
        model, method, offload = self.model, self.method, self.offload
        self.parts: Parts = check_model(model, method)
        counts = choose_counts(self.parts, method.neurons)
        per_token = getattr(method.neurons, "per_token", False)
        chosen = {i: n for i, n in enumerate(counts) if n < self.parts.widths[i] or per_token}
        in_place = self._kind != "torch"
        self.sparse: dict[int, SparseFFN] = (
            {i: SparseFFN(self.parts.ffns[i], n, in_place) for i, n in chosen.items()}
            if offload is None
            else offload.make_ffns(self.parts, chosen)
        )
        self.choices = HeldChoices(self.sparse)
        share = getattr(method.neurons, "decode_share", 1.0)
        self.counts = [max(1, round(share * count)) for count in counts]
        self.backend = Backend(model, self.parts, self.sparse, self._kind)
        self._vision = VisionMeter(self.parts.vision, self._device)
        self._tower = find_tower(model, self.parts.vision, method.tokens)

    def install(self) -> None:
        """Put everything on the model; `remove` undoes it also where this was interrupted."""
        model, patches = self.model, self._patches
        patches.then(self._inner.undo)
        self._install_inside()
        patches.wrap(model, "forward", self._forward)
        GenerationPatches(self).install(patches)
        patches.forbid_copies(model)

    def _install_inside(self) -> None:
        """Put on the modules below the model what belongs there."""
        patches = self._inner
        self._vision.install(patches)
        if self._tower is not None:
            self._tower.install(patches)
        if self.offload is not None:
            patches.then(self.offload.remove)
            self.offload.install()
        for ffn in self.sparse.values():
            patches.then(ffn.remove)
            ffn.install()
        patches.then(self.backend.remove)
        self.backend.install()
        LayerWeights(self.parts, self.method.tokens).install(patches)
        self._snapshot = ModuleSnapshot(self.model)

    def remove(self) -> None:
        """Take everything off the model again; does nothing where nothing is on it."""
        self._drop_prefill()
        self._patches.undo()

    def look_again(self) -> None:
        """Read the model anew where modules or forwards were replaced since the method came on.

        Raises
        ------
        UnsupportedModelError
            The method cannot run on what stands there now; nothing has run, and the next run
            looks again.
        """
        if self._snapshot is not None and self._snapshot.unchanged():
            return
        if self.offload is not None:
            raise UnsupportedModelError(
                "a module of the model was replaced while its weights are kept outside memory: "
                "remove the method, and install it again afterwards"
            )
        self._drop_prefill()
        self._inner.undo()
        self._snapshot = None
        self._read_model()
        self._install_inside()

    def begin_generate(self, prompt_width: int) -> None:
        """A generate() starts."""
        self.look_again()
        self._drop_prefill()
        self.generating, self._first, self._cache = True, None, NO_CACHE_YET
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
        check_settled(self.sparse.values())
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

    def note_generation(self, config: Any, ends: Tensor | None, cache: Any) -> None:
        """generate() has settled its configuration, and has a cache."""
        self._cache = cache
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
        """A generate() is over, also after an exception; may be called again."""
        first, self._first = self._first, None
        self.generating, self._cache = False, None
        self._drop_prefill()
        if first is not None:
            first.steps = max(first.steps - 1, 0)
            self.settle(first)
            first.last = mark(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.parts.layers[0].parameters()).device

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Find out what this forward is; compiled decode steps only get their mask fitted."""
        length = query_length(args, kwargs)
        cache = kwargs.get("past_key_values")
        compiling = torch.compiler.is_compiling()
        if length == 1 and (compiling or self.generating):
            if self._first is not None and cache is not None:
                if not compiling:
                    self._check_cache(cache)
                return original(*args, **kwargs)
            if compiling:
                return original(*args, **self._fit(kwargs, cache, length))
        return self._run(original, args, kwargs, length)

    @torch.compiler.disable
    def _run(
        self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any], length: int
    ) -> Any:
        """A prefill, a further turn, or a hand-written loop's step, alone on the model."""
        inside = self.generating and self.lock.is_mine
        with (self._pass if inside else self.lock).hold("a forward pass"):
            try:
                try:
                    kwargs = dict(zip(self._names, args, strict=False)) | kwargs
                    if inside:
                        self._check_cache(kwargs.get("past_key_values"))
                    kwargs = self._begin(kwargs, length)
                    output = original(**kwargs)
                    self._end(output)
                    return output
                finally:
                    self._leave()
            finally:
                self._leave()  # an interrupt may have cut the first one short

    def _check_cache(self, cache: Any) -> None:
        """Refuse another forward in the middle of a generate(), whoever calls it."""
        self.lock.check()
        if cache is not self._cache:
            raise AlreadyInstalledError(
                "the model is in use by generate(): a streamer, a hook or a logits processor "
                "cannot run it for another prompt meanwhile; load the model twice (the weights "
                "may be shared)"
            )

    def _begin(self, kwargs: dict[str, Any], length: int) -> dict[str, Any]:
        """Get ready for this forward; gives its inputs."""
        self.look_again()
        cache = kwargs.get("past_key_values")
        if not is_fresh(cache, length):
            self._resume(kwargs, cache, length)
            return self._fit(kwargs, cache, length)
        self._drop_prefill()
        self.backend.refresh()
        self._start_prefill(kwargs, cache, length)
        return kwargs

    def _start_streaming(self, valid: Tensor) -> None:
        """A prompt begins, whose layers stream their weights."""
        if self.offload is not None:
            each = sum(cost.kv_bytes for cost in layer_costs(self.parts))
            self.offload.start_prompt(valid.shape[0], valid.shape[1], self._total, each)

    def _start_prefill(self, kwargs: dict[str, Any], cache: Any, length: int) -> None:
        valid, image = read_prompt(self.model, kwargs, self.parts.image_ids, length)
        if self.method.tokens is not None and cache is not None:
            check_cache(cache)
            widen_sliding_layers(cache, length)
        self._start_streaming(valid)
        if self._first is not None and cache is None and (self.method.tokens or self.sparse):
            raise replay_error()
        for ffn in self.sparse.values():
            ffn.clear()
        if not self.generating:
            self._vision.take()
        prefill = Prefill(self.parts, self.method, self.sparse, valid, image, self._tower)
        if prefill.cuts and kwargs.get("labels") is not None:
            raise InputError(
                "labels do not fit a prompt that gets shorter: remove the method before training "
                "or computing a loss"
            )
        self.prefill = prefill
        self.choices.hold(None)
        earlier = memory_of(cache)
        if earlier is not None:
            earlier.forget()
        self._start = mark(self._device)
        if length > 1:
            prefill.install()

    def _end(self, output: Any) -> None:
        """The forward has gone through."""
        if self.prefill is not None:
            self._finish(output)
        elif self._resumed is not None:
            self._resumed.filled = self._resumed.last = mark(self._device)
        elif self._stepping:
            self._count_step()

    def _leave(self) -> None:
        """The forward is over, also after an exception; may be called again."""
        self._drop_prefill()
        self._resumed = None
        self._stepping = False

    def _finish(self, output: Any) -> None:
        prefill = self.prefill
        assert prefill is not None
        self._drop_prefill()
        if self.generating and self._first is not None:
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
        if self.records:
            self.records[-1].steps += 1
            self.records[-1].last = mark(self._device)

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
        if self._tower is not None:
            self._tower.disarm()
        self.prefill = None
