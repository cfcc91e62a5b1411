"""Computing an FFN from some of its intermediate neurons.

One interface, `gather_rows`, `gather_columns` and `sparse_ffn` over `CompactWeights`, so that a
faster kernel can take the place of the PyTorch one without a change in the runtime.
"""

from corematching.kernels.torch_reference import (
    CompactWeights,
    gather_columns,
    gather_rows,
    sparse_ffn,
)

__all__ = ["CompactWeights", "gather_columns", "gather_rows", "sparse_ffn"]
