r"""Writes the tables of a finished `corematching eval` into a document, between its markers,
in the present names of parameters.

    python benchmarks/board_tables.py docs/results/board.md docs/board/board.json
    python benchmarks/board_tables.py docs/results/studies.md docs/rivals/board.json \
        --budgets tokens
    python benchmarks/board_tables.py docs/results/studies.md docs/neurons/board.json \
        --budgets neurons

The places are ``<!-- board:methods -->`` and ``<!-- board:families -->``, each up to the same name
with a slash in front. ``--budgets`` fills ``<!-- board:tokens -->`` or ``<!-- board:neurons -->``
from a run with several ``--budget``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from speed_table import fill_place

from corematching.lab.evaluate.plot import name_curve
from corematching.methods.text import write_present

RATIO = re.compile(r"ratio=([0-9.]+)")


def tabulate_methods(board: dict[str, Any]) -> str:
    """One row per method: accuracy with its interval, and what it costs beside dense."""
    rows = [
        "| method | accuracy (95 % interval) | of dense | image tokens kept | neurons per step "
        "| prefill FLOPs | KV bytes |",
        "|---|" + "---:|" * 6,
    ]
    for entry in board["methods"]:
        accuracy, cells = entry["accuracy"], []
        cells.append(f"`{write_present(entry['method'])}`")
        cells.append(
            f"{percent(accuracy['value'])} "
            f"({100 * accuracy['low']:.1f}-{100 * accuracy['high']:.1f})"
        )
        cells.append("-" if entry["method"] == "dense" else percent(entry["of_dense"]["value"]))
        cells.append(percent(entry["tokens_kept"]["mean"]))
        cells.append(percent(entry["neurons_kept"]))
        cells.append(percent(entry["prefill_flops"] / entry["dense_prefill_flops"]))
        cells.append(percent(entry["kv_bytes"] / entry["dense_kv_bytes"]))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def tabulate_families(board: dict[str, Any]) -> str:
    """One row per method: accuracy in each family of questions, in percent."""
    first = board["methods"][0]["families"]
    families = [name for name, value in first.items() if value]
    rows = ["| method | " + " | ".join(families) + " |", "|---|" + "---:|" * len(families)]
    for entry in board["methods"]:
        values = [f"{100 * entry['families'][name]['value']:.0f}" for name in families]
        rows.append(f"| `{write_present(entry['method'])}` | " + " | ".join(values) + " |")
    return "\n".join(rows)


def tabulate_budgets(board: dict[str, Any], kind: str) -> str:
    """A row per method, a column per budget: accuracy, and FLOPs as a share of the dense ones."""
    flops = {"tokens": "prefill_flops", "neurons": "decode_flops"}[kind]
    cells: dict[str, dict[str, str]] = {}
    dense = ""
    for entry in board["methods"]:
        right = f"{100 * entry['accuracy']['value']:.1f}"
        if entry["method"] == "dense":
            dense = right
            continue
        text = write_present(entry["method"])
        method, share = name_curve(text, f"{kind}_kept"), RATIO.findall(text)[-1]
        cost = entry[flops] / entry["dense_" + flops]
        cells.setdefault(method, {})[share] = f"{right} ({100 * cost:.0f})"
    shares = sorted({share for row in cells.values() for share in row}, key=float)
    rows = ["| method | " + " | ".join(f"{100 * float(share):.0f} %" for share in shares) + " |"]
    rows.append("|---|" + "---:|" * len(shares))
    rows.append(f"| `dense` | {' | '.join([dense + ' (100)'] * len(shares))} |")
    for method, row in cells.items():
        rows.append(f"| `{method}` | " + " | ".join(row.get(share, "-") for share in shares) + " |")
    return "\n".join(rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main() -> None:
    """Fill the document's places."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("document", type=Path)
    parser.add_argument("board", type=Path)
    parser.add_argument("--budgets", choices=["tokens", "neurons"])
    arguments = parser.parse_args()
    try:
        board = json.loads(arguments.board.read_text(encoding="utf-8"))
        text = arguments.document.read_text(encoding="utf-8")
        if arguments.budgets:
            tables = {arguments.budgets: tabulate_budgets(board, arguments.budgets)}
        else:
            tables = {"methods": tabulate_methods(board), "families": tabulate_families(board)}
        for name, table in tables.items():
            text = fill_place(text, name, table + "\n", kind="board")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    arguments.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
