"""The options of the commands, each with its help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

METHOD = "Method options"

Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model id on the Hugging Face Hub, or a directory."),
]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", "-i", help="Picture, a file or a URL; repeat it for several."),
]
Question = Annotated[str, typer.Option("--question", "-q", help="What to ask.")]
Compare = Annotated[
    bool, typer.Option("--compare", help="Run dense, then sparse, and show both with ratios.")
]
Overlay = Annotated[
    Path | None,
    typer.Option("--overlay", help="Draw the dropped patches and the cut into this PNG file."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop the answer after this many tokens.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU when there is one.")
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Engine = Annotated[
    str,
    typer.Option(
        help="What runs the model: auto (compiled kernels where they fit), torch or native."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Keep the model under this much memory, such as 12GiB: FFN weights stay outside.",
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        help="NAME, NAME:param=value,..., JSON or @file.json; a wrong name lists them.",
        rich_help_panel=METHOD,
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE",
        help="Token score, or none to keep all; a wrong name lists them.",
        rich_help_panel=METHOD,
    ),
]
KeepRatio = Annotated[
    float | None,
    typer.Option(metavar="RATIO", help="Ratio of image tokens to keep.", rich_help_panel=METHOD),
]
KeepTokens = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="COUNT", help="Number of image tokens to keep.", rich_help_panel=METHOD
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER",
        help="Drop after this layer, from 0, or after this ratio of the layers (0.4).",
        rich_help_panel=METHOD,
    ),
]
Neurons = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="Neurons that decoding computes: 'gate(0.6)' by each token, 'top(0.4)' for the whole "
        "answer, or none for all.",
        rich_help_panel=METHOD,
    ),
]
NeuronRatio = Annotated[
    float | None,
    typer.Option(
        metavar="RATIO",
        help="Ratio of the neurons, of methods with a parameter neuron_ratio.",
        rich_help_panel=METHOD,
    ),
]
ActiveRatio = Annotated[
    float | None,
    typer.Option(
        metavar="RATIO",
        help="Ratio of the neurons by each token, of methods with a parameter active_ratio.",
        rich_help_panel=METHOD,
    ),
]
OldTokens = Annotated[str | None, typer.Option("--tokens", hidden=True)]
OldKeep = Annotated[str | None, typer.Option("--keep", hidden=True)]
OldAfter = Annotated[int | None, typer.Option("--after", hidden=True)]
OldNeuronScore = Annotated[str | None, typer.Option("--neuron-score", hidden=True)]
