"""Answers of a model with a method to chat requests, in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from corematching.chat import Turn, adds_special_tokens, encode, pictures_of, render, takes_images
from corematching.errors import InputError
from corematching.lab.evaluate.lmms.settings import Settings, StopAtText, cut_at
from corematching.methods import BaseMethod
from corematching.report import Report


@dataclass(frozen=True)
class Response:
    """The answer of the model to one request.

    Attributes
    ----------
    text : str
        Up to a text that ends it.
    prompt_tokens, new_tokens : int
        Padding not counted.
    """

    text: str
    prompt_tokens: int
    new_tokens: int


@dataclass
class Totals:
    """Sums over all requests that one call answered."""

    seconds: float = 0.0
    new_tokens: int = 0
    pictures: int = 0
    kept: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, report: Report, seconds: float) -> None:
        """Add a batch."""
        self.seconds += seconds
        for sample in report.samples:
            self.new_tokens += sample.new_tokens
            self.pictures += sample.image_tokens > 0
            self.kept += sample.token_retention_ratio if sample.image_tokens else 0
            for name in ("prefill_flops", "kv_bytes"):
                for key in (name, f"dense_{name}"):
                    self.counts[key] = self.counts.get(key, 0) + getattr(sample, key)

    def ratios(self) -> dict[str, float]:
        """Ratios to the dense run: image tokens (mean per prompt), FLOPs, KV bytes."""
        ratios = {"image_tokens_kept": self.kept / self.pictures} if self.pictures else {}
        for name in ("prefill_flops", "kv_bytes"):
            if self.counts.get(f"dense_{name}"):
                ratios[f"{name}_share"] = self.counts[name] / self.counts[f"dense_{name}"]
        return ratios


class Responder:
    """A model, its processor and a method.

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin
        With a tokenizer.
    method : BaseMethod
        Installed on the model for each batch.
    """

    def __init__(self, model: Any, processor: Any, method: BaseMethod) -> None:
        if not takes_images(processor):
            raise InputError(
                "the model takes no pictures: choose a vision-language model (see "
                "`corematching models`)"
            )
        self.model, self.processor, self.method = model, processor, method
        self.totals = Totals()

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def answer(self, chats: Sequence[Sequence[Turn]], settings: Settings) -> list[Response]:
        """Answer a batch; those with pictures and those without run apart.

        Parameters
        ----------
        chats : sequence of sequence of Turn
        settings : Settings
            The same for all.

        Returns
        -------
        list of Response
            In the order of ``chats``.
        """
        return _apart(chats, lambda rows: self._answer([chats[row] for row in rows], settings))

    def score(
        self, chats: Sequence[Sequence[Turn]], continuations: Sequence[str]
    ) -> list[tuple[float, bool]]:
        """The log-probability of continuations of a batch, with the method on the model.

        The prompt is one prefill and the continuation is decoded token by token, as an answer is,
        so that tokens are dropped and neurons chosen as they are for an answer.

        Returns
        -------
        list of (float, bool)
            The log-probability, and whether greedy search would have said the same.

        Raises
        ------
        InputError
            A continuation is empty.
        """
        return _apart(
            chats,
            lambda rows: self._score([chats[r] for r in rows], [continuations[r] for r in rows]),
        )

    def _answer(self, chats: list[Sequence[Turn]], settings: Settings) -> list[Response]:
        inputs = encode(self.model, self.processor, chats)
        width = inputs["input_ids"].shape[1]
        options: dict[str, Any] = dict(settings.options)
        if settings.until:
            stop = StopAtText(self.tokenizer, settings.until, width)
            options["stopping_criteria"] = StoppingCriteriaList([stop])
        output, report = self._generate(inputs, **options)
        texts = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [
            Response(cut_at(text, settings.until).strip(), sample.prompt_tokens, sample.new_tokens)
            for text, sample in zip(texts, report.samples, strict=True)
        ]

    def _score(
        self, chats: list[Sequence[Turn]], continuations: list[str]
    ) -> list[tuple[float, bool]]:
        pairs = zip(chats, continuations, strict=True)
        rows = [self._tokens_of(render(self.processor, turns), text) for turns, text in pairs]
        inputs = encode(self.model, self.processor, chats)
        force = ForceTokens(rows, inputs["input_ids"].shape[1], self.model.device)
        output, _ = self._generate(
            inputs,
            max_new_tokens=max(map(len, rows)),
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([force]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(output.logits, dim=1).float()  # (B, L, V)
        log_probs = logits.log_softmax(-1)
        scores = []
        for row, tokens in enumerate(rows):
            ids = torch.tensor(tokens, device=logits.device)
            chosen = log_probs[row, : len(tokens)].gather(1, ids.unsqueeze(1)).sum()
            greedy = logits[row, : len(tokens)].argmax(-1).equal(ids)
            scores.append((float(chosen), greedy))
        return scores

    def _generate(self, inputs: Any, **options: Any) -> tuple[Any, Report]:
        pad = self.model.generation_config.pad_token_id
        if pad is None:
            pad = self.tokenizer.pad_token_id
        start = time.perf_counter()
        with self.method(self.model) as run, torch.inference_mode():
            output = self.model.generate(**inputs, pad_token_id=pad, **options)
            report = run.report
        self.totals.add(report, time.perf_counter() - start)
        return output, report

    def _tokens_of(self, prompt: str, continuation: str) -> list[int]:
        """The continuation's tokens where it stands behind the prompt."""
        if not continuation:
            raise InputError("a task asks for the probability of an empty text: leave it out")
        special = adds_special_tokens(self.processor, prompt)
        whole = self.tokenizer(prompt + continuation, add_special_tokens=special)["input_ids"]
        known = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        tokens = whole[len(known) :]
        return tokens or self.tokenizer(continuation, add_special_tokens=False)["input_ids"]


class ForceTokens(LogitsProcessor):
    """Makes each sample of a batch say given tokens; a shorter one repeats its last token.

    Parameters
    ----------
    rows : sequence of sequence of int
        The tokens of each sample.
    start : int
        Tokens of the prompt.
    device : torch.device
    """

    def __init__(self, rows: Sequence[Sequence[int]], start: int, device: Any) -> None:
        longest = max(map(len, rows))
        padded = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
        self.ids, self.start = torch.tensor(padded, device=device), start

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        """(B, V), minus infinity but for the token to be said."""
        wanted = self.ids[:, input_ids.shape[1] - self.start].unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def _apart(chats: Sequence[Sequence[Turn]], work: Callable[[list[int]], list[Any]]) -> list[Any]:
    """Do the chats with pictures and those without separately, and put the results in order."""
    results: list[Any] = [None] * len(chats)
    for wanted in (True, False):
        rows = [row for row, turns in enumerate(chats) if bool(pictures_of(turns)) == wanted]
        for row, result in zip(rows, work(rows) if rows else [], strict=True):
            results[row] = result
    return results
