"""Seconds, bytes and FLOPs: ours beside dense and beside other engines, in turn on one machine.

>>> board = run_bench(workload, ours, peers, Plan(), {})  # doctest: +SKIP
"""

from corematching.lab.bench.board import make_board
from corematching.lab.bench.by_hand import name_by_hand
from corematching.lab.bench.contenders import MethodContender, generate_exactly
from corematching.lab.bench.machine import Ceilings, measure_ceilings, require_quiet
from corematching.lab.bench.peers import Adapter, PeerContender, choose_adapters, read_adapters
from corematching.lab.bench.plot import draw_roofline
from corematching.lab.bench.random_model import build_random
from corematching.lab.bench.runner import Plan, run_bench
from corematching.lab.bench.shapes import SHAPES, Shape, find_shape
from corematching.lab.bench.table import write_markdown
from corematching.lab.bench.workload import LoadedWorkload, RandomWorkload, Workload

__all__ = [
    "SHAPES",
    "Adapter",
    "Ceilings",
    "LoadedWorkload",
    "MethodContender",
    "PeerContender",
    "Plan",
    "RandomWorkload",
    "Shape",
    "Workload",
    "build_random",
    "choose_adapters",
    "draw_roofline",
    "find_shape",
    "generate_exactly",
    "make_board",
    "measure_ceilings",
    "name_by_hand",
    "read_adapters",
    "require_quiet",
    "run_bench",
    "write_markdown",
]
