"""The session of one method on one model: classifies each forward pass and runs one at a time."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from corematching.backends.base import Backend
from corematching.backends.select import check_engine
from corematching.backends.sparse_ffn import SparseFFN
from corematching.cache.layers import check_cache, fit_mask, is_fresh, widen_sliding_layers
from corematching.cache.pruned_cache import pruned_prompt_of, remember
from corematching.errors import AlreadyInstalledError, InputError, UnsupportedModelError
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec
from corematching.offload.offload import Offload
from corematching.protocol import Method
from corematching.runtime.flops import layer_costs
from corematching.runtime.generation import Generation, GenerationPatches, replay_error
from corematching.runtime.installation import Installation
from corematching.runtime.lock import UseLock
from corematching.runtime.phase import ForwardPass, Phase
from corematching.runtime.prefill.prefill import Prefill
from corematching.runtime.prefill.prompt import batch_size, query_length, read_prompt
from corematching.runtime.prefill.selection import Selection
from corematching.runtime.record import Mark, Record, mark
from corematching.runtime.run_log import RunLog
from corematching.runtime.substitute import Substitute


class Session:
    """A method installed on one model.

    At most one generate() and one forward pass are in progress: ``generation`` and ``forward``.
    Each holds a lock until its state is restored.

    Parameters
    ----------
    model : nn.Module
        The model.
    method : Method
        The method.
    engine : str
        ``auto``, ``torch`` or ``native``; see `corematching.runtime.attach`.
    offload : Offload or None
        Keeps FFN weights outside fast memory; their layers decode in PyTorch.

    Raises
    ------
    MemoryCapError
        The model does not fit under the offload's cap.
    UnsupportedModelError
        The method cannot run on this model.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        engine: str = "auto",
        offload: Offload | None = None,
    ) -> None:
        self._kind = check_engine(engine) if offload is None else offload.check_engine(engine)
        self._model, self.installed, self.offload = weakref.ref(model), method, offload
        self.substitute = Substitute()
        self.lock, self._inner_lock = UseLock(), UseLock()
        self.generation: Generation | None = None
        self.forward: ForwardPass | None = None
        self.log = RunLog()
        self._patches = Patches()
        if offload is not None:
            offload.prepare()
        self._names = list(inspect.signature(model.forward).parameters)
        self.installation = Installation(model, method, self._kind, offload)

    @property
    def model(self) -> nn.Module:
        """The model."""
        model = self._model()
        assert model is not None
        return model

    @property
    def parts(self) -> ModelSpec:
        """The model's parts."""
        return self.installation.parts

    @property
    def sparse(self) -> dict[int, SparseFFN]:
        """The layers' sparse FFNs, by layer."""
        return self.installation.sparse

    @property
    def backend(self) -> Backend:
        """The backend that runs prompts and decode steps."""
        return self.installation.backend

    @property
    def method(self) -> Method:
        """The method that reads this thread's prompts."""
        return self.substitute.method or self.installed

    def install(self) -> None:
        """Patch the model; `remove` also undoes an interrupted installation."""
        model, patches = self.model, self._patches
        patches.then(lambda: self.installation.remove())
        self.installation.install(model)
        patches.wrap(model, "forward", self._forward)
        GenerationPatches(self).install(patches)
        patches.forbid_copies(model)

    def remove(self) -> None:
        """Undo every patch; may be called repeatedly."""
        self._leave()
        self._patches.undo()

    def refresh(self) -> None:
        """Reinstall the method if modules or forwards were replaced since its installation.

        Raises
        ------
        UnsupportedModelError
            The method cannot run on the changed model; the next run tries again.
        """
        if self.installation.fits:
            return
        if self.offload is not None:
            raise UnsupportedModelError(
                "a module of the model was replaced while its weights are kept outside memory: "
                "remove the method, and install it again afterwards"
            )
        self._leave()
        self.installation.remove()
        self.installation = Installation(self.model, self.installed, self._kind, None)
        self.installation.install(self.model)

    def begin_generate(self, prompt_width: int) -> None:
        """Start a generate()."""
        self.refresh()
        self._leave()
        self.installation.vision.take()
        self.generation = Generation(prompt_width)

    def end_generate(self) -> None:
        """End the generate(), also after an exception; may be called repeatedly."""
        generation, self.generation = self.generation, None
        self._leave()
        record = None if generation is None else generation.record
        if record is not None:
            record.steps = max(record.steps - 1, 0)
            self.log.close(record)
            record.last = mark(self.installation.device)

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Dispatch a forward; compiled decode steps only get a fitted mask."""
        length = query_length(args, kwargs)
        cache = kwargs.get("past_key_values")
        compiling, generation = torch.compiler.is_compiling(), self.generation
        if length == 1 and (compiling or generation is not None):
            if generation is not None and generation.record is not None and cache is not None:
                if not compiling:
                    self._check_cache(generation, cache)
                return original(*args, **kwargs)
            if compiling:
                self.installation.choices.check_compiled(cache)
                return original(*args, **self._fit_mask(kwargs, cache, length))
        return self._run(original, args, kwargs, length)

    @torch.compiler.disable
    def _run(
        self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any], length: int
    ) -> Any:
        """Run a prefill, a turn or a hand-written loop's step under the lock."""
        generation = self.generation if self.lock.is_mine else None
        with (self.lock if generation is None else self._inner_lock).hold("a forward pass"):
            try:
                try:
                    kwargs = dict(zip(self._names, args, strict=False)) | kwargs
                    if generation is not None:
                        self._check_cache(generation, **kwargs)
                    kwargs = self._begin(kwargs, length)
                    output = original(**kwargs)
                    self._end(output)
                    return output
                finally:
                    self._leave()
            finally:
                self._leave()  # an interrupt may have cut the first call short

    def _check_cache(
        self,
        generation: Generation,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> None:
        """Refuse a forward on another cache during a generate()."""
        self.lock.check()
        if past_key_values is generation.cache or not (self.method.tokens or self.sparse):
            return
        if past_key_values is None and use_cache is False:
            raise replay_error()
        raise AlreadyInstalledError(
            "the model is in use by generate(): a streamer, a hook or a logits processor cannot "
            "run it for another prompt meanwhile; load the model twice (the weights may be shared)"
        )

    def _begin(self, kwargs: dict[str, Any], length: int) -> dict[str, Any]:
        """Prepare a forward; returns its inputs."""
        self.refresh()
        self.backend.refresh()
        cache = kwargs.get("past_key_values")
        if is_fresh(cache, length):
            self._start_prefill(kwargs, cache, length)
            return kwargs
        self.installation.follow(cache, batch_size(kwargs))
        self.installation.gather_neurons(cache)
        if length == 1 and self.generation is None:
            self.forward = ForwardPass(Phase.STEP)
        else:
            self._start_turn(kwargs, cache, length)
        return self._fit_mask(kwargs, cache, length)

    def _start_prefill(self, kwargs: dict[str, Any], cache: Any, length: int) -> None:
        installation, generation = self.installation, self.generation
        replayed = generation is not None and generation.record is not None and cache is None
        if replayed and (self.method.tokens or self.sparse):
            raise replay_error()
        valid, image = read_prompt(self.model, kwargs, self.parts.image_ids, length)
        if self.method.tokens is not None and cache is not None:
            check_cache(cache)
            widen_sliding_layers(cache, length)
        self._start_streaming(valid)
        installation.choices.clear()
        if generation is None:
            installation.vision.take()
        prefill = Prefill(self.parts, self.method, self.sparse, valid, image, installation.tower)
        if kwargs.get("labels") is not None and prefill.learn():
            raise InputError(
                "labels do not fit a prompt that gets shorter: remove the method before training "
                "or computing a loss"
            )
        layers = self.backend.stats().native_layers
        self.forward = ForwardPass(Phase.PREFILL, mark(installation.device), prefill, None, layers)
        earlier = pruned_prompt_of(cache)
        if earlier is not None:
            earlier.forget()
        if length > 1:
            prefill.install()

    def _start_turn(self, kwargs: dict[str, Any], cache: Any, length: int) -> None:
        installation, memory = self.installation, pruned_prompt_of(cache)
        earlier = None if memory is None else self.log.find(memory.record)
        if self.generation is None:
            installation.vision.take()
        valid, image = read_prompt(self.model, kwargs, self.parts.image_ids, length)
        self._start_streaming(valid)
        seen = int(cache.get_seq_length())
        dropped = 0 if memory is None else int(memory.dropped)
        neurons = {} if memory is None else memory.neurons
        record = Record(
            valid=valid,
            image=image if earlier is None else torch.zeros_like(image),
            context=torch.tensor([[seen, seen - dropped]]).expand(valid.shape[0], 2),
            selection=Selection(neurons=neurons),
            counts=installation.counts if neurons else self.parts.widths,
            continued=True,
            earlier=earlier,
            rows=None if memory is None else memory.rows,
            cached=True,
        )
        layers = self.backend.stats().native_layers
        self.forward = ForwardPass(Phase.TURN, mark(installation.device), None, record, layers)
        self._add(record, self.forward.start)

    def _start_streaming(self, valid: Tensor) -> None:
        """Prepare the offload, if any, for a prompt."""
        if self.offload is not None:
            each = sum(cost.kv_bytes for cost in layer_costs(self.parts))
            total = 0 if self.generation is None else self.generation.total
            self.offload.start_prompt(valid.shape[0], valid.shape[1], total, each)

    def _end(self, output: Any) -> None:
        """Record a forward that has completed."""
        forward = self.forward
        assert forward is not None
        if forward.phase is Phase.PREFILL:
            self._end_prefill(forward, output)
        elif forward.phase is Phase.STEP:
            self.log.count_step()
        elif forward.record is not None:
            self._count_layers(forward, forward.record)
            forward.record.filled = forward.record.last = mark(self.installation.device)

    def _end_prefill(self, forward: ForwardPass, output: Any) -> None:
        prefill, generation, installation = forward.prefill, self.generation, self.installation
        assert prefill is not None
        self._leave()
        if generation is not None and generation.record is not None:
            return
        cache, selection = prefill.cache_of(output), prefill.selection
        if generation is None:
            selection.check()
            installation.gather_neurons(cache)
        if cache is not None and (selection.stages or selection.neurons):
            memory = prefill.make_pruned_prompt(self.log.number)
            remember(cache, memory)
            installation.choices.hold(memory)
        logits = getattr(output, "logits", None)
        record = Record(
            valid=prefill.prompt_valid,
            image=prefill.prompt_image,
            context=torch.zeros(prefill.valid.shape[0], 2, dtype=torch.long),
            selection=selection,
            counts=installation.counts if selection.neurons else self.parts.widths,
            cached=cache is not None,
            logit_rows=1 if logits is None else logits.shape[1],
        )
        self._count_layers(forward, record)
        self._add(record, forward.start)

    def _count_layers(self, forward: ForwardPass, record: Record) -> None:
        """Count the prompt's layers that ran in compiled code."""
        record.path.native_layers = self.backend.stats().native_layers - forward.native_layers

    def _add(self, record: Record, start: Mark | None) -> None:
        """Log the record of a completed prompt, or of a turn that begins."""
        generation = self.generation
        self.log.add(record, self.installation, start)
        record.vision_inside = generation is None
        if generation is not None:
            record.expand = max(generation.expand, 1)
            generation.record = record

    def _leave(self) -> None:
        """Clean up after a forward, also after an exception; may be called repeatedly."""
        forward = self.forward
        if forward is not None and forward.prefill is not None:
            forward.prefill.remove()
            self.installation.forget_images()
        self.installation.disarm()
        self.forward = None

    def _fit_mask(self, kwargs: dict[str, Any], cache: Any, length: int) -> dict[str, Any]:
        """Fit a caller's mask to the cache; generate()'s own patches fit its masks."""
        return kwargs if self.generation is not None else fit_mask(kwargs, cache, length)
