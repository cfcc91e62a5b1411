"""One answer of a run, written and read back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

RATIOS = ("tokens_kept", "neurons_kept", "layer_tokens")
FLOATS = (*RATIOS, "kl", "vision_seconds", "prefill_seconds", "decode_seconds")
ROUNDING = 1e-6


@dataclass(frozen=True)
class Answer:
    """One answer and its cost.

    Attributes
    ----------
    id : int
        The question.
    text : str
    correct : bool
    kl : float
        Of the first token, dense from sparse, in nats.
    tokens_kept, neurons_kept : float
        Ratios of the image tokens and of the neurons of a decode step.
    prefill_flops, dense_prefill_flops, decode_flops, dense_decode_flops : int
    kv_bytes, dense_kv_bytes : int
        As the report has them.
    vision_seconds, prefill_seconds, decode_seconds : float
        Of the batch, divided by its size; 0 of what was shared with other methods.
    new_tokens : int
    batch : int
        Size of its batch.
    layer_tokens : float or None
        Ratio of the image tokens that a layer computes, averaged over the layers; None in answers
        of versions that did not count it.

    Raises
    ------
    ValueError
        A field is of another type, or out of range: NaN, for one.
    """

    id: int
    text: str
    correct: bool
    kl: float
    tokens_kept: float
    neurons_kept: float
    prefill_flops: int
    dense_prefill_flops: int
    decode_flops: int
    dense_decode_flops: int
    kv_bytes: int
    dense_kv_bytes: int
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    new_tokens: int
    batch: int
    layer_tokens: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "layer_tokens" and value is None:
                continue
            if not _fits(item.name, value):
                raise ValueError(f"{item.name}={value!r:.60} of question {self.id!r:.20}")


def _fits(name: str, value: Any) -> bool:
    """Whether a field's value is valid."""
    if name in ("text", "correct"):
        return type(value) is (str if name == "text" else bool)
    if name in FLOATS:
        high = 1 + ROUNDING if name in RATIOS else math.inf
        return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= high
    return type(value) is int and (1 if name == "batch" else 0) <= value < 1 << 62


def read_answer(line: bytes) -> Answer:
    """Read an answer from a line of JSON.

    Raises
    ------
    ValueError
        The line holds no answer.
    """
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("no object")
    try:
        return Answer(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error
