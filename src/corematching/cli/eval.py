"""`corematching eval`: the accuracy of methods on a task, beside the dense model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corematching.cli import console, options
from corematching.cli.once import OnceCommand
from corematching.cli.outputs import make_folder
from corematching.cli.repeat import write_command
from corematching.extras import require_plots

if TYPE_CHECKING:
    from corematching.lab.evaluate import Subject

DEFAULT_OUT = Path("corematching-eval")
EXAMPLES = """
[bold]Examples[/bold]

  corematching eval --limit 200

  corematching eval -M corematching:keep_ratio=0.1 -M random:keep_ratio=0.1 --out board

  corematching eval -M corematching -M fastv -M random --budget 0.05 --budget 0.1 --budget 0.2

  corematching eval --split my-split --method paper --method oracle --json
"""

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-M",
        metavar="NAME[:param=value,...]",
        help="A method to run beside dense; repeat it for several. Default: corematching.",
    ),
]
Budgets = Annotated[
    list[float] | None,
    typer.Option(
        "--budget",
        "-B",
        metavar="RATIO",
        help="Run every method at this ratio of the image tokens, or of the neurons where it keeps "
        "all tokens; repeat it for several.",
    ),
]
Split = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A split of SceneQA; default: the shipped test split."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask a random sample of this many.")]
BatchSize = Annotated[int, typer.Option("--batch", min=1, help="Questions at a time.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sample and of the intervals.")]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Where every answer is kept; the same directory again goes on."
    ),
]
AnswerLength = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Stop an answer after this many tokens.")
]


Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        help="Processes that share the questions, each with its own copy of the model: for a GPU "
        "that one alone cannot fill. Seconds on the board are then those of a shared device.",
    ),
]


Share = Annotated[
    bool,
    typer.Option(
        "--share",
        help="Compute once for all methods what they have in common of a prompt: the layers before "
        "their first cut. The same answers in a fraction of the time; the board has no prefill ms.",
    ),
]


def evaluate(
    model: options.Model = None,
    split: Split = None,
    method: Methods = None,
    budget: Budgets = None,
    limit: Limit = None,
    batch: BatchSize = 16,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: Seed = 0,
    max_new_tokens: AnswerLength = 40,
    engine: options.Engine = "auto",
    share: Share = False,
    jobs: Jobs = 1,
    out: Out = DEFAULT_OUT,
    as_json: options.Json = False,
) -> None:
    """Measure what methods lose on SceneQA, beside the dense model."""
    console.keep_bars_away(own_bars=model is None)
    require_plots("the board of `corematching eval`")
    from corematching.lab.evaluate import Crew, Plan, SceneQA, make_methods
    from corematching.lab.evaluate import evaluate as run_methods

    with console.noting_old_names():
        methods = make_methods(method or ["corematching"], budget)
    plan = Plan(limit, seed, batch, max_new_tokens, engine, share)
    task = SceneQA.load(split)
    make_folder(out, "--out")
    given = {
        "model": model,
        "split": split,
        "limit": limit,
        "batch": batch,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "max-new-tokens": max_new_tokens,
        "engine": None if engine == "auto" else engine,
        "share": share,
        "jobs": None if jobs == 1 else jobs,
        "out": out,
    }
    load = partial(load_subject, model, device, dtype)
    crew = nullcontext() if jobs == 1 else Crew(jobs, load, task, methods, plan)
    with crew as workers, counting() as progress:
        command = write_command("eval", given)
        board = run_methods(load(), task, methods, out, plan, progress, command, workers)
    if as_json:
        print(json.dumps(board))
        return
    console.out.print(tabulate(board))
    console.note(f"board, answers and pictures: {out}")


def load_subject(model: str | None, device: str | None, dtype: str) -> Subject:
    """The model under test."""
    from corematching.cli.loading import load_model
    from corematching.lab.evaluate import Subject

    loaded = load_model(model, device, dtype)
    return Subject(loaded.name, loaded.model, loaded.processor)


def register_eval(app: typer.Typer) -> None:
    """Register the command with the app."""
    app.command("eval", epilog=EXAMPLES, cls=OnceCommand)(evaluate)


@contextmanager
def counting() -> Iterator[Callable[[str, int, int, float], None]]:
    """A bar for each method, with the answers so far and the running accuracy."""
    from rich.progress import TextColumn

    running = TextColumn("{task.fields[accuracy]:.1f} %")
    bar = console.counting_bar(between=(running,), transient=False)
    tasks: dict[str, Any] = {}

    def show(text: str, done: int, total: int, accuracy: float) -> None:
        if text not in tasks:
            tasks[text] = bar.add_task(text, total=total, accuracy=0.0)
        bar.update(tasks[text], completed=done, accuracy=100 * accuracy)

    with bar:
        yield show


def tabulate(board: dict[str, Any]) -> Any:
    """The board's main figures for the terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("method", overflow="fold")
    for heading in ("accuracy", "95 %", "same", "KL", "tokens", "neurons", "prefill", "KV"):
        table.add_column(heading, justify="right")
    for entry in board["methods"]:
        accuracy = entry["accuracy"]
        table.add_row(
            entry["method"],
            f"{accuracy['value']:.1%}",
            f"{100 * accuracy['low']:.1f}-{100 * accuracy['high']:.1f}",
            f"{entry['agreement']:.1%}",
            f"{entry['kl']:.3f}",
            f"{entry['tokens_kept']['mean']:.1%}",
            f"{entry['neurons_kept']:.1%}",
            f"{entry['prefill_flops'] / entry['dense_prefill_flops']:.1%}",
            f"{entry['kv_bytes'] / entry['dense_kv_bytes']:.1%}",
        )
    return table
