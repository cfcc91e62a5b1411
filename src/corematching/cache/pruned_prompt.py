"""The prompt behind a KV cache, in step with the cache's rows and columns.

Shapes: B rows, T tokens of the prompt, K stored tokens of it, G key-value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from corematching.errors import InputError
from corematching.protocol import NeuronChoice


@dataclass
class PrunedPrompt:
    """A cache's prompt after the prefill: the tokens left, and the choices made for it.

    Attributes
    ----------
    valid : Tensor
        (B, K) bool, the stored prompt tokens without filler and padding.
    prompt : int
        T, tokens of the prompt before any was dropped, padding included.
    dropped : int or Tensor
        T - K; a tensor in static caches, so that compiled code does not depend on its value.
    neurons : dict
        The neuron choices, by layer, for the rows of the prefill; see `choice`.
    shortened : bool
        Whether a token policy made a choice; if not, the caller's masks fit the cache.
    record : int
        The number of the prefill's record.
    filler : bool
        Whether any entry of ``valid`` is False.
    log_counts : Tensor or None
        (B, K) float32, logarithms of the tokens' weights; padded with zeros in a static cache.
        None: each token counts once.
    masks : tuple or None
        The latest mask with added log counts: its key, its source, and the result.
    origin : Tensor or None
        (B, K) long, the stored tokens' columns in the prompt; None where unknown.
    samples : int
        Rows of the prefill.
    rows : list of int
        The prefill's row behind each present row.
    taken : list of int
        The ``rows`` for which the holder's FFNs took the neuron choices.
    holder : object or None
        The owner of the FFNs with these neuron choices; None: no FFN has them.
    moved : bool
        Whether the rows have changed since the FFNs took the choices.
    layer : int
        The layer whose keys identify the rows; -1 where none can.
    shown : Tensor or None
        This layer's keys, as last seen.
    sign : Tensor or None
        (B, G, D), this layer's keys of the last prompt token, which identify a row.
    alike : list of int
        Per row of the prefill: the first row of its run of neighbours with equal neuron choices;
        empty until it is needed.
    full : bool or None
        Given at the start: whether ``valid`` is True everywhere; None: it is read.
    """

    valid: Tensor
    prompt: int
    dropped: int | Tensor
    neurons: dict[int, NeuronChoice] = field(default_factory=dict)
    shortened: bool = True
    record: int = -1
    filler: bool = False
    log_counts: Tensor | None = None
    masks: tuple[Any, ...] | None = None
    origin: Tensor | None = None
    samples: int = 0
    rows: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    holder: object | None = None
    moved: bool = False
    layer: int = -1
    shown: Tensor | None = None
    sign: Tensor | None = None
    alike: list[int] = field(default_factory=list)
    full: InitVar[bool | None] = None

    def __post_init__(self, full: bool | None) -> None:
        self.filler = not (bool(self.valid.all()) if full is None else full)
        self.samples = self.valid.shape[0]
        self.rows = list(range(self.samples))

    def __getstate__(self) -> dict[str, Any]:
        """The state for copy and pickle, without what belongs to this object only."""
        neurons = {layer: choice.materialize() for layer, choice in self.neurons.items()}
        return {**vars(self), "neurons": neurons, "masks": None, "holder": None}

    @property
    def batch(self) -> int:
        """B, the present rows."""
        return len(self.rows)

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to remember."""
        return not self.shortened and not self.neurons

    def forget(self) -> None:
        """Forget the prompt and its choices."""
        if isinstance(self.dropped, Tensor):
            self.dropped.zero_()
        else:
            self.dropped = 0
        self.valid, self.prompt, self.record = self.valid[:0, :0], 0, -1
        self.shortened = self.filler = self.moved = False
        self.neurons, self.samples, self.rows, self.taken, self.alike = {}, 0, [], [], []
        self.log_counts = self.masks = self.origin = self.holder = None
        self.layer, self.shown, self.sign = -1, None, None

    def choice(self, layer: int) -> NeuronChoice:
        """A layer's neuron choice, for the present rows."""
        choice = self.neurons[layer]
        if self.rows == list(range(self.samples)):
            return choice
        parts = vars(choice.materialize()).items()
        return NeuronChoice(**{name: self._pick(part) for name, part in parts})

    def _pick(self, part: Any) -> Any:
        if not isinstance(part, Tensor) or part.shape[0] == 1:
            return part
        return part[torch.tensor(self.rows, device=part.device)]

    def give(self, holder: object) -> None:
        """Note that the FFNs of ``holder`` have the neuron choices of the present rows."""
        self.holder, self.taken, self.moved = holder, self.rows, False

    def chose_as_taken(self) -> bool:
        """Whether the FFNs' neurons still fit the rows, although these have moved."""
        if len(self.rows) != len(self.taken):
            return False
        self.alike = self.alike or self._find_alike()
        now, before = ([self.alike[row] for row in rows] for rows in (self.rows, self.taken))
        return now == before

    def _find_alike(self) -> list[int]:
        same = torch.ones(self.samples - 1, dtype=torch.bool)
        for choice in self.neurons.values():
            for part in vars(choice.materialize()).values():
                if isinstance(part, Tensor) and part.shape[0] > 1:
                    equal = part[1:] == part[:-1]
                    same &= equal.reshape(self.samples - 1, -1).all(1).cpu()
        alike = [0]
        for row, joined in enumerate(same.tolist(), 1):
            alike.append(alike[-1] if joined else row)
        return alike

    def rearrange(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``; ``rows`` is (B',) long."""
        order = rows.tolist()
        if order == list(range(self.batch)):
            return
        for name in ("valid", "origin", "log_counts", "sign"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part.index_select(0, rows.to(part.device)))
        self.rows = [self.rows[row] for row in order]
        self.masks, self.moved = None, True

    def count_whole(self) -> int:
        """Number of last prompt columns with no token dropped among them, in any row."""
        count = self.valid.shape[1]
        if self.origin is None:
            return 0 if int(self.dropped) else count
        there = torch.arange(self.prompt - count, self.prompt, device=self.origin.device)
        return int((self.origin == there).all(0).flip(0).cumprod(0).sum())

    def cut(self, columns: int) -> None:
        """Forget the last columns of the prompt."""
        rest = self.valid.shape[1] - columns
        for name in ("valid", "origin", "log_counts"):
            part = getattr(self, name)
            if part is not None:
                setattr(self, name, part[:, :rest])
        self.prompt, self.masks = self.prompt - columns, None

    def check_batch(self, batch: int) -> None:
        """Refuse new tokens of another number of rows.

        Raises
        ------
        InputError
            The numbers differ.
        """
        if batch != self.batch:
            raise InputError(
                f"{batch} rows of new tokens do not fit a cache of {self.batch}: call "
                "cache.batch_repeat_interleave() or cache.batch_select_indices() first"
            )

    def watch(self, cache: Any) -> None:
        """Choose the layer whose keys identify the rows, and keep these keys."""
        column = self.valid.shape[1] - 1
        layer: Any
        for index, layer in reversed(list(enumerate(cache.layers))):
            keys = layer.keys
            if type(layer) is not DynamicLayer or not layer.is_initialized:
                continue
            if 0 <= column < keys.shape[2] and keys.shape[0] == self.batch:
                self.layer, self.shown = index, keys
                self.sign = keys[:, :, column].detach().clone()
                return

    def note(self, cache: Any) -> None:
        """Accept the cache's new keys: their rows are unchanged."""
        if self.layer >= 0:
            self.shown = cache.layers[self.layer].keys
