"""The commands."""

from __future__ import annotations

import typer

from corematching.cli import console, options
from corematching.cli.analyze import register_analyze
from corematching.cli.bench import register_bench
from corematching.cli.eval import register_eval
from corematching.cli.once import OnceCommand
from corematching.cli.serve import register_serve

EXAMPLES = """
[bold]Examples[/bold]

  corematching demo

  corematching run --image street.jpg --question "How many cars are there?" --compare

  corematching run --image a.png --question "What is this?" --keep-ratio 0.2 --overlay kept.png

  corematching run --model llava-hf/llava-1.5-7b-hf --image a.png -q "What is this?" --json
"""


def accept_debug(debug: options.Debug = False) -> None:
    """Vision-language models that answer from their core tokens and core neurons only."""


app = typer.Typer(
    callback=accept_debug,
    name="corematching",
    help="Vision-language models that answer from their core tokens and core neurons only.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.command(epilog=EXAMPLES, cls=OnceCommand)
def run(
    question: options.Question,
    image: options.Images = None,
    model: options.Model = None,
    compare: options.Compare = False,
    overlay: options.Overlay = None,
    as_json: options.Json = False,
    max_new_tokens: options.MaxNewTokens = 64,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    engine: options.Engine = "auto",
    memory: options.Memory = None,
    method: options.MethodName = "corematching",
    score: options.Score = None,
    keep_ratio: options.KeepRatio = None,
    keep_tokens: options.KeepTokens = None,
    layer: options.Layer = None,
    neurons: options.Neurons = None,
    neuron_ratio: options.NeuronRatio = None,
    active_ratio: options.ActiveRatio = None,
    tokens: options.OldTokens = None,
    keep: options.OldKeep = None,
    after: options.OldAfter = None,
    neuron_score: options.OldNeuronScore = None,
) -> None:
    """Ask a question about a picture; the default model is SceneVLM, which the package ships."""
    console.keep_bars_away(own_bars=model is None)
    from corematching.cli.run import Request, answer_request

    chosen = {
        "--score": score,
        "--keep-ratio": keep_ratio,
        "--keep-tokens": keep_tokens,
        "--layer": layer,
        "--neurons": neurons,
        "--neuron-ratio": neuron_ratio,
        "--active-ratio": active_ratio,
        "--tokens": tokens,
        "--keep": keep,
        "--after": after,
        "--neuron-score": neuron_score,
    }
    answer_request(
        Request(
            question=question,
            images=tuple(image or ()),
            model=model,
            device=device,
            dtype=dtype,
            engine=engine,
            memory=memory,
            method=method,
            options=chosen,
            compare=compare,
            as_json=as_json,
            overlay=overlay,
            max_new_tokens=max_new_tokens,
        )
    )


@app.command(cls=OnceCommand)
def demo(overlay: options.Overlay = None) -> None:
    """Ask SceneVLM the shipped question about the shipped picture, dense beside sparse."""
    console.keep_bars_away(own_bars=True)
    from corematching.cli.run import Request, answer_request
    from corematching.demo.example import read_example

    example = read_example()
    console.out.print(f"picture:  {example.image}", markup=False, soft_wrap=True)
    console.out.print(f"question: {example.question}", markup=False, soft_wrap=True)
    answer_request(
        Request(
            question=example.question,
            images=(str(example.image),),
            compare=True,
            overlay=overlay,
        )
    )


@app.command(cls=OnceCommand)
def models() -> None:
    """List the tested model families."""
    from rich.table import Table

    from corematching.model.families import FAMILIES

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("family", "model type", "core tokens", "core neurons", "notes"):
        table.add_column(heading)
    for family in FAMILIES:
        marks = ("yes" if works else "-" for works in (family.tokens, family.neurons))
        table.add_row(family.name, family.model_type, *marks, family.notes)
    console.out.print(table)


register_eval(app)
register_bench(app)
register_analyze(app)
register_serve(app)
