r"""Writes the tables of a finished `corematching eval` into a document, between its markers.

    python benchmarks/board_tables.py docs/results/board.md docs/board/board.json
    python benchmarks/board_tables.py docs/results/studies.md docs/rivals/board.json --budgets tokens
    python benchmarks/board_tables.py docs/results/studies.md docs/neurons/board.json \
        --budgets neurons

The places are ``<!-- board:methods -->`` and ``<!-- board:families -->``, each up to the same name
with a slash in front. ``--budgets`` fills ``<!-- board:tokens -->`` or ``<!-- board:neurons -->``
from a run with several ``--budget``. Methods stand under their present names, whatever the run
called them.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from speed_table import fill_place

import corematching.evaluate.oracle  # noqa: F401  (registers the oracle)
from corematching.methods.text import read_present, write_method
from corematching.policy.component import find, parameters_of


def name_now(text: str, as_json: bool = False) -> str:
    """A method's text, or its JSON, with the present names of its parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        name, params = read_present(text)
    order = [*parameters_of(find("method", name))]
    params = dict(sorted(params.items(), key=lambda item: order.index(item[0])))
    return write_method(name, params, "{" if as_json else "")


def name_curve(text: str, budget: float) -> str:
    """The present name of a method, without the amount that the budget sets."""
    method = json.loads(name_now(text, as_json=True))

    def drop(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {
            key: drop(value, ("ratio",)) if isinstance(value, dict) else value
            for key, value in values.items()
            if not (key in names and value == budget)
        }

    params = drop(method, ("keep_ratio", "neuron_ratio", "active_ratio"))
    return write_method(params.pop("name"), params)


def tabulate_methods(board: dict[str, Any]) -> str:
    """One row per method: accuracy with its interval, and what it costs beside dense."""
    rows = [
        "| method | accuracy (95 % interval) | of dense | image tokens kept | neurons per step "
        "| prefill FLOPs | KV bytes |",
        "|---|" + "---:|" * 6,
    ]
    for entry in board["methods"]:
        accuracy, cells = entry["accuracy"], []
        cells.append(f"`{name_now(entry['method'])}`")
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
        rows.append(f"| `{name_now(entry['method'])}` | " + " | ".join(values) + " |")
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
        share = entry["method"].rpartition("=")[2]
        method = name_curve(entry["method"], float(share))
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
