"""`corematching bench`: times, memory and FLOPs of sparse beside dense, and of other engines."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from corematching.cli import console, options
from corematching.cli.bench_workload import open_workload, peer_options
from corematching.cli.once import OnceCommand
from corematching.cli.outputs import make_folder
from corematching.cli.repeat import write_command
from corematching.errors import ConfigError
from corematching.extras import require_plots

DEFAULT_OUT = Path("corematching-bench")
DEFAULT_PEERS = Path("benchmarks/peers")
SHAPE_KEEP_RATIO, SHAPE_NEURON_RATIO = 0.2, 0.4
DENSE = "dense"
MAX_BENCH_BATCH = 1024
EXAMPLES = """
[bold]Examples[/bold]

  corematching bench

  corematching bench --dtype bfloat16 --keep-ratio 0.2 --neuron-ratio 0.4 --peers all

  corematching bench --shape llava-1.5-7b --dtype bfloat16 --batch 8 --new-tokens 128
"""

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-M",
        metavar="NAME[:param=value,...]",
        help="A method to time beside dense; repeat it for several. Default: corematching.",
    ),
]
ShapeName = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="NAME",
        help="A published architecture with random weights instead of a model; a wrong name lists "
        "them. Default ratios: 0.2 of the image tokens, 0.4 of the neurons.",
    ),
]
Batch = Annotated[
    str,
    typer.Option(
        metavar="N[,N...]",
        help="Samples at a time. With several sizes, each is measured in turn, into a folder of "
        "its own in --out.",
    ),
]
NewTokens = Annotated[int, typer.Option(min=2, help="Tokens of every answer, exactly.")]
PromptTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Text tokens of the prompt, beside the picture's. A shape: 64."),
]
KeepRatio = Annotated[
    float | None,
    typer.Option(
        "--keep-ratio", metavar="RATIO", help="Time this ratio of the image tokens, set by hand."
    ),
]
KeepTokens = Annotated[
    int | None,
    typer.Option(metavar="COUNT", help="Time this number of image tokens, set by hand."),
]
NeuronRatio = Annotated[
    float | None,
    typer.Option(
        "--neuron-ratio",
        metavar="RATIO",
        help="Time this ratio of every layer's neurons, set by hand.",
    ),
]
ActiveRatio = Annotated[
    float | None,
    typer.Option(
        metavar="RATIO", help="Time neurons by each token: this ratio of those in reach, by hand."
    ),
]
Layer = Annotated[
    int | None,
    typer.Option(
        "--layer",
        min=0,
        metavar="LAYER",
        help="With --keep-ratio or --keep-tokens: drop after this layer; default: 1.",
    ),
]
OldKeep = Annotated[float | None, typer.Option("--keep", hidden=True)]
OldNeurons = Annotated[float | None, typer.Option("--neurons", hidden=True)]
OldAfter = Annotated[int | None, typer.Option("--after", min=0, hidden=True)]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|all", help="Another engine to time in turn with ours; repeat for several."
    ),
]
PeersDir = Annotated[Path, typer.Option(metavar="DIR", help="Where the engines' adapters are.")]
Rounds = Annotated[int, typer.Option(min=1, help="Turns of each.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="For bench.json, bench.md, roofline.png.")]
Force = Annotated[bool, typer.Option("--force", help="Measure on a busy machine as well.")]


def bench(
    model: options.Model = None,
    shape: ShapeName = None,
    method: Methods = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    engine: options.Engine = "auto",
    batch: Batch = "1",
    new_tokens: NewTokens = 64,
    prompt_tokens: PromptTokens = None,
    keep_ratio: KeepRatio = None,
    keep_tokens: KeepTokens = None,
    neuron_ratio: NeuronRatio = None,
    active_ratio: ActiveRatio = None,
    layer: Layer = None,
    keep: OldKeep = None,
    neurons: OldNeurons = None,
    after: OldAfter = None,
    peers: Peers = None,
    peers_dir: PeersDir = DEFAULT_PEERS,
    rounds: Rounds = 7,
    out: Out = DEFAULT_OUT,
    force: Force = False,
    as_json: options.Json = False,
) -> None:
    """Time sparse beside dense, in turn, with a different picture every request."""
    given = dict(locals())
    console.keep_bars_away(own_bars=model is None)
    logging.getLogger("corematching").addHandler(logging.NullHandler())
    require_plots("the picture of `corematching bench`")
    if model and shape:
        raise ConfigError("--model and --shape exclude each other: leave one out")
    from corematching.lab.bench import Plan, choose_adapters, require_quiet

    plan = Plan(new_tokens=new_tokens, rounds=rounds, force=force)
    by_hand = {
        "keep_ratio": read_old("--keep-ratio", keep_ratio, "--keep", keep),
        "keep_tokens": keep_tokens,
        "neuron_ratio": read_old("--neuron-ratio", neuron_ratio, "--neurons", neurons),
        "active_ratio": active_ratio,
        "layer": read_old("--layer", layer, "--after", after),
    }
    with console.noting_old_names():
        methods = choose_methods(method, by_hand, by_shape=shape is not None)
    sizes, adapters = read_batches(batch), choose_adapters(peers or [], peers_dir)
    folders = [out / f"batch-{size}" if len(sizes) > 1 else out for size in sizes]
    for folder in folders:
        make_folder(folder, "--out")
    require_quiet(force=force)
    opened = open_workload(model, shape, dtype, device, prompt_tokens, new_tokens)
    boards = []
    for size, folder in zip(sizes, folders, strict=True):
        workload = dataclasses.replace(opened, batch=size)
        boards.append(measure(workload, methods, adapters, plan, {**given, "batch": str(size)}))
        save(boards[-1], folder)
        if not as_json:
            show(boards[-1], folder)
    if as_json:
        print(json.dumps(boards if len(boards) > 1 else boards[0]))


def register_bench(app: typer.Typer) -> None:
    """Register the command with the app."""
    app.command("bench", epilog=EXAMPLES, cls=OnceCommand)(bench)


def read_batches(text: str) -> list[int]:
    """The batch sizes of ``1,2,4``, each once.

    Raises
    ------
    ConfigError
        One is no whole number from 1 to `MAX_BENCH_BATCH`.
    """
    try:
        sizes = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        sizes = [0]
    if not all(1 <= size <= MAX_BENCH_BATCH for size in sizes):
        raise ConfigError(
            f"--batch {text}: give whole numbers from 1 to {MAX_BENCH_BATCH}, with commas between"
        )
    return sizes


def choose_methods(
    texts: Sequence[str] | None, by_hand: dict[str, Any], by_shape: bool
) -> dict[str, Any]:
    """The methods to time, by their text, dense first."""
    from corematching.lab.bench import name_by_hand
    from corematching.methods import method_from_text

    chosen = list(texts or [])
    given = {name: value for name, value in by_hand.items() if value is not None}
    if "layer" in given and given.keys().isdisjoint(("keep_ratio", "keep_tokens")):
        raise ConfigError("--layer says where tokens are dropped: give --keep-ratio as well")
    if given:
        chosen.append(name_by_hand(**given))
    elif not chosen:
        hand = name_by_hand(SHAPE_KEEP_RATIO, SHAPE_NEURON_RATIO)
        chosen.append(hand if by_shape else "corematching")
    return {text: method_from_text(text) for text in dict.fromkeys([DENSE, *chosen])}


def read_old(option: str, value: Any, old: str, old_value: Any) -> Any:
    """An option's value, or that of its name in version 0.1."""
    if old_value is None:
        return value
    if value is not None:
        raise ConfigError(f"{old} is the old name of {option}: give {option} alone")
    console.note(f"{old} is {option} now; the old name ends with the next version")
    return old_value


def measure(
    workload: Any,
    methods: dict[str, Any],
    adapters: Sequence[Any],
    plan: Any,
    given: dict[str, Any],
) -> dict[str, Any]:
    """Run the contenders in turn, with the peers available here."""
    from corematching.lab.bench import MethodContender, PeerContender, run_bench

    missing = {}
    peers = []
    for adapter in adapters:
        reason = adapter.why_not(workload.batch, workload.random_weights)
        if reason:
            missing[adapter.name] = reason
            continue
        settings = peer_options(adapter, workload, given)
        peers.append(PeerContender(adapter, workload, plan.new_tokens, settings))
    ours = [
        MethodContender(name, method, workload, plan.new_tokens, given["engine"])
        for name, method in methods.items()
    ]
    facts = {"command": write_command("bench", list_changed(given)), "missing": missing}
    with counting() as progress:
        return run_bench(workload, ours, peers, plan, facts, progress)


def save(board: dict[str, Any], out: Path) -> None:
    """Write the figures, the table and the picture."""
    from corematching.lab.bench import draw_roofline, write_markdown

    (out / "bench.json").write_text(json.dumps(board, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(write_markdown(board), encoding="utf-8")
    draw_roofline(board, out / "roofline.png")


def show(board: dict[str, Any], out: Path) -> None:
    """Print the result and its folder."""
    from corematching.lab.bench import write_markdown

    print(write_markdown(board))
    console.note(f"figures, table and roofline: {out}")


def list_changed(given: dict[str, Any]) -> dict[str, Any]:
    """The options other than their defaults, without those that change no figure."""
    defaults = inspect.signature(bench).parameters
    return {
        name: value
        for name, value in given.items()
        if name not in ("as_json", "force") and value != defaults[name].default
    }


@contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
    """A bar over all turns, which says what runs now."""
    from rich.progress import SpinnerColumn

    # drawn seldom, so as not to disturb what is timed
    bar = console.counting_bar(before=(SpinnerColumn(),), per_second=1)
    with bar:
        task = bar.add_task("", total=None)

        def show_step(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total)

        yield show_step
