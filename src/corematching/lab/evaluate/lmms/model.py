"""The two classes that lmms-eval instantiates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from corematching.chat import Turn
from corematching.lab.evaluate.lmms.responder import Responder, Totals
from corematching.lab.evaluate.lmms.settings import read_batch_size, read_method, read_settings
from corematching.lab.evaluate.lmms.turns import read_turns, user_turn
from corematching.named_models import load_named


class CoreMatchingModel(lmms):
    """What both have in common.

    Parameters
    ----------
    pretrained : str
        A directory, a hub id, or "SceneVLM", which the package ships.
    method : str
        ``NAME[:param=value;...]``; "dense" drops nothing.
    dtype : str
        "auto" (as stored), "float32", "bfloat16" or "float16".
    device : str, optional
        Default: a CUDA device when there is one, else the CPU; its own for each process.
    batch_size : int or str
        Questions at a time.
    attn_implementation : str, optional
        As ``from_pretrained`` takes it.
    """

    def __init__(
        self,
        pretrained: str = "SceneVLM",
        method: str = "corematching",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        chosen = read_method(method)
        self.batch_size = read_batch_size(batch_size)
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            device = str(self.accelerator.device)
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        loaded = load_named(str(pretrained), device, dtype)
        if attn_implementation is not None:
            loaded.model.set_attn_implementation(attn_implementation)
        self.model, self.processor = loaded.model, loaded.processor
        self.responder: Responder | None = Responder(self.model, self.processor, chosen)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def clean(self) -> None:
        """Let go of the model."""
        self.responder = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests; the results are in their order."""
        results: list[Any] = [None] * len(requests)
        responder = self._start()
        for rows in self._batches(requests, [self.settings_of(each.args) for each in requests]):
            asked = [requests[row].args for row in rows]
            given = self.settings_of(asked[0])
            responses = responder.answer([self.turns_of(a) for a in asked], read_settings(given))
            for row, arguments, said in zip(rows, asked, responses, strict=True):
                counts = TokenCounts(said.prompt_tokens, said.new_tokens)
                results[row] = GenerationResult(text=said.text, token_counts=counts)
                key = (arguments[0], given)
                self.cache_hook.add_partial("generate_until", key, said.text)
        self._log(responder.totals)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations; the results are in the requests' order."""
        results: list[Any] = [None] * len(requests)
        responder = self._start()
        for rows in self._batches(requests, [None] * len(requests)):
            asked = [requests[row].args for row in rows]
            texts = [self.continuation_of(arguments) for arguments in asked]
            scores = responder.score([self.turns_of(a) for a in asked], texts)
            for row, arguments, text, score in zip(rows, asked, texts, scores, strict=True):
                results[row] = score
                self.cache_hook.add_partial("loglikelihood", (arguments[0], text), score)
        self._log(responder.totals)
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not here.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            "tasks of output_type generate_until_multi_round go on from the model's own answers, "
            "which `--model corematching` does not do: choose generate_until or multiple_choice"
        )

    def turns_of(self, arguments: tuple[Any, ...]) -> list[Turn]:
        """A request's chat."""
        raise NotImplementedError

    def settings_of(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """A request's ``generation_kwargs``."""
        raise NotImplementedError

    def continuation_of(self, arguments: tuple[Any, ...]) -> str:
        """A request's continuation."""
        raise NotImplementedError

    def doc_of(self, doc_id: int, task: str, split: str) -> Any:
        """A task's document."""
        return self.task_dict[task][split][doc_id]

    def _start(self) -> Responder:
        assert self.responder is not None, "clean() has been called"
        self.responder.totals = Totals()
        return self.responder

    def _batches(self, requests: Sequence[Any], kinds: Sequence[Any]) -> Iterator[list[int]]:
        """Places of requests of one kind and like length, as many at a time as a batch holds."""
        groups: dict[str, list[int]] = {}
        for row, kind in enumerate(kinds):
            groups.setdefault(json.dumps(kind, sort_keys=True, default=str), []).append(row)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for rows in groups.values():
                ordered = sorted(rows, key=lambda row: len(requests[row].args[0]))
                for start in range(0, len(ordered), self.batch_size):
                    batch = ordered[start : start + self.batch_size]
                    yield batch
                    bar.update(len(batch))

    def _log(self, totals: Totals) -> None:
        log_metrics(
            total_elapsed_time=totals.seconds,
            total_gen_tokens=totals.new_tokens,
            avg_speed=totals.new_tokens / totals.seconds if totals.seconds else 0.0,
            additional_metrics=totals.shares(),
        )


class CoreMatchingChat(CoreMatchingModel):
    """Takes chat messages, in which a task says where its pictures belong."""

    is_simple = False

    def turns_of(self, arguments: tuple[Any, ...]) -> list[Turn]:
        """The task's own messages."""
        _, to_messages, _, *place = arguments
        return read_turns(to_messages(self.doc_of(*place)))

    def settings_of(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Third of a request's arguments."""
        return arguments[2]

    def continuation_of(self, arguments: tuple[Any, ...]) -> str:
        """Not in chat mode.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            "tasks of output_type loglikelihood or multiple_choice (seedbench_ppl, the *_mcppl "
            "ones) have no chat messages: add --force_simple"
        )


class CoreMatchingSimple(CoreMatchingModel):
    """Takes a text and pictures (``--force_simple``); the only one for log-likelihoods."""

    is_simple = True

    def turns_of(self, arguments: tuple[Any, ...]) -> list[Turn]:
        """The text as one user's turn; without pictures where a request names no document."""
        text, _, *rest = arguments
        if not rest or rest[0] is None:
            return user_turn(text, [])
        to_visual, *place = rest
        return user_turn(text, to_visual(self.doc_of(*place)) or [])

    def settings_of(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Second of a request's arguments."""
        return arguments[1]

    def continuation_of(self, arguments: tuple[Any, ...]) -> str:
        """A text, or what a task reads from the document."""
        target = arguments[1]
        return target if isinstance(target, str) else target(self.doc_of(*arguments[3:]))
