"""Output of the command: answers and tables to stdout, the rest to stderr."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from corematching.old_names import OldNameWarning

StepProgress = Callable[[str, float], None]

MUTED = ("accelerate", "huggingface_hub", "matplotlib", "PIL", "torch", "transformers")

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """One line beside the result."""
    err.print(message, style="dim", markup=False)


def show_table(table: str) -> None:
    """A table of plain text, its heading in bold."""
    heading, _, lines = table.partition("\n")
    out.print(heading, style="bold", markup=False, emoji=False, soft_wrap=True)
    out.print(lines, markup=False, emoji=False, soft_wrap=True)


class NoteHandler(logging.Handler):
    """Shows a log's messages as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        note(record.getMessage())


@contextmanager
def noting_old_names() -> Iterator[None]:
    """Turn each warning about a parameter's old name into one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OldNameWarning)
        yield
    for each in caught:
        if not issubclass(each.category, OldNameWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    old = [each.message for each in caught if issubclass(each.category, OldNameWarning)]
    for message in dict.fromkeys(map(str, old)):
        note(message)


def quieten_libraries() -> None:
    """Silence the libraries' warnings, and their bars without a terminal.

    `corematching.loading` reports what matters of them, such as missing weights.
    """
    import transformers

    warnings.filterwarnings("ignore", module=rf"({'|'.join(MUTED)})(\.|$)")
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    loading = logging.getLogger("corematching.loading")
    if not any(isinstance(handler, NoteHandler) for handler in loading.handlers):
        loading.addHandler(NoteHandler(logging.WARNING))
    if not err.is_terminal:
        hide_library_bars()


def keep_bars_away(own_bars: bool) -> None:
    """Silence tqdm before its import, where our bars replace it or there is no terminal."""
    if own_bars or not err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")


def hide_library_bars() -> None:
    """Switch off the progress bars of transformers and of the hub."""
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    transformers.logging.disable_progress_bar()
    disable_progress_bars()


@contextmanager
def waiting(message: str) -> Iterator[None]:
    """A bar without an end, for work of unknown length."""
    with _bar() as bar:
        bar.add_task(message, total=None)
        yield


@contextmanager
def stepping(message: str) -> Iterator[StepProgress]:
    """A bar that follows a ``progress(step, done)`` callback; it shows up at the first call."""
    bar = _bar()
    task = bar.add_task(message, total=1.0)

    def show(step: str, done: float) -> None:
        bar.start()
        bar.update(task, description=f"{message}: {step}", completed=done)

    try:
        yield show
    finally:
        bar.stop()


def counting_bar(
    before: tuple[ProgressColumn, ...] = (),
    between: tuple[ProgressColumn, ...] = (),
    transient: bool = True,
    per_second: float = 2,
) -> Progress:
    """A bar with a count; ``before`` is in front of it, ``between`` behind it."""
    return Progress(
        *before,
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *between,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=transient,
        refresh_per_second=per_second,
        disable=not err.is_terminal,
    )


def _bar() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    )
    return Progress(
        *columns,
        console=err,
        transient=True,
        refresh_per_second=4,
        disable=not err.is_terminal,
    )
