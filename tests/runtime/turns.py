"""A conversation on one cache, in a hand-written loop, and the same rows taken from singles.

Whatever is done to the cache's rows and columns is noted as well: every row knows which sample it
comes from and which tokens it was fed. Each row's sample alone, on a new cache, in plain PyTorch,
must give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from corematching.runtime import attach, detach


def sample_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch of one image each, without its padding."""
    first = int(inputs["attention_mask"][row].argmax())
    batch, length = inputs["input_ids"].shape
    single = {}
    for name, value in inputs.items():
        own = value[row : row + 1] if len(value) == batch else value
        single[name] = own[:, first:] if own.shape[:2] == (1, length) else own
    return single


class Turns:
    """Feeds a model tokens by hand, and says what they must give.

    Parameters
    ----------
    model
        With a method on it.
    inputs : dict
        The prompts.
    cache : Cache, optional
        An empty one.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], cache: Any = None) -> None:
        self.model, self.inputs = model, inputs
        self.mask = inputs["attention_mask"]
        self.rows = list(range(len(self.mask)))
        self.fed: list[list[Tensor]] = [[] for _ in self.rows]
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        self.cache = out.past_key_values
        self._draws = torch.Generator().manual_seed(5)

    def draw(self, length: int = 1) -> Tensor:
        """(B, length) random text tokens."""
        shape = (len(self.rows), length)
        return torch.randint(5, 50, shape, generator=self._draws)

    def feed(self, length: int = 1, model: Any = None) -> Tensor:
        """(B, V) logits behind ``length`` random tokens of each row."""
        ids = self.draw(length)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        for row, new in zip(self.fed, ids, strict=True):
            row.append(new)
        positions = (self.mask.cumsum(1) - 1)[:, -length:]
        with torch.no_grad():
            out = (model or self.model)(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        return out.logits[:, -1]

    def move(self, rows: Sequence[int], change: Callable[[Any], Any]) -> None:
        """Row i becomes what row ``rows[i]`` was; ``change`` does it to the cache."""
        change(self.cache)
        self.mask = self.mask[list(rows)]
        self.rows = [self.rows[row] for row in rows]
        self.fed = [list(self.fed[row]) for row in rows]

    def cut(self, count: int, change: Callable[[Any], Any]) -> None:
        """Take back the latest ``count`` tokens; each was fed alone."""
        change(self.cache)
        self.mask = self.mask[:, :-count]
        self.fed = [row[:-count] for row in self.fed]

    def expected(self, model: Any, make_method: Callable[[Sequence[int]], Any]) -> Tensor:
        """(B, V) logits of every row's sample alone, fed as the rows were.

        ``make_method(samples)`` gives the method for a batch of these samples.
        """
        logits = []
        for sample, fed in zip(self.rows, self.fed, strict=True):
            attach(model, make_method([sample]), "torch")
            try:
                with torch.no_grad():
                    out = model(**sample_of(self.inputs, sample), use_cache=True)
                    for ids in fed:
                        cache = out.past_key_values
                        out = model(input_ids=ids[None], past_key_values=cache, use_cache=True)
            finally:
                detach(model)
            logits.append(out.logits[0, -1])
        return torch.stack(logits)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Logits within 1e-4 of their scale."""
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * scale)
