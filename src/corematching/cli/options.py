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
        help="NAME, or NAME:param=value,...; a wrong name lists them.",
        rich_help_panel=METHOD,
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="SCORE",
        help="Token score, or none to keep all; a wrong name lists them.",
        rich_help_panel=METHOD,
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        "--keep",
        metavar="RATIO|knee",
        help="Share of image tokens to keep, or knee: cut where the sorted scores bend.",
        rich_help_panel=METHOD,
    ),
]
After = Annotated[
    int | None,
    typer.Option(
        "--after", metavar="LAYER", help="Drop after this layer, from 0.", rich_help_panel=METHOD
    ),
]
Neurons = Annotated[
    float | None,
    typer.Option(
        "--neurons",
        metavar="SHARE",
        help="Share of FFN neurons that decoding computes; 1 computes all.",
        rich_help_panel=METHOD,
    ),
]
NeuronScore = Annotated[
    str | None,
    typer.Option(
        "--neuron-score",
        metavar="SCORE",
        help="Neuron score, or none to keep all; a wrong name lists them.",
        rich_help_panel=METHOD,
    ),
]
