"""The work of `corematching run` and `corematching demo`, after the options are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from PIL import Image

from corematching.cli import console
from corematching.cli.answer import Answer, Writer, ask
from corematching.cli.loading import load_model
from corematching.cli.method_options import build_method, build_text_method
from corematching.cli.outputs import check_file
from corematching.cli.overlay import Choice, draw_overlay, shown_area
from corematching.cli.prompt import build_inputs
from corematching.errors import ConfigError, InputError
from corematching.extras import require_plots
from corematching.media import read_picture
from corematching.named_models import LoadedModel
from corematching.report import MemoryReport
from corematching.sizes import format_size, parse_size

WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Request:
    """The options of a run.

    Attributes
    ----------
    question : str
    images : tuple of str
        Paths and URLs.
    model, device : str or None
    dtype, engine : str
    memory : str or None
        The cap on the model's memory.
    method : str
        Name of the method.
    options : dict
        The method options that were given.
    compare, as_json : bool
    overlay : Path or None
    max_new_tokens : int
    """

    question: str
    images: tuple[str, ...] = ()
    model: str | None = None
    device: str | None = None
    dtype: str = "auto"
    engine: str = "auto"
    memory: str | None = None
    method: str = "corematching"
    options: dict[str, Any] | None = None
    compare: bool = False
    as_json: bool = False
    overlay: Path | None = None
    max_new_tokens: int = 64


def answer_request(request: Request) -> None:
    """Check the request, load the model, answer, and show the result."""
    with console.noting_old_names():
        method = build_method(request.method, request.options or {})
    check_overlay(request)
    check_memory(request)
    images = [read_picture(source, public_only=False) for source in request.images]
    loaded = load_model(request.model, request.device, request.dtype, request.memory)
    build_inputs(loaded, images, request.question, request.max_new_tokens)  # refuses what is wrong
    if not loaded.takes_images:
        method = build_text_method(request.method, request.options or {})
    # refuses an unsupported model before anything runs
    with method(loaded.model, request.engine, request.memory):
        pass
    dense, sparse = run_both(request, loaded, images, method)
    if request.as_json:
        print(json.dumps(describe(loaded, method, dense, sparse), allow_nan=False))
    else:
        console.out.print()
        console.show_table(sparse.report.table(sparse, dense))
        if sparse.report.memory is not None:
            console.note(describe_memory(sparse.report.memory))
    if request.overlay:
        save_overlay(request.overlay, loaded, images, sparse.report, method)


def check_overlay(request: Request) -> None:
    """Check that the overlay can be drawn, before any work is done."""
    if request.overlay is None:
        return
    require_plots("--overlay")
    if not request.images:
        raise InputError("--overlay needs a picture: give one with --image")
    check_file(request.overlay, "--overlay")


def check_memory(request: Request) -> None:
    """Check the memory cap; a dense run has none."""
    if request.memory is None:
        return
    parse_size("--memory", request.memory)
    if request.compare:
        raise ConfigError(
            "--compare runs the model dense as well, which needs all of its weights in memory: "
            "leave out --compare or --memory"
        )


def describe_memory(memory: MemoryReport) -> str:
    """One line: the peak, the cap, and what was streamed."""
    peak, cap, streamed = map(
        format_size, (memory.peak_bytes, memory.cap_bytes, memory.streamed_bytes)
    )
    return f"memory: {peak} at most, cap {cap}; the prompt streamed {streamed}"


def run_both(
    request: Request, loaded: LoadedModel, images: Sequence[Image.Image], method: Any
) -> tuple[Answer | None, Answer]:
    """Answer dense if requested, then sparse, both on the same engine."""
    arguments = (loaded, images, request.question)
    baseline = partial(build_method("dense", {}), engine=request.engine)
    method = partial(method, engine=request.engine, memory=request.memory)
    if request.compare:
        with console.waiting("warming up"):
            ask(*arguments, WARM_UP_TOKENS, baseline)
            ask(*arguments, WARM_UP_TOKENS, method)
    dense = None
    if request.compare:
        with speaking("dense", request) as write:
            dense = ask(*arguments, request.max_new_tokens, baseline, write)
    with speaking("sparse" if request.compare else "", request) as write:
        sparse = ask(*arguments, request.max_new_tokens, method, write)
    return dense, sparse


class speaking:  # noqa: N801
    """Shows an answer as it comes, with a bar until its first piece."""

    def __init__(self, label: str, request: Request) -> None:
        self.label = f"{label + ':':8}" if label else ""
        self.silent = request.as_json
        self.bar: Any = None

    def __enter__(self) -> Writer:
        self.bar = console.waiting(f"reading {self.label.strip(': ')}".strip())
        self.bar.__enter__()
        return self.write

    def write(self, text: str) -> None:
        starts = self.bar is not None
        self.stop_bar()
        if self.silent:
            return
        if starts and self.label:
            console.out.print(self.label, style="bold", end="")
        console.out.print(text, end="", markup=False, emoji=False, soft_wrap=True)
        console.out.file.flush()

    def stop_bar(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None

    def __exit__(self, *exception: Any) -> None:
        self.stop_bar()
        if not self.silent and exception[0] is None:
            console.out.print()


def describe(
    loaded: LoadedModel, method: Any, dense: Answer | None, sparse: Answer
) -> dict[str, Any]:
    """The object that ``--json`` prints."""
    compared = {"dense_answer": dense.text} if dense else {}
    return {
        "answer": sparse.text,
        **compared,
        "model": loaded.name,
        "method": method.to_dict(),
        "report": sparse.report.to_dict(),
    }


def save_overlay(
    path: Path, loaded: LoadedModel, images: Sequence[Image.Image], report: Any, method: Any
) -> None:
    """Draw the overlay and print its path."""
    image_processor = getattr(loaded.processor, "image_processor", None)
    areas = [shown_area(image, image_processor) for image in images]
    sample = report.samples[0]
    choice = Choice(
        keep=sample.keep_mask,
        scores=[nan if score is None else score for score in sample.scores],
        cut=nan if sample.cut is None else sample.cut,
        title=name_score(method),
    )
    square = has_square_patches(loaded, image_processor)
    drawn = draw_overlay(path, areas, choice, square)
    why = "" if drawn else f" (only the curve: {loaded.name}'s image tokens form no square grid)"
    console.note(f"overlay: {path}{why}")


def name_score(method: Any) -> str:
    """The label of the curve's axis."""
    name = getattr(getattr(method.tokens, "score", None), "name", None)
    return f"score: {name}" if name else "score"


def has_square_patches(loaded: LoadedModel, image_processor: Any) -> bool:
    """Whether the model turns a whole image into one square of tokens."""
    tiled = ("image_grid_pinpoints", "min_patches", "do_image_splitting", "merge_size")
    if any(getattr(image_processor, name, None) for name in tiled):
        return False
    return loaded.model.config.model_type in ("llava", "paligemma", "gemma3", "got_ocr2")
