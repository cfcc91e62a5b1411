"""Ours: one method on one model, asked and timed."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from corematching.errors import CoreMatchingError
from corematching.lab.bench.cost import step_costs
from corematching.lab.bench.machine import synchronise
from corematching.lab.bench.workload import Workload
from corematching.memory_meter import MemoryMeter
from corematching.methods import BaseMethod


@dataclass(frozen=True)
class Measurement:
    """The times of a request for one token and one for all of them.

    Attributes
    ----------
    ttft : float
        Seconds of the request for one token, preprocessing and vision tower included.
    wall : float
        Seconds of the request for all tokens.
    peak : int
        Most bytes of memory in use.
    preprocessing, vision, prefill : float or None
        Seconds of the first request's parts, where they are known.
    """

    ttft: float
    wall: float
    peak: int
    preprocessing: float | None = None
    vision: float | None = None
    prefill: float | None = None

    def tpot(self, new_tokens: int) -> float:
        """Seconds per further token: ``(wall(n) - wall(1)) / (n - 1)``."""
        return (self.wall - self.ttft) / (new_tokens - 1)


class Contender(Protocol):
    """An engine that answers requests."""

    name: str
    kind: str

    def start(self) -> None:
        """Get ready and warm up."""
        ...

    def measure(self, number: int) -> Measurement:
        """Answer requests ``2 * number`` and ``2 * number + 1``, after one that does not count.

        The measurement before has filled the caches, and its threads may still wait for work.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The settings that were measured, as plain values; after the last measurement."""
        ...

    def stop(self) -> None:
        """Free all resources."""
        ...


class MethodContender:
    """A method of ours, installed on its own instance of the model; instances share weights.

    Parameters
    ----------
    name : str
    method : BaseMethod
    workload : Workload
    new_tokens : int
        Number of generated tokens, exactly.
    engine : str
        Code for prompts and decode steps, as for `BaseMethod.install`.
    """

    kind = "ours"

    def __init__(
        self,
        name: str,
        method: BaseMethod,
        workload: Workload,
        new_tokens: int,
        engine: str = "auto",
    ) -> None:
        self.name, self.method, self.engine = name, method, engine
        self.workload, self.new_tokens = workload, new_tokens
        self.memory = MemoryMeter(workload.model.device)
        self.held = 0
        self.others_hold = 0
        self._run: Any = None
        self._model: Any = None

    def start(self) -> None:
        before = self.memory.used
        self._model = share_weights(self.workload.model)
        self._run = self.method.install(self._model, self.engine)
        for tokens in (self.new_tokens, 1, self.new_tokens):
            self._answer(0, tokens)
        self.held = max(self.memory.used - before, 0)

    def measure(self, number: int) -> Measurement:
        self.memory.reset()
        self._answer(0, 1)
        ttft, preprocessing = self._answer(2 * number, 1)
        report = self._run.report
        wall, _ = self._answer(2 * number + 1, self.new_tokens)
        return Measurement(
            ttft=ttft,
            wall=wall,
            peak=self.memory.peak - self.others_hold,
            preprocessing=preprocessing,
            vision=report.vision_seconds,
            prefill=report.prefill_seconds,
        )

    def describe(self) -> dict[str, Any]:
        report = self._run.report
        plain = report.to_dict()
        samples = plain.pop("samples")
        for sample in samples:
            for long in ("keep_mask", "scores"):
                sample.pop(long)
        return {
            "method": self.method.to_dict(),
            "costs": step_costs(self._model, report),
            "report": {**plain, "samples": samples},
        }

    def stop(self) -> None:
        if self._run is not None:
            self.method.remove(self._model)
        self._run = self._model = None

    def _answer(self, number: int, new_tokens: int) -> tuple[float, float]:
        """Seconds of a request, and of its preprocessing."""
        device = self.workload.model.device
        opened = self.workload.open(number)
        synchronise(device)
        start = time.perf_counter()
        inputs = self.workload.prepare(opened)
        synchronise(device)
        prepared = time.perf_counter() - start
        output = generate_exactly(self._model, inputs, new_tokens)
        synchronise(device)
        seconds = time.perf_counter() - start
        made = output.shape[1] - inputs["input_ids"].shape[1]
        if made != new_tokens:
            raise CoreMatchingError(
                f"{self.name} generated {made} tokens instead of {new_tokens}: use a model that "
                "obeys min_new_tokens"
            )
        return seconds, prepared


@torch.inference_mode()
def generate_exactly(model: Any, inputs: dict[str, Any], new_tokens: int, **options: Any) -> Any:
    """Generate exactly this number of tokens, greedily."""
    pad = model.generation_config.pad_token_id
    return model.generate(
        **inputs,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0 if pad is None else pad,
        **options,
    )


def share_weights(model: Any) -> Any:
    """A second instance of a model on the very same weights."""
    memo = {id(t): t for tensors in (model.parameters(), model.buffers()) for t in tensors}
    return copy.deepcopy(model, memo)
