"""generate() on a pruned cache: its state, its checks and its attention masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.generation import GenerationMode

from corematching.cache.layers import check_cache, short_mask, widen_sliding_layers
from corematching.cache.pruned_cache import pruned_prompt_of
from corematching.errors import UnsupportedModelError
from corematching.model.patching import Patches

if TYPE_CHECKING:
    from corematching.runtime.record import Record
    from corematching.runtime.session import Session

NO_CACHE_YET = object()
"""Placeholder for the cache of a generate() that has not created one yet."""


@dataclass
class Generation:
    """The generate() in progress.

    Attributes
    ----------
    prompt_width : int
        Prompt tokens at the front of its output.
    cache : Any
        The cache of its forward passes.
    expand : int
        Rows per sample (beams, several answers).
    total : int
        Maximum length of prompt and answer in tokens; 0 while unknown.
    ends : tuple of int
        Ids of end-of-sequence tokens.
    record : Record or None
        The record of its prompt, after the prefill.
    """

    prompt_width: int
    cache: Any = NO_CACHE_YET
    expand: int = 1
    total: int = 0
    ends: tuple[int, ...] = ()
    record: Record | None = None

    def note_config(self, config: Any, cache: Any) -> None:
        """Take over the final configuration and the cache."""
        self.cache, self.total = cache, config.max_length or 0
        self.expand = max(config.num_beams or 1, config.num_return_sequences or 1)
        ends = config.eos_token_id
        ends = ends.tolist() if isinstance(ends, Tensor) else ends
        self.ends = () if ends is None else tuple(ends if isinstance(ends, list) else [ends])

    def check(self) -> None:
        """Run the checks that the prompt's choices put off until the first token was there."""
        if self.record is not None:
            self.record.selection.check()

    def note_output(self, output: Any) -> None:
        """Add the generated tokens to the record."""
        if self.record is not None:
            sequences = output if isinstance(output, Tensor) else output.sequences
            self.record.sequences = sequences.detach()
            self.record.prompt_width, self.record.ends = self.prompt_width, self.ends


class GenerationPatches:
    """Wraps four methods of one model's generate().

    ``generate`` itself, for the begin and the end of a run; ``_prepare_cache_for_generation``, to
    refuse unsupported options before anything runs; ``prepare_inputs_for_generation`` and
    ``_update_model_kwargs_for_generation``, for masks of the cache's length.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._masks_are_short = False

    def install(self, patches: Patches) -> None:
        """Replace the methods on the model."""
        model = self.session.model
        patches.wrap(model, "generate", self._generate)
        patches.wrap(model, "_prepare_cache_for_generation", self._prepare_cache)
        patches.wrap(model, "prepare_inputs_for_generation", self._prepare_inputs)
        patches.wrap(model, "_update_model_kwargs_for_generation", self._update_kwargs)

    def _generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        with session.lock.hold("generate()"):
            self._masks_are_short = False
            try:
                try:
                    session.begin_generate(_prompt_width(args, kwargs))
                    output = original(*args, **kwargs)
                    if session.generation is not None:
                        session.generation.check()
                        session.generation.note_output(output)
                finally:
                    session.end_generate()
            finally:
                session.end_generate()  # an interrupt may have cut the first call short
        return output

    def _prepare_cache(
        self,
        original: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        method = self.session.method
        if generation_config.use_cache is False and (method.tokens or method.neurons):
            raise replay_error()
        if generation_config.prefill_chunk_size is not None:
            raise UnsupportedModelError(
                "prefill_chunk_size splits the prompt, but the choices need all of it in one "
                "prefill: leave prefill_chunk_size at None"
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise UnsupportedModelError(
                "assisted generation checks several tokens at once with the dense FFNs: leave out "
                "assistant_model and prompt_lookup_num_tokens"
            )
        result = original(
            generation_config,
            model_kwargs,
            generation_mode,
            batch_size,
            max_cache_length,
            *args,
            **kwargs,
        )
        cache = model_kwargs.get("past_key_values")
        if cache is not None and self.session.method.tokens is not None:
            check_cache(cache)
            if pruned_prompt_of(cache) is None and not cache.get_seq_length():
                # the length that transformers gives a new static cache, to reuse compiled code
                capacity = getattr(self.session.model, "_previous_max_cache_length", 0)
                widen_sliding_layers(cache, max_cache_length, max(max_cache_length, capacity))
        generation = self.session.generation
        if generation is not None:
            generation.note_config(generation_config, cache)
            self.session.backend.expect(generation.total - generation.prompt_width)
        return result

    def _prepare_inputs(self, original: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        generation = self.session.generation
        if generation is not None:
            generation.check()
        if _seen(cache) or (generation is not None and generation.record is not None):
            self.session.installation.follow(cache, input_ids.shape[0])
            self.session.installation.gather_neurons(cache)
        if generation is not None and not self._masks_are_short:
            memory = pruned_prompt_of(cache)
            if memory is not None and memory.shortened and _seen(cache):
                self._shorten(memory, kwargs)
        return original(input_ids, *args, **kwargs)

    def _update_kwargs(
        self, original: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        memory = pruned_prompt_of(model_kwargs.get("past_key_values"))
        generation = self.session.generation
        if generation is not None and memory is not None and not self._masks_are_short:
            if memory.shortened:
                self._shorten(memory, model_kwargs)
            self._masks_are_short = True
        if generation is not None and generation.record is not None:
            generation.record.steps += 1
        return original(outputs, model_kwargs, *args, **kwargs)

    def _shorten(self, memory: Any, model_kwargs: dict[str, Any]) -> None:
        """Replace the mask over the whole conversation by one over the stored tokens."""
        mask = model_kwargs.get("attention_mask")
        positions = model_kwargs.get("position_ids")
        if mask is not None:
            total = mask.shape[1]
        else:
            total = memory.prompt if positions is None else positions.shape[-1]
        model_kwargs["attention_mask"] = short_mask(memory, mask, total)


def replay_error() -> UnsupportedModelError:
    """The error for ``use_cache=False``."""
    return UnsupportedModelError(
        "use_cache=False runs the prompt again at every step, where each token would have to see "
        "what the first run kept: leave use_cache at True (what is left after dropping tokens is "
        "small), or remove the method"
    )


def _seen(cache: Any) -> bool:
    """Whether the cache holds any tokens."""
    return cache is not None and bool(cache.get_seq_length())


def _prompt_width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Prompt tokens at the front of generate()'s output."""
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = kwargs.get("inputs", args[0] if args else None)
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim == 2 else 0
