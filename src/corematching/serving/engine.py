"""An engine in this process: chats in, answers out, many at a time."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from corematching.chat import Turn, encode, pictures_of
from corematching.errors import ConfigError, EngineClosedError, InputError, translating
from corematching.inputs import max_positions
from corematching.methods import CoreMatching, Dense
from corematching.methods.base import BaseMethod
from corematching.named_models import LoadedModel, load_named
from corematching.policies.component import parameters_of
from corematching.runtime.flops import layer_costs
from corematching.runtime.substitute import check_substitute
from corematching.serving.answers import AnswerStream, Completion
from corematching.serving.choices import ChoiceForm
from corematching.serving.features import FeatureCache
from corematching.serving.groups import Row, SlotGroup
from corematching.serving.messages import read_messages
from corematching.serving.observer import Observer
from corematching.serving.params import DENSE, USUAL_TOKENS, AnswerOptions, FieldError
from corematching.serving.prompt import PromptReader
from corematching.serving.request import Chunk, Request
from corematching.serving.scheduler import Scheduler
from corematching.sizes import parse_size

log = logging.getLogger(__name__)

WARM_UP = "Hello."


class Engine:
    """Answers many chats at a time from one model with one method.

    Prompts are read one at a time; the answers decode together, each with its own length, sampling
    options and core neurons. The model belongs to the engine until `close`; other code that runs it
    meanwhile makes the engine wait, and may be refused.

    Parameters
    ----------
    loaded : LoadedModel
        The model and its processor.
    method : BaseMethod, optional
        Default: `CoreMatching`.
    max_batch : int
        Answers that decode at a time.
    kv_memory : str or int
        Bytes for the keys and values of the running answers, such as ``"2GiB"``. A request is
        admitted when what it may need fits: the tokens that its prompt keeps and its longest
        answer. Where several decode together, each row counts as long as the longest. What a
        prompt takes while it is read is not included.
    max_queue : int
        Requests that wait; a further one is refused.
    image_memory : str or int or None
        Bytes for the vision features of recent pictures, so that the next question about them does
        not run the vision tower; None: they are not kept.
    engine : str
        What runs the model: ``auto``, ``torch`` or ``native``, as in `BaseMethod.install`.
    observer : Observer, optional
        Told what happens.

    Raises
    ------
    ConfigError
        A number is out of range.
    UnsupportedModelError
        The method cannot run on the model.

    Examples
    --------
    >>> engine = Engine.from_pretrained("SceneVLM")  # doctest: +SKIP
    >>> async for chunk in engine.chat([{"role": "user", "content": "Hello."}], max_tokens=8):
    ...     print(chunk.text, end="")  # doctest: +SKIP
    """

    def __init__(
        self,
        loaded: LoadedModel,
        method: BaseMethod | None = None,
        *,
        max_batch: int = 16,
        kv_memory: str | int = "2GiB",
        max_queue: int = 64,
        image_memory: str | int | None = "256MiB",
        engine: str = "auto",
        observer: Observer | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: give an integer of at least 1")
        memory, observer = parse_size("kv_memory", kv_memory), observer or Observer()
        kept = 0 if image_memory is None else parse_size("image_memory", image_memory)
        self.loaded, self.method = loaded, method or CoreMatching()
        self.max_batch, self.kv_memory = max_batch, memory
        self._tokenizer = copy.deepcopy(loaded.tokenizer)
        self._run = self.method.install(loaded.model, engine)
        try:
            token_bytes = sum(cost.kv_bytes for cost in layer_costs(self._run.spec))
            self._reader = PromptReader(self._run, FeatureCache(loaded.model, kept, observer))
            self._scheduler = Scheduler(
                self._reader,
                self._warm_up(),
                copy.deepcopy(loaded.tokenizer),
                max_batch,
                max_queue,
                memory,
                token_bytes,
                observer,
            )
        except BaseException:
            self._run.remove()
            raise
        self._substitutes: dict[Any, BaseMethod | None] = {None: None}
        self._preparing = ThreadPoolExecutor(1, "corematching-prompts")
        self._scheduler.start()

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        method: BaseMethod | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ) -> Engine:
        """Load a model and put an engine on it.

        Parameters
        ----------
        name : str, optional
            "SceneVLM" (the default), a directory, or an id on the Hugging Face Hub.
        method : BaseMethod, optional
        device, dtype : optional
            As in `load_named`.
        **options
            Of `Engine`.
        """
        return cls(load_named(name, device, dtype), method, **options)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.loaded.name

    @property
    def waiting(self) -> int:
        """Requests whose prompt has not been read."""
        return self._scheduler.queue.taken

    @property
    def running(self) -> int:
        """Answers that decode."""
        return self._scheduler.running

    @property
    def kv_bytes(self) -> int:
        """Bytes that the running answers' keys and values may come to take."""
        return self._scheduler.kv_bytes

    @property
    def error(self) -> BaseException | None:
        """What has stopped the engine, if anything has."""
        return self._scheduler.error

    async def chat(
        self, messages: Sequence[dict[str, Any]], **options: Any
    ) -> AsyncIterator[Chunk]:
        """Answer a chat, piece by piece. Leaving the loop drops the request.

        Parameters
        ----------
        messages : sequence of dict
            ``{"role": "user", "content": ...}`` each; the content is a text, or a list of
            ``{"type": "text", "text": str}`` and ``{"type": "image", "image": Image}``.
        **options
            Of `AnswerOptions`.

        Raises
        ------
        ConfigError, InputError
            An option or a message is wrong, or the prompt does not fit.
        QueueFullError, EngineClosedError
            The engine takes no more requests now, or for good.
        """
        stream = await self.start(messages, AnswerOptions.make(options))
        try:
            async for chunk in stream:
                yield chunk
        finally:
            stream.cancel()

    async def complete(self, messages: Sequence[dict[str, Any]], **options: Any) -> Completion:
        """Answer a chat; as `chat`, but whole."""
        stream = await self.start(messages, AnswerOptions.make(options))
        return await stream.collect()

    async def start(
        self, messages: Sequence[dict[str, Any]], options: AnswerOptions
    ) -> AnswerStream:
        """Queue a request; as `chat`, but errors of the request are raised here already."""
        queue = self._scheduler.queue
        queue.reserve()
        loop = asyncio.get_running_loop()
        stream = AnswerStream(loop, queue)
        work = loop.run_in_executor(self._preparing, self._prepare, messages, options, stream)
        try:
            request = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(lambda _: queue.give_back())
            raise
        except BaseException:
            queue.give_back()
            raise
        stream.request = request
        queue.submit(request)
        return stream

    def close(self, grace: float = 0.0) -> bool:
        """Take no more requests, stop after ``grace`` seconds, and take the method off the model.

        Returns
        -------
        bool
            Whether all requests had ended.
        """
        done = self._scheduler.close(grace)
        self._preparing.shutdown(wait=True)
        self._run.remove()
        return done

    def token_text(self, token: int) -> str:
        """A token of the vocabulary as text."""
        text: str = self._tokenizer.decode([token])
        return text

    def drain(self) -> None:
        """Take no more requests; those that wait or run go on."""
        self._scheduler.queue.close()

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return self._scheduler.is_busy

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _prepare(
        self, messages: Sequence[dict[str, Any]], options: AnswerOptions, stream: AnswerStream
    ) -> Request:
        """A request's prompt, in a thread of its own."""
        if self._scheduler.queue.stopped:
            raise EngineClosedError("the engine has stopped")
        method = self._substitute(options.keep_ratio)
        turns = read_messages(messages)
        inputs = self._encode(turns, options.max_tokens or 1)
        length, image = self._reader.count_tokens(inputs)
        most_new = options.max_tokens or self._usual_tokens(length)
        kept = _most_kept(self.method if method is None else method, image)
        request = Request(
            inputs=inputs,
            options=replace(options, max_tokens=most_new),
            method=method,
            deliver=stream.deliver,
            prompt=inputs["input_ids"][0].tolist(),
            image_tokens=image,
            most=length - image + kept + most_new,
        )
        self._scheduler.check(request)
        return request

    def _usual_tokens(self, length: int) -> int:
        """The longest answer to a prompt of so many tokens, where the request does not say."""
        limit = max_positions(self.loaded.model.config, self.loaded.tokenizer)
        return USUAL_TOKENS if limit is None else max(1, min(USUAL_TOKENS, limit - length))

    def _encode(self, turns: Sequence[Turn], new_tokens: int) -> Any:
        if pictures_of(turns) and not self.loaded.takes_images:
            raise InputError(f"'{self.name}' is a text-only model: leave the pictures out")
        with (
            translating(
                f"the processor of '{self.name}' cannot take this chat", "ask something else"
            ),
            torch.inference_mode(),
        ):
            return encode(self.loaded.model, self.loaded.processor, [turns], new_tokens)

    def _substitute(self, ratio: float | str | None) -> BaseMethod | None:
        """The method for a request's ``keep_ratio``."""
        if ratio not in self._substitutes:
            known = self._substitutes if len(self._substitutes) < 1000 else {None: None}
            self._substitutes = {**known, ratio: self._at_ratio(ratio)}
        return self._substitutes[ratio]

    def _at_ratio(self, ratio: float | str | None) -> BaseMethod:
        if ratio == DENSE:
            return Dense()
        if self.method.tokens is None or "keep_ratio" not in parameters_of(type(self.method)):
            wanted = f"'dense' or nothing: '{self.method.name}' has no such parameter"
            raise FieldError("keep_ratio", wanted, ratio)
        values = self.method.to_dict()
        values |= {name: None for name in ("keep_tokens", "budget") if name in values}
        method = BaseMethod.from_dict({**values, "keep_ratio": ratio})
        check_substitute(self._run.spec, self.method, method)
        return method

    @torch.inference_mode()
    def _warm_up(self) -> ChoiceForm:
        """Run a prompt and a step, and see what the method's choices look like."""
        inputs = self._encode(read_messages([{"role": "user", "content": WARM_UP}]), 2)
        prompt = self._reader.read(inputs, None)
        widths = dict(enumerate(self._run.spec.widths))
        form = ChoiceForm(prompt.neurons, widths)
        if prompt.is_plain:
            group = SlotGroup(self.loaded.model)
            group.add(Row(replace(prompt), form.fill(prompt.neurons), prompt.kept + 1))
            group.step([int(prompt.logits.argmax())])
        return form


def _most_kept(method: BaseMethod, image_tokens: int) -> int:
    """The most image tokens that a method may keep."""
    if method.tokens is None:
        return image_tokens
    ratio = getattr(method, "keep_ratio", None)
    count = getattr(method, "keep_tokens", None)
    ratio, count = (x[-1] if isinstance(x, tuple) else x for x in (ratio, count))
    if ratio is not None:
        return min(image_tokens, int(ratio * image_tokens) + 1)
    return image_tokens if count is None else min(image_tokens, count)
