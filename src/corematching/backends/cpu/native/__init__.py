"""The kernels in C for CPUs; compiled on first use."""

from corematching.backends.cpu.native.attention import TiledAttention, refuse_attention
from corematching.backends.cpu.native.build import find_library
from corematching.backends.cpu.native.kernel import (
    KERNEL,
    NativeKernel,
    Plan,
    linear,
    refuse_matrix,
)
from corematching.backends.cpu.native.pages import leave_file, use_large_pages
from corematching.backends.cpu.native.products import (
    STEP,
    TILES,
    VECTORS,
    Products,
    Scratch,
    find_unit,
    has_tiles,
    list_dtypes,
    refuse_product,
)
from corematching.backends.cpu.native.prompt import (
    find_size,
    mark_highest,
    pick_highest,
    sum_rows,
    weigh_marks,
)
from corematching.backends.cpu.native.prompt_layer import PromptLayer
from corematching.backends.cpu.native.rows import Norm, normalise, rotate_apart
from corematching.backends.cpu.native.step import DecodeStep, LayerWeights, Shape
from corematching.backends.cpu.native.structs import MAX_BATCH

__all__ = [
    "KERNEL",
    "MAX_BATCH",
    "STEP",
    "TILES",
    "VECTORS",
    "DecodeStep",
    "LayerWeights",
    "NativeKernel",
    "Norm",
    "Plan",
    "Products",
    "PromptLayer",
    "Scratch",
    "Shape",
    "TiledAttention",
    "find_library",
    "find_size",
    "find_unit",
    "has_tiles",
    "leave_file",
    "linear",
    "list_dtypes",
    "mark_highest",
    "normalise",
    "pick_highest",
    "refuse_attention",
    "refuse_matrix",
    "refuse_product",
    "rotate_apart",
    "sum_rows",
    "use_large_pages",
    "weigh_marks",
]
