"""One answer's next token, from its logits.

Shapes: V tokens of the vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corematching.serving.params import AnswerOptions


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability, before temperature and penalties, beside the likeliest tokens'.

    Attributes
    ----------
    token : int
    logprob : float
    top : tuple of (int, float)
        The likeliest tokens and their log probabilities, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Defaults:
    """What a model's generation config says about sampling."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, config: Any) -> Defaults:
        """Read a generation config; without ``do_sample`` answers are greedy."""
        top_p = getattr(config, "top_p", None) or 1.0
        top_k = getattr(config, "top_k", None) or 0
        samples = bool(getattr(config, "do_sample", False))
        temperature = getattr(config, "temperature", None)
        heat = (1.0 if temperature is None else temperature) if samples else 0.0
        return cls(heat, top_p, top_k) if samples else cls()


class Sampler:
    """Chooses the tokens of one answer.

    Parameters
    ----------
    options : AnswerOptions
        The request's.
    index : int
        Which of its answers; each has a random stream of its own.
    prompt : sequence of int
        The prompt's tokens, for the repetition penalty.
    defaults : Defaults
        For what the request leaves open.
    """

    def __init__(
        self, options: AnswerOptions, index: int, prompt: Sequence[int], defaults: Defaults
    ) -> None:
        self.options = options
        heat, top_p, top_k = options.temperature, options.top_p, options.top_k
        self.temperature = defaults.temperature if heat is None else heat
        self.top_p = defaults.top_p if top_p is None else top_p
        self.top_k = defaults.top_k if top_k is None else top_k
        self.counts: dict[int, int] = {}
        self._seen = set(prompt) if options.repetition_penalty != 1.0 else set()
        self._random: torch.Generator | None = None
        if self.temperature > 0:
            seed = secrets.randbits(63) if options.seed is None else options.seed + index
            self._random = torch.Generator().manual_seed(seed & ((1 << 63) - 1))

    def choose(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token, and its log probability where the request asks for it.

        Parameters
        ----------
        logits : Tensor
            (V,) float.
        """
        raw = logits.float().cpu()
        scores = self._penalize(raw)
        token = int(scores.argmax()) if self.temperature == 0 else self._draw(scores)
        self.counts[token] = self.counts.get(token, 0) + 1
        wanted = self.options.logprobs
        return token, None if wanted is None else _describe(raw, token, wanted)

    def _penalize(self, logits: Tensor) -> Tensor:
        options = self.options
        again, there = options.repetition_penalty, options.presence_penalty
        often = options.frequency_penalty
        if again == 1.0 and not there and not often:
            return logits
        logits = logits.clone()
        if again != 1.0:
            seen = torch.tensor(sorted(self._seen | self.counts.keys()), dtype=torch.long)
            seen = seen[seen < len(logits)]  # image tokens may lie outside of the vocabulary
            old = logits[seen]
            logits[seen] = torch.where(old > 0, old / again, old * again)
        if self.counts:
            tokens = torch.tensor(list(self.counts), dtype=torch.long)
            times = torch.tensor(list(self.counts.values()), dtype=logits.dtype)
            logits[tokens] -= there + often * times
        return logits

    def _draw(self, logits: Tensor) -> int:
        """A random token; `top_k`, `top_p` and `min_p` leave out tokens in this order."""
        scores, order = (logits / self.temperature).sort(descending=True, stable=True)
        if self.top_k > 0:
            scores = scores[: self.top_k]
        odds = scores.softmax(0)
        if self.top_p < 1.0:
            ahead = odds.cumsum(0) - odds
            odds = odds[ahead < self.top_p]
        if self.options.min_p > 0:
            odds = odds[odds >= self.options.min_p * odds[0]]
        return int(order[torch.multinomial(odds, 1, generator=self._random)])


def _describe(logits: Tensor, token: int, wanted: int) -> TokenLogprob:
    logprobs = logits.log_softmax(0)
    values, tokens = logprobs.topk(wanted) if wanted else (logprobs[:0], logprobs[:0].long())
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
