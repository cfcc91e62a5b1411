"""Pictures: accuracy over what is kept, one curve per method, dense as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corematching.methods.text import UNNAMED, read_value, split_parts, write_value

AXES = {
    "tokens_kept": (
        "image tokens kept [%]",
        (
            *("keep_ratio", "keep_tokens", "min_ratio", "min_tokens", "max_ratio", "max_tokens"),
            *("keep", "floor", "ceiling"),
        ),
    ),
    "neurons_kept": ("neurons kept [%]", ("neuron_ratio", "active_ratio", "ratio", "beta")),
}
"""Share -> what the axis says, and the parameters of a method that move along it, old ones too."""
FIRST = {"top": "ratio", "gate": "active_ratio", "ratio": "keep_ratio", "count": "keep_tokens"}
"""What the first value of a rule or a budget is, where it comes without a name."""
WHOLE = 99.95
STILL = 0.05
MARKERS = "osD^vP*Xph<>"


def draw_curves(entries: Sequence[dict[str, Any]], share: str, path: Path, model: str) -> None:
    """Draw accuracy with its interval over a share.

    Parameters
    ----------
    entries : sequence of dict
        Of the board, dense first.
    share : str
        ``tokens_kept`` or ``neurons_kept``.
    path : Path
        A PNG file.
    model : str
        For the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axis, _ = AXES[share]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if entries:
        dense = entries[0]["accuracy"]
        axes.axhline(100 * dense["value"], color="black", linestyle="--", label="dense")
        axes.axhspan(100 * dense["low"], 100 * dense["high"], color="black", alpha=0.08)
    curves = group_curves(entries[1:], share)
    for index, (name, curve) in enumerate(curves.items()):
        x, y, low, high = zip(*curve, strict=True)
        axes.errorbar(
            x,
            y,
            yerr=(low, high),
            label=name,
            marker=MARKERS[index % len(MARKERS)],
            color=f"C{index % 10}",
            linestyle="-" if index < 10 else ":",
            capsize=1.5,
            elinewidth=0.7,
            linewidth=1.4,
        )
    axes.set_xlabel(axis)
    axes.set_ylabel("accuracy [%]")
    axes.set_title(model)
    farthest = max((point[0] for curve in curves.values() for point in curve), default=100.0)
    axes.set_xlim(0, min(102.0, 1.1 * farthest))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)


def group_curves(
    entries: Sequence[dict[str, Any]], share: str
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Points (share, accuracy, interval below, interval above) in %, by curve, rising.

    A curve's name is the method's text without the parameters that move along the axis. Methods
    that keep all of it have no place on the axis, nor have those that only moved along the other
    from a method that is there.
    """
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for entry in entries:
        x = _place(entry, share)
        if x > WHOLE or _moves_elsewhere(entry, entries, share):
            continue
        accuracy = entry["accuracy"]
        y, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
        point = (x, y, max(0.0, y - low), max(0.0, high - y))
        curves.setdefault(name_curve(entry["method"], share), []).append(point)
    return {name: sorted(points) for name, points in curves.items()}


def name_curve(text: str, share: str) -> str:
    """``random:keep_ratio=0.1,layer=2`` -> ``random:layer=2`` over the image tokens."""
    return _without(text, AXES[share][1])


def _without(text: str, parameters: Sequence[str]) -> str:
    """The text without some parameters, also within rules; JSON and files stay as they are."""
    if text.startswith(("{", "@")):
        return text
    name, _, rest = text.partition(":")
    others = []
    for part in split_parts(rest, text):
        key, _, value = part.partition("=")
        if key.strip() not in parameters:
            rule = "(" in value
            others.append(f"{key}={_bare(read_value(value), parameters)}" if rule else part)
    return f"{name}:{','.join(others)}" if others else name


def _bare(value: Any, parameters: Sequence[str]) -> str:
    """A rule with parameters, written without some of them."""

    def strip(value: Any) -> Any:
        if isinstance(value, list):
            return [strip(item) for item in value]
        if not isinstance(value, dict):
            return value
        unnamed, gone = value.get(UNNAMED, []), set(parameters)
        if "among" in value or len(unnamed) > 1:
            gone.discard("active_ratio")  # of two ratios the inner one moves
        if FIRST.get(value["name"]) in gone:
            unnamed = unnamed[1:]
        inner = {key: strip(v) for key, v in value.items() if key not in {*gone, UNNAMED}}
        return {**inner, UNNAMED: [strip(item) for item in unnamed]}

    return write_value(strip(value))


def _place(entry: dict[str, Any], share: str) -> float:
    """Where a method stands on the axis, in %."""
    kept = entry[share]
    return 100 * float(kept["mean"] if isinstance(kept, dict) else kept)


def _moves_elsewhere(entry: dict[str, Any], entries: Sequence[dict[str, Any]], share: str) -> bool:
    """Whether a method comes several times, at one place of this axis and at several of another.

    With its own amounts it stands for the others.
    """
    every = [parameter for _, parameters in AXES.values() for parameter in parameters]
    bare = _without(entry["method"], every)
    if entry["method"] == bare:
        return False
    family = [other for other in entries if _without(other["method"], every) == bare]

    def spread(axis: str) -> float:
        places = [_place(other, axis) for other in family]
        return max(places) - min(places)

    return spread(share) < STILL and any(spread(axis) >= STILL for axis in AXES)
