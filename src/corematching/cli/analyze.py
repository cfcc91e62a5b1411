"""`corematching analyze` and `corematching analyze-task`: the layers of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from corematching.cli import console, options
from corematching.cli.once import OnceCommand
from corematching.cli.outputs import check_file
from corematching.cli.repeat import write_command
from corematching.errors import ConfigError, InputError, unknown_name
from corematching.extras import require_plots

EXAMPLES = """
[bold]Examples[/bold]

  corematching analyze --image street.jpg --question "How many cars are there?" --out report.html

  corematching analyze --layers 0,8-15 --json
"""
TASK_EXAMPLES = """
[bold]Examples[/bold]

  corematching analyze-task --limit 100 --out co-adaptation.html

  corematching analyze-task --limit 20 --layers 0-9 --table co-adaptation.md --json
"""
TASKS = ("sceneqa",)
ANSWER_TOKENS = 40
LAST_LAYER = 9_999

Picture = Annotated[str | None, typer.Option("--image", "-i", help="Picture, a file or a URL.")]
Question = Annotated[str | None, typer.Option("--question", "-q", help="What to ask.")]
LayerList = Annotated[
    str | None,
    typer.Option("--layers", metavar="0,8-15", help="Layers to look at, from 0; default: all."),
]
Out = Annotated[Path, typer.Option(metavar="FILE.html", help="The page; overwritten.")]
TaskName = Annotated[str, typer.Option("--task", help="Questions to ask: sceneqa.")]
Split = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A split of SceneQA; default: the shipped test split."),
]
Limit = Annotated[int, typer.Option(min=1, help="Ask a random sample of this many.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sample, the controls and the intervals.")]
Table = Annotated[
    Path | None, typer.Option(metavar="FILE.md", help="Write the tables as Markdown, too.")
]


def analyze(
    image: Picture = None,
    question: Question = None,
    model: options.Model = None,
    layers: LayerList = None,
    out: Out = Path("analysis.html"),
    as_json: options.Json = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
) -> None:
    """Show what each layer sees in a picture; without one, in the shipped example."""
    console.keep_bars_away(own_bars=model is None)
    wanted = read_layers(layers)
    given = {"image": image, "question": question, "model": model, "layers": layers, "out": out}
    image, question = choose_example(image, question)
    check_file(out, "--out")
    require_plots("`corematching analyze`")
    from corematching.cli.loading import load_model
    from corematching.cli.overlay import shown_area
    from corematching.cli.run import has_square_patches
    from corematching.lab.analyze import (
        analyze_picture,
        build_picture_page,
        default_rules,
        save_page,
    )
    from corematching.lab.evaluate import Subject
    from corematching.media import read_picture

    picture = read_picture(image, public_only=False)
    loaded = load_model(model, device, dtype)
    subject = Subject(loaded.name, loaded.model, loaded.processor)
    processor = loaded.processor.image_processor
    with console.waiting("looking at the layers"):
        analysis = analyze_picture(
            subject,
            picture,
            question,
            default_rules(),
            wanted,
            has_square_patches(loaded, processor),
        )
        analysis.picture = shown_area(picture, processor)
        analysis.answers = answer_both(loaded, picture, question)
    save_page(out, build_picture_page(analysis, write_command("analyze", given)))
    if as_json:
        print(json.dumps(analysis.to_dict(), allow_nan=False))
    console.note(f"page: {out}")


def analyze_task(
    task: TaskName = "sceneqa",
    split: Split = None,
    limit: Limit = 100,
    model: options.Model = None,
    layers: LayerList = None,
    seed: Seed = 0,
    out: Out = Path("co-adaptation.html"),
    table: Table = None,
    as_json: options.Json = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
) -> None:
    """Measure over many questions whether core tokens and core neurons lead to each other."""
    console.keep_bars_away(own_bars=model is None)
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    wanted = read_layers(layers)
    check_file(out, "--out")
    if table is not None:
        check_file(table, "--table")
    require_plots("`corematching analyze-task`")
    from corematching.cli.loading import load_model
    from corematching.lab.analyze import (
        StudyPlan,
        build_study_page,
        default_rules,
        save_page,
        study_task,
        write_tables,
    )
    from corematching.lab.evaluate import SceneQA, Subject

    questions = SceneQA.load(split)
    loaded = load_model(model, device, dtype)
    subject = Subject(loaded.name, loaded.model, loaded.processor)
    with counting("asking") as progress:
        plan = StudyPlan(limit=limit, seed=seed, layers=wanted)
        study = study_task(subject, questions, default_rules(), plan, progress)
    given = {
        "task": task,
        "split": split,
        "limit": limit,
        "model": model,
        "layers": layers,
        "seed": seed,
        "out": out,
        "table": table,
        "dtype": dtype,
        "device": device,
    }
    study["command"] = write_command("analyze-task", given)
    save_page(out, build_study_page(study, study["command"]))
    if table is not None:
        save_page(table, write_tables(study, study["command"]))
    if as_json:
        print(json.dumps(study, allow_nan=False))
    else:
        console.out.print(tabulate(study))
    console.note(f"page: {out}")


def register_analyze(app: typer.Typer) -> None:
    """Register both commands with the app."""
    app.command("analyze", epilog=EXAMPLES, cls=OnceCommand)(analyze)
    app.command("analyze-task", epilog=TASK_EXAMPLES, cls=OnceCommand)(analyze_task)


def choose_example(image: str | None, question: str | None) -> tuple[str, str]:
    """A picture and a question about it; the shipped ones where neither is given.

    Raises
    ------
    InputError
        Only one of them is given.
    """
    if image is not None and question is not None:
        return image, question
    if image is not None or question is not None:
        missing = "--question" if question is None else "--image"
        raise InputError(f"a picture and a question belong together: give {missing}, too")
    from corematching.demo.example import read_example

    example = read_example()
    return str(example.image), example.question


def read_layers(text: str | None) -> list[int] | None:
    """The layers that ``0,8-15`` names; None for None.

    Raises
    ------
    ConfigError
        The text names no layers.
    """
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20})(?:\s*-\s*([0-9]{1,20}))?\s*", part)
        first, last = map(int, (match[1], match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"--layers {text}: '{part}' is no layer or range, write 0,8-15")
        if last > LAST_LAYER:
            raise ConfigError(
                f"--layers {text}: no model has a layer {last}, {LAST_LAYER} is the last that is "
                "looked for"
            )
        layers.update(range(first, last + 1))
    return sorted(layers)


def answer_both(loaded: Any, picture: Any, question: str) -> dict[str, str]:
    """The dense answer and that of our default method."""
    from corematching.cli.answer import ask
    from corematching.methods import CoreMatching

    arguments = (loaded, [picture], question, ANSWER_TOKENS)
    return {
        "Dense answer": ask(*arguments).text,
        "Sparse answer": ask(*arguments, CoreMatching()).text,
    }


@contextmanager
def counting(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that follows the questions that are done."""
    bar = console.counting_bar()
    with bar:
        entry = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(entry, completed=done, total=total)


def tabulate(study: dict[str, Any]) -> Any:
    """The means over the layers for the terminal."""
    from rich.table import Table as RichTable

    table = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("mean over layers and questions")
    for rule in study["rules"]:
        table.add_column(rule["title"], justify="right")
    for text, name in (
        ("core tokens, of the image tokens", "tokens_kept"),
        ("core neurons from core tokens", "neurons_from_core"),
        ("core neurons from random tokens", "neurons_from_random"),
        ("core tokens from core neurons", "tokens_from_core"),
        ("core tokens from random neurons", "tokens_from_random"),
    ):
        figures = (study["mean"][rule["name"]][name] for rule in study["rules"])
        cells = (f"{f['value']:.1%} ({100 * f['low']:.1f}-{100 * f['high']:.1f})" for f in figures)
        table.add_row(text, *cells)
    return table
