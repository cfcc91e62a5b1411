"""How far a training run is, by steps or by the clock, and the rate that goes with it."""

from __future__ import annotations

import math
import time


class Schedule:
    """Progress of a run that ends after so many steps or minutes, whichever comes first.

    The clock starts when the first step is done, so that compilation costs no learning; on
    resuming it goes on where the checkpoint left it.
    """

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps, self.seconds = steps, math.inf if minutes is None else 60 * minutes
        self.step, self._before, self._started = 0, 0.0, None

    @property
    def elapsed(self) -> float:
        """Seconds since the first step was done."""
        return self._before + (time.time() - self._started if self._started else 0.0)

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        return min(1.0, max(self.step / self.steps, self.elapsed / self.seconds))

    @property
    def done(self) -> bool:
        return self.progress >= 1.0

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
        self._started = self._started or time.time()

    def resume(self, state: dict) -> None:
        self.step, self._before = state["step"], state["seconds"]

    def state(self) -> dict:
        return {"step": self.step, "seconds": self.elapsed}

    def rate(self, peak: float, warmup: float = 0.04) -> float:
        """Linear warm-up over a share of the run, then a cosine to a hundredth of the peak."""
        if self.progress < warmup:
            return peak * max(self.progress / warmup, 0.01)
        rest = (self.progress - warmup) / (1 - warmup)
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * rest)))
