"""What a request says about its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from corematching.errors import ConfigError

MOST_STOPS, MOST_LOGPROBS, MOST_ANSWERS = 4, 20, 16
DENSE = "dense"
USUAL_TOKENS = 256
"""The longest answer where a request does not say."""


@dataclass(frozen=True)
class AnswerOptions:
    """How one request is answered.

    Parameters
    ----------
    max_tokens : int or None
        The longest answer, in tokens. None: 256, or fewer where the model has no positions for so
        many.
    temperature : float or None
        0 takes the likeliest token. None: what the model's generation config says where that
        samples, else 0.
    top_p : float or None
        Draw from the likeliest tokens that together reach this probability, in (0, 1].
    top_k : int or None
        Draw from so many of the likeliest tokens; 0 or -1: all.
    min_p : float
        Leave out tokens less likely than this ratio of the likeliest one, in [0, 1].
    seed : int or None
        The same seed draws the same answer. None: another one each time.
    stop : tuple of str
        Texts that end the answer and are not part of it.
    n : int
        Answers to the same prompt.
    repetition_penalty : float
        Divides the logits of tokens of prompt and answer (multiplies negative ones); 1: none.
    presence_penalty, frequency_penalty : float
        Taken from the logits of the answer's tokens, once or for each time; in [-2, 2].
    logprobs : int or None
        Give the log probability of each token, and so many of the likeliest ones beside it.
    ignore_eos : bool
        Go on behind the end token, up to ``max_tokens``; for measurements.
    keep_ratio : float or str or None
        The ratio of the image tokens that this request keeps; "dense": all tokens and all neurons;
        None: as the engine's method says.

    Raises
    ------
    ConfigError
        A value is of another type or out of range; `ConfigError.field` names it.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    ignore_eos: bool = False
    keep_ratio: float | str | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("n", self.n, 1, MOST_ANSWERS)
        _check_int("top_k", self.top_k, -1)
        _check_int("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        _check_int("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.keep_ratio != DENSE:
            if isinstance(self.keep_ratio, str):
                raise FieldError("keep_ratio", "a ratio in (0, 1] or 'dense'", self.keep_ratio)
            _check_float("keep_ratio", self.keep_ratio, 0.0, 1.0, above=True)
        if len(stop) > MOST_STOPS or not all(isinstance(x, str) and x for x in stop):
            raise FieldError("stop", f"at most {MOST_STOPS} texts, none empty", list(stop))

    @classmethod
    def make(cls, options: dict[str, Any]) -> AnswerOptions:
        """Options from keyword arguments.

        Raises
        ------
        ConfigError
            A name is unknown.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option '{name}': known: {', '.join(known)}")
        return cls(**options)


class FieldError(ConfigError):
    """An option of a request is of another type or out of range.

    Attributes
    ----------
    field : str
        Its name.
    """

    def __init__(self, field: str, wanted: str, value: Any) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        super().__init__(f"{field}={shown}: give {wanted}")
        self.field = field


def _check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    if value is None and name != "n":
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        to = "or more" if most is None else f"to {most}"
        raise FieldError(name, f"an integer, {least} {to}", value)


def _check_float(name: str, value: Any, least: float, most: float, above: bool = False) -> None:
    if value is None and name in ("temperature", "top_p", "keep_ratio"):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and least <= value <= most
    if not inside or (above and value == least):
        low = "(" if above else "["
        raise FieldError(name, f"a number in {low}{least:g}, {most:g}]", value)
