"""A harness's arguments, read: the method, the dtype, and how to generate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from corematching.errors import ConfigError
from corematching.methods import BaseMethod, method_from_text

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
FILLER = "\n\n"
"""lmms-eval's ``until`` for tasks that name none; it would cut answers of several paragraphs."""
_SAMPLING = ("temperature", "top_p", "top_k")
_PASSED = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")


def read_method(text: str) -> BaseMethod:
    """Make a method from ``NAME[:param=value;...]``; commas work too where the harness lets them.

    Raises
    ------
    ConfigError
        A name or a parameter is unknown or out of range.
    """
    return method_from_text(str(text).strip().strip("'\"").replace(";", ","))


def read_batch_size(value: Any) -> int:
    """A whole number of at least 1.

    Raises
    ------
    ConfigError
        It is none; "auto" is not known here.
    """
    try:
        size = int(value)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size={value}: give a whole number of at least 1")
    return size


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes
    ----------
    until : tuple of str
        An answer ends in front of the first of these that it says.
    options : dict
        For ``model.generate``.
    """

    until: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Read a task's ``generation_kwargs``.

    A temperature above 0 samples, unless ``do_sample`` is False. What ``generate`` has no use for,
    such as options for single model families, is left out and named in the log.

    Raises
    ------
    ConfigError
        ``max_new_tokens`` is below 1, or ``until`` is no text and no list of texts.
    """
    values = {name: value for name, value in given.items() if value is not None}
    temperature = float(values.get("temperature", 0))
    length = int(values.pop("max_new_tokens", values.pop("max_gen_toks", MAX_NEW_TOKENS)))
    if length < 1:
        raise ConfigError(f"max_new_tokens={length}: give a whole number of at least 1")
    sample = temperature > 0 and bool(values.pop("do_sample", True))
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": sample}
    for name in _SAMPLING:
        options[name] = values.pop(name, None) if sample else None
    options["num_beams"] = int(values.pop("num_beams", 1))
    options |= {name: values.pop(name) for name in _PASSED if name in values}
    until = read_until(values.pop("until", ()))
    unused = sorted(set(values) - {*_SAMPLING, "do_sample"})
    if unused:
        logger.info("generation_kwargs without effect here: %s", ", ".join(unused))
    return Settings(until, {k: v for k, v in options.items() if v is not None or not sample})


def read_until(value: Any) -> tuple[str, ...]:
    """One text or several, without empty ones and without lmms-eval's `FILLER`."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"until={value!r}: give a text or a list of texts")
    return tuple(text for text in texts if text and text != FILLER)


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text in front of the first of ``until``."""
    ends = [text.find(end) for end in until if end in text]
    return text[: min(ends)] if ends else text


class StopAtText(StoppingCriteria):
    """Ends an answer once it has said one of some texts; the prompt does not count.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
    until : sequence of str
    start : int
        Tokens of the prompt.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], start: int) -> None:
        self.tokenizer, self.until, self.start = tokenizer, tuple(until), start
        self.tail = max(len(text.encode()) for text in self.until) + 1

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool, of (B, T) ids."""
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=False)
        said = [any(end in text for end in self.until) for text in texts]
        return torch.tensor(said, device=input_ids.device)
