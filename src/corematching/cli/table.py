"""The one table of a run: what was kept, what it cost, how fast it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from corematching.cli.answer import Answer


@dataclass(frozen=True)
class Row:
    """One line: a dense and a sparse value, and how to write them."""

    label: str
    dense: float | None
    sparse: float | None
    write: Callable[[float], str]


def tabulate(report: Any, sparse: Answer, dense: Answer | None = None) -> Table:
    """Build the table of the first sample.

    Parameters
    ----------
    report : Report
        The sparse run's; it counts what a dense run costs as well.
    sparse : Answer
    dense : Answer, optional
        Gives the dense column its times, where dense was run.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("dense", "sparse", "sparse / dense"):
        table.add_column(heading, justify="right")
    for row in rows_of(report, sparse, dense):
        table.add_row(row.label, write(row.dense, row), write(row.sparse, row), ratio_of(row))
    return table


def rows_of(report: Any, sparse: Answer, dense: Answer | None) -> list[Row]:
    """The lines of the table."""
    sample = report.samples[0]
    return [
        Row("image tokens", sample.image_tokens, sample.kept_tokens, write_count),
        Row("neurons per step", sum(report.widths), sum(report.neurons), write_count),
        Row("prefill FLOPs", sample.dense_prefill_flops, sample.prefill_flops, write_flops),
        Row("FLOPs per step", sample.dense_decode_flops, sample.decode_flops, write_flops),
        Row("KV cache", sample.dense_kv_bytes, sample.kv_bytes, write_bytes),
        Row("TTFT", dense.ttft if dense else None, sparse.ttft, write_seconds),
        Row("TPOT", dense.tpot if dense else None, sparse.tpot, write_seconds),
    ]


def write(value: float | None, row: Row) -> str:
    return "-" if value is None else row.write(value)


def ratio_of(row: Row) -> str:
    """What the sparse run needs, in percent of the dense one."""
    if not row.dense or row.sparse is None:
        return ""
    return f"{100 * row.sparse / row.dense:.0f} %"


def write_count(value: float) -> str:
    return f"{value:,.0f}"


def write_flops(value: float) -> str:
    return scale(value, ("", "K", "M", "G", "T", "P"), 1000) + "FLOP"


def write_bytes(value: float) -> str:
    return scale(value, ("", "Ki", "Mi", "Gi"), 1024) + "B"


def write_seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def scale(value: float, prefixes: tuple[str, ...], base: int) -> str:
    """A value with the largest prefix that leaves it at 1 or above."""
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 or value >= 100 else 1
    return f"{value:.{digits}f} {prefixes[power]}"
