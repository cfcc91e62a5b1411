"""Keeps the sparse FFNs' neuron choices in step with the cache in use."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from corematching.backends.choice_checks import check_materialized
from corematching.backends.sparse_ffn import SparseFFN
from corematching.cache.pruned_cache import follow, pruned_prompt_of
from corematching.cache.pruned_prompt import PrunedPrompt
from corematching.errors import InputError


class HeldChoices:
    """Tracks the prompt whose neuron choices one model's sparse FFNs hold.

    Parameters
    ----------
    sparse : mapping
        The layers' sparse FFNs, by layer.
    """

    def __init__(self, sparse: Mapping[int, SparseFFN]) -> None:
        self.sparse = sparse
        self._token = object()
        self._held: weakref.ref[PrunedPrompt] | None = None

    def hold(self, memory: PrunedPrompt | None) -> None:
        """Note that the FFNs hold the choices of this prompt, for its present rows."""
        held = None if self._held is None else self._held()
        if held is not None and held.holder is self._token:
            held.holder = None
        self._held = None if memory is None else weakref.ref(memory)
        if memory is not None:
            memory.give(self._token)

    def clear(self) -> None:
        """Make the FFNs dense again."""
        self.hold(None)
        for ffn in self.sparse.values():
            ffn.clear()

    def follow(self, cache: Any, batch: int) -> bool:
        """Give the FFNs the neuron choices of a cache; dense FFNs where it has none.

        Parameters
        ----------
        cache : Any
            The cache from which the next tokens continue.
        batch : int
            Rows of these tokens.

        Returns
        -------
        bool
            Whether the FFNs took new choices.

        Raises
        ------
        InputError
            The cache belongs to other prompts, to another number of them, or to another method.
        """
        memory = follow(cache, batch)
        if memory is None:
            self.clear()
            return False
        if memory.holder is self._token:
            if not memory.moved:
                return False
            if memory.chose_as_taken():
                memory.give(self._token)
                return False
        self.clear()
        for index in self.sparse:
            if index in memory.neurons:
                self._take(memory, index)
        self.hold(memory)
        return True

    def gather(self, cache: Any) -> None:
        """Gather the chosen neurons' weights; as compact copies for compiled code."""
        compiled = cache is not None and cache.is_compileable
        check_materialized(self.sparse.values())
        for ffn in self.sparse.values():
            ffn.gather(copies=compiled)

    def check_compiled(self, cache: Any) -> None:
        """Refuse a compiled step unless the FFNs hold its cache's choices.

        Raises
        ------
        InputError
            They hold another cache's choices, or the cache's rows have changed.
        """
        memory = pruned_prompt_of(cache)
        if memory is None or memory.is_blank:
            stale = any(ffn.active for ffn in self.sparse.values())
        else:
            stale = memory.holder is not self._token or memory.moved
        if stale and self.sparse:
            raise InputError(
                "a compiled step cannot take neurons for another cache or for other rows: take one "
                "step without torch.compile first"
            )

    def _take(self, memory: PrunedPrompt, index: int) -> None:
        choice, ffn = memory.choice(index).materialize(), self.sparse[index]
        found = ffn.count if choice.indices is None else choice.indices.shape[-1]
        if found != ffn.count:
            raise InputError(
                f"the cache's prompt chose {found} neurons in layer {index} and the method that is "
                f"installed chooses {ffn.count}: go on with the method that read the prompt, or "
                "read it again"
            )
        ffn.take(choice)
