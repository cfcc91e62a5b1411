"""The settings of a run."""

from __future__ import annotations

from dataclasses import dataclass

from corematching.backends.select import check_engine
from corematching.errors import ConfigError

DENSE = "dense"
"""The text of the dense method."""


@dataclass(frozen=True)
class Plan:
    """Settings of a run.

    Attributes
    ----------
    limit : int or None
        Ask this many questions, a random sample; None: all.
    seed : int
        Of the sample and of the intervals.
    batch : int
        Questions at a time.
    max_new_tokens : int
        The longest answer.
    engine : str
        Code for prompts and decode steps; see `corematching.runtime.attach`.
    share : bool
        Compute once, for all methods, what they have in common of a batch's prompts: the layers up
        to a method's first cut. Answers are the same, but for rounding; prompts have no seconds.
    """

    limit: int | None = None
    seed: int = 0
    batch: int = 16
    max_new_tokens: int = 40
    engine: str = "auto"
    share: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "batch", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: give a whole number of at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: give a whole number of at least 0")
        check_engine(self.engine)
