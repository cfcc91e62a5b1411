"""One answer, streamed and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import TextStreamer

from corematching.cli.prompt import build_inputs
from corematching.named_models import LoadedModel

Writer = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """The answer of the model, and its times.

    Attributes
    ----------
    text : str
    ttft : float
        Seconds from the question to the first token, the processor's work included.
    tpot : float or None
        Seconds per further token; None when there was only one.
    new_tokens : int
    run : Any
        The result of the method's context manager; None for a dense answer.
    """

    text: str
    ttft: float
    tpot: float | None
    new_tokens: int
    run: Any = None

    @property
    def report(self) -> Any:
        return self.run.report if self.run is not None else None


class TimedStreamer(TextStreamer):
    """Passes on each piece of text as it comes, and notes each token's time."""

    def __init__(self, tokenizer: Any, write: Writer) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


def ask(
    loaded: LoadedModel,
    images: Sequence[Image.Image],
    question: str,
    max_new_tokens: int,
    method: Callable[[Any], AbstractContextManager[Any]] | None = None,
    write: Writer = lambda text: None,
) -> Answer:
    """Answer a question, greedily.

    Parameters
    ----------
    loaded : LoadedModel
    images : list of Image
    question : str
    max_new_tokens : int
    method : callable, optional
        ``method(model)`` is a context manager that yields a run with a report; default: dense.
    write : callable
        Called with each piece of the answer as it comes.
    """
    import torch

    streamer = TimedStreamer(loaded.tokenizer, write)
    context = method(loaded.model) if method else nullcontext()
    with context as run, torch.inference_mode():
        start = time.perf_counter()
        inputs = build_inputs(loaded, images, question, max_new_tokens)
        output = loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
        )
    new = output[0, inputs["input_ids"].shape[1] :]
    times = streamer.times
    steps = len(times) - 1
    return Answer(
        text=loaded.tokenizer.decode(new, skip_special_tokens=True).strip(),
        ttft=times[0] - start,
        tpot=(times[-1] - times[0]) / steps if steps else None,
        new_tokens=len(times),
        run=run,
    )
