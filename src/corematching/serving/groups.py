"""Rows that decode together: one step gives each its next logits.

Shapes: B rows, G key-value heads, D head dimension, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from corematching.cache.pruned_cache import remember
from corematching.cache.pruned_prompt import PrunedPrompt
from corematching.cache.slots import SlotCache, round_up
from corematching.serving.choices import Choices, join
from corematching.serving.prompt import Prompt, forward

MOST_ROWS = 16
"""Rows of a step in compiled code."""
MOST_IDLE_STEPS = 16
"""An idle row costs part of a step, taking it out a copy of the others."""


@dataclass(eq=False)
class Row:
    """A conversation that decodes.

    Attributes
    ----------
    prompt : Prompt or None
        Until the row is in a group, which takes over its keys and values.
    choices : mapping
        Its neurons, by layer.
    most : int
        Tokens that it stores at most: the kept ones, and its answer.
    position : int
        Of the next token.
    length : int
        Stored tokens.
    """

    prompt: Prompt | None
    choices: Choices
    most: int
    position: int = 0
    length: int = 0
    log_counts: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert self.prompt is not None
        self.position, self.length = self.prompt.position, self.prompt.kept
        self.log_counts = self.prompt.log_counts


class Group(ABC):
    """Rows that decode.

    Attributes
    ----------
    together : bool
        Whether the rows take one step together; if not, `step` one at a time.
    """

    together: bool

    @property
    @abstractmethod
    def rows(self) -> list[Row]:
        """The rows, in the order of `step`."""

    @abstractmethod
    def add(self, row: Row) -> None:
        """Take a row over."""

    @abstractmethod
    def remove(self, row: Row) -> None:
        """Let a row go."""

    @abstractmethod
    def step(self, tokens: list[int], rows: list[Row] | None = None) -> Tensor:
        """(B, V), the logits behind one more token of each row, or of these ``rows``.

        After an exception no row has changed where `together` holds.
        """

    @abstractmethod
    def columns_with(self, most: int = 0, count: int = 0) -> int:
        """Columns of keys and values in a layer at most.

        Parameters
        ----------
        most, count : int
            With so many further rows of at most ``most`` tokens.
        """


class SlotGroup(Group):
    """Rows in one buffer, each left-aligned with its own length.

    Parameters
    ----------
    model : PreTrainedModel
    """

    together = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self._slots: list[Row | None] = []
        self._shown: list[Row] = []
        self._idle_steps = 0
        self._cache: SlotCache | None = None

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order of their slots."""
        return [row for row in self._slots if row is not None]

    def add(self, row: Row) -> None:
        """Copy a row into an idle slot, or a new one."""
        prompt = row.prompt
        assert prompt is not None
        idle = next((i for i, slot in enumerate(self._slots) if slot is None), None)
        needed = row.length + 1
        if idle is None or self._cache is None or self._cache.columns < needed:
            kept = [i for i, slot in enumerate(self._slots) if slot is not None]
            idle = len(kept)
            self._resize([*kept, None], needed, prompt)
        assert self._cache is not None
        layers = prompt.cache.layers
        self._cache.fill(idle, [x.keys for x in layers], [x.values for x in layers])
        self._slots[idle], row.prompt = row, None

    def remove(self, row: Row) -> None:
        """Make a row's slot idle."""
        slot = self._slots.index(row)
        self._slots[slot] = None
        if self._cache is not None:
            self._cache.lengths[slot] = 0
        if not self.rows:
            self._slots, self._shown, self._cache = [], [], None

    def step(self, tokens: list[int], rows: list[Row] | None = None) -> Tensor:
        """One step of all slots; those that are idle, or not in ``rows``, compute for nothing."""
        self._make_room()
        cache, wanted = self._cache, self.rows if rows is None else rows
        assert cache is not None
        cache.arrange()
        self._choose_neurons()
        here = [self._slots.index(row) for row in wanted]
        ids, positions = [0] * cache.rows, [0] * cache.rows
        for slot, row, token in zip(here, wanted, tokens, strict=True):
            ids[slot], positions[slot] = token, row.position
        logits = forward(
            self.model, ids, positions, past_key_values=cache, attention_mask=cache.mask()
        )
        cache.settle(here)
        for row in wanted:
            row.position, row.length = row.position + 1, row.length + 1
        return logits[torch.tensor(here, device=logits.device)]

    def columns_with(self, most: int = 0, count: int = 0) -> int:
        """Rows times the longest one, in whole strides."""
        longest = max([most, *(row.most for row in self.rows)])
        return (len(self.rows) + count) * round_up(longest + 1)

    def _make_room(self) -> None:
        """Make room for a token; take slots out that have been idle for long."""
        cache = self._cache
        assert cache is not None
        self._idle_steps = self._idle_steps + 1 if None in self._slots else 0
        drop = self._idle_steps > MOST_IDLE_STEPS
        if drop or cache.width > cache.columns:
            self._resize([i for i, x in enumerate(self._slots) if x or not drop], cache.width)
            self._idle_steps = 0

    def _resize(self, slots: list[int | None], columns: int, first: Prompt | None = None) -> None:
        """Move to a buffer with these slots, and room to grow."""
        cache, most = self._cache, max((row.most + 1 for row in self.rows), default=columns)
        if cache is None:
            assert first is not None
            keys = first.cache.layers[0].keys
            sizes = (keys.shape[1], columns, keys.shape[3])
            layers = len(first.cache.layers)
            cache = SlotCache(layers, len(slots), *sizes, keys.dtype, keys.device)
        else:
            columns = max(columns, cache.width, min(columns + columns // 4, most))
            cache = cache.resize(slots, columns)
        self._slots = [None if i is None else self._slots[i] for i in slots]
        self._cache, self._shown = cache, []

    def _choose_neurons(self) -> None:
        """Give the cache what its rows chose, where rows have come since the last step."""
        cache, rows = self._cache, self.rows
        assert cache is not None
        if self._shown == self._slots:
            return
        if set(map(id, rows)) <= set(map(id, self._shown)) and len(self._shown) == cache.rows:
            return  # rows only left: idle slots keep the choices that they had
        filled = [row or rows[0] for row in self._slots]
        counts = None
        if any(row.log_counts is not None for row in rows):
            device = cache.buffer.device
            counts = torch.zeros(cache.rows, cache.columns, device=device)
            for slot, row in enumerate(self._slots):
                if row is not None and row.log_counts is not None:
                    counts[slot, : row.log_counts.shape[1]] = row.log_counts[0]
        memory = PrunedPrompt(
            torch.ones(cache.rows, 1, dtype=torch.bool, device=cache.buffer.device),
            1,
            dropped=0,
            neurons=join([row.choices for row in filled]),
            shortened=False,
            log_counts=counts,
        )
        remember(cache, memory)
        self._shown = filled


class TurnGroup(Group):
    """Rows that keep the caches of their prompts and take their steps in turn.

    For models whose layers do not all store the same tokens, such as those with sliding windows.
    """

    together = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self._rows: list[Row] = []

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order in which they came."""
        return list(self._rows)

    def add(self, row: Row) -> None:
        """Take over a row's cache, as a copy where other rows have the same one."""
        assert row.prompt is not None
        if any(row.prompt is other.prompt for other in self._rows):
            row.prompt = replace(row.prompt, cache=copy.deepcopy(row.prompt.cache))
        self._rows.append(row)

    def remove(self, row: Row) -> None:
        """Let a row go."""
        self._rows.remove(row)

    def step(self, tokens: list[int], rows: list[Row] | None = None) -> Tensor:
        """One step of each row."""
        wanted = self.rows if rows is None else rows
        out = [self._step(row, token) for row, token in zip(wanted, tokens, strict=True)]
        return torch.cat(out)

    def columns_with(self, most: int = 0, count: int = 0) -> int:
        """The rows' tokens."""
        return sum(row.most for row in self._rows) + most * count

    def _step(self, row: Row, token: int) -> Tensor:
        assert row.prompt is not None
        logits = forward(self.model, [token], [row.position], past_key_values=row.prompt.cache)
        row.position, row.length = row.position + 1, row.length + 1
        return logits
