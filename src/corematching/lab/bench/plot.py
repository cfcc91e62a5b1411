"""The roofline plot: measured speeds under the machine's ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from corematching.lab.bench.table import write_title

MARGIN = 4.0


def draw_roofline(board: dict[str, Any], path: Path) -> None:
    """Draw each contender's two phases: GFLOP/s over FLOPs per byte of memory traffic.

    Up to the first token (circles): FLOPs of vision tower and prefill, all weights read once. Per
    further token (squares): FLOPs and bytes of a decode step.

    Parameters
    ----------
    board : dict
        As `corematching.lab.bench.make_board` gives it.
    path : Path
        A PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(entry, *phase) for entry in board["contenders"] for phase in list_phases(entry)]
    intensities = [point[2] for point in points]
    copy, matmul = (board["ceilings"][key] for key in ("copy", "matmul"))
    ends = [*intensities, matmul / copy]
    x = np.geomspace(min(ends) / MARGIN, max(ends) * MARGIN, 200)
    label = f"measured ceiling ({board['ceilings']['matmul_dtype']} products)"
    axes.plot(x, np.minimum(x * copy, matmul) / 1e9, color="black", label=label)
    names = [entry["name"] for entry in board["contenders"]]
    for entry, phase, intensity, rate in points:
        first = phase == "first token"
        axes.plot(
            intensity,
            rate / 1e9,
            marker="o" if first else "s",
            color=f"C{names.index(entry['name']) % 10}",
            linestyle="",
            label=entry["name"] if first else None,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(
        f"{write_title(board)}\ncircles: up to the first token, squares: per further one"
    )
    axes.title.set_fontsize("medium")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(path)


def list_phases(entry: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Phase, FLOPs per byte, FLOP/s of both phases."""
    costs, reached = entry["costs"], entry["reached"]
    first = costs["vision_flops"] + costs["prefill_flops"]
    return [
        ("first token", first / costs["prefill_bytes"], reached["ttft_flops_per_second"]),
        (
            "further token",
            costs["decode_flops"] / costs["decode_bytes"],
            reached["tpot_flops_per_second"],
        ),
    ]
