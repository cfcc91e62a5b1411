"""From the measurements' times to the figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corematching.errors import CoreMatchingError
from corematching.lab.bench.contenders import Measurement
from corematching.lab.bench.machine import Ceilings
from corematching.lab.bench.statistics import compare_pairs, summarise

LAYOUT = 1
PARTS = ("preprocessing", "vision", "prefill")


def make_board(
    entries: Sequence[dict[str, Any]],
    ceilings: Ceilings,
    new_tokens: int,
    batch: int,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Put a run's figures together.

    Parameters
    ----------
    entries : sequence of dict
        Of each contender: ``name``, ``kind`` (``ours`` or ``peer``), ``measurements``, and its own
        description. The first one is our dense model.
    ceilings : Ceilings
    new_tokens, batch : int
    facts : dict
        The settings of the run and the machine; copied to the board.

    Returns
    -------
    dict
        ``contenders``: seconds as median, p10, p90 and values; memory in bytes; what was reached in
        FLOP/s and bytes/s and its ratio to the ceilings. ``comparisons``: how many times longer
        ``against`` took than ``of``, pair by pair.
    """
    dense = entries[0]
    if dense["kind"] != "ours":
        raise CoreMatchingError("the dense model did not run, so nothing can be compared with it")
    measured = [_measure(entry, dense, ceilings, new_tokens, batch) for entry in entries]
    return {
        "layout": LAYOUT,
        **facts,
        "ceilings": ceilings.to_dict(),
        "contenders": measured,
        "comparisons": list_comparisons(measured),
    }


def _measure(
    entry: dict[str, Any],
    dense: dict[str, Any],
    ceilings: Ceilings,
    new_tokens: int,
    batch: int,
) -> dict[str, Any]:
    measurements: list[Measurement] = entry["measurements"]
    ttft = summarise([measurement.ttft for measurement in measurements])
    tpot = summarise([measurement.tpot(new_tokens) for measurement in measurements])
    costs = entry.get("costs") or dense["costs"]  # a peer runs the whole model
    return {
        "name": entry["name"],
        "kind": entry["kind"],
        "ttft": ttft,
        "tpot": tpot,
        "wall": summarise([measurement.wall for measurement in measurements]),
        "parts": {part: _summarise_part(measurements, part) for part in PARTS},
        "tokens_per_second": batch / tpot["median"],
        "peak_bytes": max(measurement.peak for measurement in measurements),
        "costs": costs,
        "reached": reach(costs, ttft["median"], tpot["median"], ceilings),
        **{key: entry[key] for key in ("method", "version", "note", "report") if key in entry},
    }


def _summarise_part(measurements: Sequence[Measurement], part: str) -> dict[str, Any] | None:
    values = [getattr(measurement, part) for measurement in measurements]
    return None if None in values else summarise(values)


def reach(
    costs: dict[str, Any], ttft: float, tpot: float, ceilings: Ceilings
) -> dict[str, float | None]:
    """FLOP/s up to the first token and bytes/s per further token, and their ratio to the ceilings.

    ``floor_tpot`` is what the step's bytes take at the copy's pace.
    """
    first = (costs["vision_flops"] + costs["prefill_flops"]) / ttft
    later = costs["decode_bytes"] / tpot
    return {
        "ttft_flops_per_second": first,
        "ttft_share_of_matmul": first / ceilings.matmul,
        "tpot_flops_per_second": costs["decode_flops"] / tpot,
        "tpot_bytes_per_second": later,
        "tpot_share_of_copy": later / ceilings.copy,
        "floor_tpot": costs["decode_bytes"] / ceilings.copy,
    }


def list_comparisons(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of ours against our dense model and against every peer."""
    ours = [entry for entry in measured if entry["kind"] == "ours"]
    peers = [entry for entry in measured if entry["kind"] == "peer"]
    pairs = [(own, ours[0]) for own in ours[1:]] + [(own, peer) for own in ours for peer in peers]
    return [
        {
            "of": own["name"],
            "against": other["name"],
            "ttft": compare_pairs(own["ttft"]["values"], other["ttft"]["values"]),
            "tpot": compare_pairs(own["tpot"]["values"], other["tpot"]["values"]),
            "tpot_by_bytes": other["costs"]["decode_bytes"] / own["costs"]["decode_bytes"],
        }
        for own, other in pairs
    ]
