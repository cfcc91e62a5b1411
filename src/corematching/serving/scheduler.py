"""The engine's thread: admits requests, reads their prompts and decodes all answers together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from corematching.errors import EngineClosedError, InputError
from corematching.serving.choices import ChoiceForm
from corematching.serving.groups import MOST_ROWS, Group, Row, SlotGroup, TurnGroup
from corematching.serving.observer import Observer
from corematching.serving.params import USUAL_TOKENS, FieldError
from corematching.serving.prompt import Prompt, PromptReader
from corematching.serving.queue import RequestQueue
from corematching.serving.request import Answer, Request
from corematching.serving.sampling import Defaults
from corematching.sizes import format_size

log = logging.getLogger(__name__)


class Scheduler:
    """Continuous batching: requests join and leave between two decode steps.

    At most one prompt is read between two steps, so that no running answer waits for longer than
    that. Requests are admitted in the order of their arrival, when their rows and the keys and
    values that they may need fit beside those of the running ones.

    Parameters
    ----------
    reader : PromptReader
    form : ChoiceForm
        Of the installed method's choices.
    tokenizer : PreTrainedTokenizer
        Used by the engine's thread only.
    max_batch, max_queue : int
        Rows that decode together, and requests that wait.
    kv_memory, token_bytes : int
        Bytes for keys and values, and those of one token.
    observer : Observer
        Told what happens.

    Attributes
    ----------
    queue : RequestQueue
        The requests whose prompt has not been read.
    groups : dict
        The rows that decode, by what those of a group have in common.
    answers : dict
        The answers that decode, by their row.
    error : BaseException or None
        What has ended the thread.
    """

    def __init__(
        self,
        reader: PromptReader,
        form: ChoiceForm,
        tokenizer: Any,
        max_batch: int,
        max_queue: int,
        kv_memory: int,
        token_bytes: int,
        observer: Observer,
    ) -> None:
        self.reader, self.form, self.tokenizer = reader, form, tokenizer
        self.max_batch = max_batch
        self.kv_memory, self.token_bytes = kv_memory, token_bytes
        self.observer = observer
        config = reader.run.model.generation_config
        ends = getattr(config, "eos_token_id", None)
        self.ends: Sequence[int] = [ends] if isinstance(ends, int) else list(ends or [])
        self.defaults = Defaults.of(config)
        self.groups: dict[Any, list[Group]] = {}
        self.answers: dict[Row, Answer] = {}
        self.error: BaseException | None = None
        self.queue, self._reading = RequestQueue(max_queue), False
        self._thread = threading.Thread(target=self._run, name="corematching-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that decode."""
        return len(self.answers)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the running answers' keys and values may come to take."""
        return self.token_bytes * sum(group.columns_with() for group in self._list_groups())

    def check(self, request: Request) -> None:
        """Refuse a request that could never be admitted.

        Raises
        ------
        ConfigError
            It asks for more answers than rows.
        InputError
            It may need more keys and values than there is memory for.
        """
        count = request.options.n
        if count > self.max_batch:
            raise FieldError("n", f"{self.max_batch} or less: so many decode at a time", count)
        needed = self.token_bytes * SlotGroup(None).columns_with(request.most, count)
        if needed > self.kv_memory:
            raise InputError(
                f"prompt and answer may need {format_size(needed)} of keys and values, and the "
                f"engine has {format_size(self.kv_memory)}: ask for fewer tokens, or raise "
                "kv_memory"
            )

    def close(self, grace: float = 0.0) -> bool:
        """Take no more requests, and stop when all have ended or after ``grace`` seconds.

        Returns
        -------
        bool
            Whether all have ended.
        """
        end = time.monotonic() + grace
        self.queue.close()
        while self.is_busy and time.monotonic() < end:
            time.sleep(0.01)
        done = not self.is_busy
        self.queue.stop()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        return done

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return self.error is None and bool(self.queue.taken or self.answers or self._reading)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self.queue.wait(busy=bool(self.answers)):
                    self._drop_cancelled()
                    self._admit()
                    self._step()
            error: BaseException = EngineClosedError("the engine has stopped before the answer")
        except BaseException as failure:
            log.exception("the engine's thread has failed")
            self.error = failure
            error = EngineClosedError("the engine has failed: see its log, and start it again")
        self.queue.stop()
        waiting = self.queue.list_waiting()
        for request in waiting:
            self.queue.take(request)
        for request in dict.fromkeys([*waiting, *(a.request for a in self.answers.values())]):
            self._end(request, error, "abort")
        self.groups.clear()

    def _drop_cancelled(self) -> None:
        gone = [request for request in self.queue.list_waiting() if request.cancelled]
        for request in gone:
            self.queue.take(request)
        running = dict.fromkeys(answer.request for answer in self.answers.values())
        for request in [*gone, *(request for request in running if request.cancelled)]:
            self._end(request, None, "abort")

    def _admit(self) -> None:
        """Read the prompt of the first waiting request, if it fits."""
        request = self.queue.first
        if request is None or not self._fits(request):
            return
        self._reading = True
        self.queue.take(request)
        try:
            self._read(request)
        except Exception as error:
            self._fail(request, error)
        finally:
            self._reading = False

    def _fits(self, request: Request) -> bool:
        count = request.options.n
        if len(self.answers) + count > self.max_batch:
            return False
        groups = self._list_groups()
        there = sum(group.columns_with() for group in groups)
        more = [g.columns_with(request.most, count) - g.columns_with() for g in groups]
        more.append(SlotGroup(None).columns_with(request.most, count))
        return self.token_bytes * (there + max(more)) <= self.kv_memory

    def _read(self, request: Request) -> None:
        start = time.perf_counter()
        prompt = self.reader.read(request.inputs, request.method)
        request.inputs = None
        request.dropped = len(request.prompt) - prompt.kept
        request.kv_bytes = prompt.kept * self.token_bytes
        self.observer.on_prompt(request.usage, start - request.arrived, time.perf_counter() - start)
        choices = self.form.fill(prompt.neurons)
        most = prompt.kept + (request.options.max_tokens or USUAL_TOKENS)
        rows = [Row(prompt, choices, most) for _ in range(request.options.n)]
        request.answers = [
            Answer(request, index, row, self.tokenizer, self.ends, self.defaults)
            for index, row in enumerate(rows)
        ]
        for answer in request.answers:
            self._take(answer, prompt.logits)
        for answer in request.answers:
            if answer.finish_reason is None:
                self._place(answer.row, prompt)
                self.answers[answer.row] = answer

    def _list_groups(self) -> list[Group]:
        """All groups as they are now; from any thread."""
        return [group for several in list(self.groups.values()) for group in several]

    def _place(self, row: Row, prompt: Prompt) -> None:
        """Put a row into a group whose rows it can decode with."""
        key = ChoiceForm.key(row.choices) if prompt.is_plain else None
        several = self.groups.setdefault(key, [])
        group = next((g for g in several if not g.together or len(g.rows) < MOST_ROWS), None)
        if group is None:
            model = self.reader.run.model
            group = TurnGroup(model) if key is None else SlotGroup(model)
            several.append(group)
        group.add(row)

    def _step(self) -> None:
        """One decode step of every group."""
        for group in self._list_groups():
            rows = group.rows
            if not group.together or not self._step_rows(group, rows):
                for row in rows:
                    if row in self.answers:
                        self._step_rows(group, [row], last=True)

    def _step_rows(self, group: Group, rows: list[Row], last: bool = False) -> bool:
        """Step some rows together; False if that failed and nothing has changed."""
        if not rows:
            return True
        try:
            logits = group.step([self.answers[row].token for row in rows], rows)
        except Exception as error:
            if not last:
                log.warning("a decode step of %d rows failed: each goes on alone", len(rows))
                return False
            self._fail(self.answers[rows[0]].request, error)
            return True
        for row, each in zip(rows, logits, strict=True):
            answer = self.answers.get(row)
            if answer is None:
                continue
            try:
                self._take(answer, each)
            except Exception as error:
                self._fail(answer.request, error)
            else:
                if answer.finish_reason is not None:
                    self._drop(row)
        return True

    def _take(self, answer: Answer, logits: Tensor) -> None:
        """Give an answer its next token, and its client the text."""
        request, first = answer.request, answer.count == 0
        chunk = answer.take(logits)
        now = time.perf_counter()
        self.observer.on_token(now - answer.last, first)
        answer.last = now
        if chunk is not None:
            done = request.is_done
            self._deliver(request, replace(chunk, usage=request.usage) if done else chunk)
            if done:
                self._end(request, None, chunk.finish_reason or "stop")

    def _fail(self, request: Request, error: BaseException) -> None:
        log.debug("a request failed", exc_info=error)
        self._end(request, error, "error")

    def _end(self, request: Request, error: BaseException | None, reason: str) -> None:
        for answer in request.answers:
            self._drop(answer.row)
        self.observer.on_end(request.usage, time.perf_counter() - request.arrived, reason)
        self._deliver(request, error)

    def _drop(self, row: Row) -> None:
        """Let a row go, and its group where it was the last one."""
        if self.answers.pop(row, None) is None:
            return
        for key, several in list(self.groups.items()):
            for group in list(several):
                if row in group.rows:
                    group.remove(row)
                if not group.rows:
                    several.remove(group)
            if not several:
                del self.groups[key]

    def _deliver(self, request: Request, event: Any) -> None:
        try:
            request.deliver(event)
        except Exception:  # its event loop has ended
            request.cancelled = True
