"""The kernels in C for CPUs; compiled on first use."""

from .build import find_library
from .kernel import KERNEL, NativeKernel, Plan, linear, refuse_matrix
from .pages import leave_file, use_large_pages
from .prompt import mark_highest, pick_highest, sum_rows, weigh_marks
from .step import DecodeStep, LayerWeights, Shape
from .structs import MAX_BATCH
from .tiles import TileProducts, has_tiles, normalise, refuse_tiles, rotate

__all__ = [
    "KERNEL",
    "MAX_BATCH",
    "DecodeStep",
    "LayerWeights",
    "NativeKernel",
    "Plan",
    "Shape",
    "TileProducts",
    "find_library",
    "has_tiles",
    "leave_file",
    "linear",
    "mark_highest",
    "normalise",
    "pick_highest",
    "refuse_matrix",
    "refuse_tiles",
    "rotate",
    "sum_rows",
    "use_large_pages",
    "weigh_marks",
]
