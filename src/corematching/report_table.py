"""The plain-text table of a run: dense and sparse values with their units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

GAP = "  "


@dataclass(frozen=True)
class TableRow:
    """One line of the table.

    Attributes
    ----------
    label : str
        Name of the quantity.
    dense, sparse : float or None
        The values; None is shown as "-".
    write : callable
        Formats a value.
    """

    label: str
    dense: float | None
    sparse: float | None
    write: Callable[[float], str]

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The texts of the four columns."""
        return self.label, self._text(self.dense), self._text(self.sparse), self.ratio

    @property
    def ratio(self) -> str:
        """Sparse / dense in percent; empty where one is unknown."""
        if not self.dense or self.sparse is None:
            return ""
        return f"{100 * self.sparse / self.dense:.0f} %"

    def _text(self, value: float | None) -> str:
        return "-" if value is None else self.write(value)


def draw_table(title: str, rows: Sequence[TableRow]) -> str:
    """Align rows in columns, below a heading.

    Parameters
    ----------
    title : str
        Heading of the labels; may be empty.
    rows : sequence of TableRow
        The lines.
    """
    lines = [(title, "dense", "sparse", "sparse / dense"), *(row.cells for row in rows)]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        GAP.join([label.ljust(first), *map(str.rjust, cells, widths)]).rstrip()
        for label, *cells in lines
    )


def write_count(value: float) -> str:
    """A whole number with thousands separators."""
    return f"{value:,.0f}"


def write_flops(value: float) -> str:
    """``1.5 TFLOP``."""
    return scale(value, ("", "K", "M", "G", "T", "P"), 1000) + "FLOP"


def write_bytes(value: float) -> str:
    """``1.5 GiB``."""
    return scale(value, ("", "Ki", "Mi", "Gi"), 1024) + "B"


def write_seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def scale(value: float, prefixes: tuple[str, ...], base: int) -> str:
    """A value with the largest unit prefix for which it is at least 1."""
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 or value >= 100 else 1
    return f"{value:.{digits}f} {prefixes[power]}"
