"""The compiled kernels for CPUs, behind checks of what they are handed."""

from corematching.backends.cpu.native.attention import (
    HEAD_DIM_STEP,
    PrefillAttention,
    why_unsupported_attention,
)
from corematching.backends.cpu.native.gemm import Gemm, why_unsupported_gemm
from corematching.backends.cpu.native.kernel import (
    KERNEL,
    NativeKernel,
    Plan,
    linear,
    why_unsupported_matrix,
)
from corematching.backends.cpu.native.library import (
    INSTALL_HINT,
    MAX_BATCH,
    find_kernels,
    prefers_native,
    supported_isas,
    use_isa,
)
from corematching.backends.cpu.native.pages import leave_file, use_large_pages
from corematching.backends.cpu.native.prefill_layer import PrefillLayer
from corematching.backends.cpu.native.rows import Norm, apply_rope, normalize
from corematching.backends.cpu.native.scratch import Scratch
from corematching.backends.cpu.native.selection import (
    find_size,
    mark_highest,
    pick_highest,
    sum_rows,
    weigh_marks,
)
from corematching.backends.cpu.native.step import DecodeStep, LayerWeights, Shape

__all__ = [
    "HEAD_DIM_STEP",
    "INSTALL_HINT",
    "KERNEL",
    "MAX_BATCH",
    "DecodeStep",
    "Gemm",
    "LayerWeights",
    "NativeKernel",
    "Norm",
    "Plan",
    "PrefillAttention",
    "PrefillLayer",
    "Scratch",
    "Shape",
    "apply_rope",
    "find_kernels",
    "find_size",
    "leave_file",
    "linear",
    "mark_highest",
    "normalize",
    "pick_highest",
    "prefers_native",
    "sum_rows",
    "supported_isas",
    "use_isa",
    "use_large_pages",
    "weigh_marks",
    "why_unsupported_attention",
    "why_unsupported_gemm",
    "why_unsupported_matrix",
]
