"""A run's figures as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

PRIMARY = (
    "",
    "TTFT ms",
    "preproc. ms",
    "vision ms",
    "prefill ms",
    "TPOT ms",
    "tokens/s",
    "peak MB",
    "TTFT GFLOP",
    "GFLOP/s (of a product)",
    "GB per step",
    "GB/s (of a copy)",
)
RATIOS = ("", "against", "TTFT, times faster", "TPOT, times faster", "TPOT by bytes alone")


def write_markdown(board: dict[str, Any]) -> str:
    """The tables of a run, with what they were measured on and the command that repeats it.

    Parameters
    ----------
    board : dict
        As `corematching.lab.bench.make_board` gives it.
    """
    parts = [
        f"**{write_title(board)}**",
        describe_run(board),
        tabulate(PRIMARY, (row_of(entry) for entry in board["contenders"])),
    ]
    if board["comparisons"]:
        parts.append(tabulate(RATIOS, (ratio_row(pair) for pair in board["comparisons"])))
    notes = list(list_notes(board))
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    if board.get("command"):
        parts.append(f"```text\n{board['command']}\n```")
    return "\n\n".join(parts) + "\n"


def write_title(board: dict[str, Any]) -> str:
    """Model, dtype and batch; and that its weights are random where they are."""
    random = ", RANDOM WEIGHTS: the shape only, no answers" if board["random_weights"] else ""
    return f"{board['model']}{random}, {board['dtype']}, batch {board['batch']}"


def describe_run(board: dict[str, Any]) -> str:
    """The model, the request and the machine."""
    ceilings, others = board["ceilings"], board["others_cpu"]
    return (
        f"{board['machine']}, {board['threads']} threads, on {board['device']}: "
        f"{board['prompt_tokens']} prompt tokens, {board['new_tokens']} new ones, "
        f"{board['rounds']} rounds in turn, medians (p10-p90). "
        f"This machine copies {ceilings['copy'] / 1e9:.1f} GB/s and multiplies matrices at "
        f"{ceilings['matmul'] / 1e9:,.0f} GFLOP/s in {ceilings['matmul_dtype']}. "
        f"Other programs used {others['before']:.0%} of its processor before and "
        f"{others['during']:.0%} during the run."
    )


def row_of(entry: dict[str, Any]) -> list[str]:
    """A contender's line."""
    costs, reached, parts = entry["costs"], entry["reached"], entry["parts"]
    flops = costs["vision_flops"] + costs["prefill_flops"]
    return [
        f"`{entry['name']}`",
        write_spread(entry["ttft"]),
        *[_milliseconds(parts[part]) for part in ("preprocessing", "vision", "prefill")],
        write_spread(entry["tpot"]),
        f"{entry['tokens_per_second']:.1f}",
        f"{entry['peak_bytes'] / 1e6:,.0f}",
        _digits(flops / 1e9),
        f"{_digits(reached['ttft_flops_per_second'] / 1e9)} "
        f"({reached['ttft_share_of_matmul']:.0%})",
        f"{costs['decode_bytes'] / 1e9:.3g}",
        f"{_digits(reached['tpot_bytes_per_second'] / 1e9)} ({reached['tpot_share_of_copy']:.0%})",
    ]


def ratio_row(pair: dict[str, Any]) -> list[str]:
    """A comparison's line."""
    ratios = [
        f"{pair[part]['median']:.2f} ({pair[part]['p10']:.2f}-{pair[part]['p90']:.2f})"
        for part in ("ttft", "tpot")
    ]
    return [f"`{pair['of']}`", f"`{pair['against']}`", *ratios, f"{pair['tpot_by_bytes']:.2f}"]


def list_notes(board: dict[str, Any]) -> Iterator[str]:
    """The remarks beside the figures."""
    for entry in board["contenders"]:
        if min(entry["tpot"]["values"]) <= 0:
            yield (
                f"`{entry['name']}`: some decode steps took less than the noise between two "
                "requests; its TPOT means nothing: give more --new-tokens, on a quieter machine"
            )
        if "report" in entry:
            yield f"`{entry['name']}`: {describe_kept(entry['report'])}"
        elif entry.get("version") or entry.get("note"):
            yield f"`{entry['name']}`: " + "; ".join(
                filter(None, (entry.get("version"), entry.get("note")))
            )
    for name, reason in {**board.get("missing", {}), **board["failed"]}.items():
        yield f"`{name}` did not run: {reason}"


def describe_kept(report: dict[str, Any]) -> str:
    """The kept ratios, and the engine of the decode steps."""
    text = (
        f"{report['token_retention_ratio']:.0%} of the image tokens, "
        f"{report['neuron_retention_ratio']:.0%} of the neurons"
    )
    return f"{text}; decode steps ran on {report['kernel']}"


def write_spread(summary: dict[str, Any]) -> str:
    """Milliseconds: the median, and the 10th and 90th percentile."""
    low, middle, high = (1e3 * summary[key] for key in ("p10", "median", "p90"))
    return f"{_digits(middle)} ({_digits(low)}-{_digits(high)})"


def tabulate(headings: Sequence[str], rows: Iterator[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _milliseconds(summary: dict[str, Any] | None) -> str:
    return "-" if summary is None else _digits(1e3 * summary["median"])


def _digits(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
