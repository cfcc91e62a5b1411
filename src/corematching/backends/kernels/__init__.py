"""Computing an FFN from some of its intermediate neurons.

Two ways: a kernel that reads the chosen neurons' rows out of the dense weights, in place
(`find_kernel`, `IndexedKernel`); or, where there is none, `sparse_ffn` on compact copies of them
(`gather_rows`, `gather_columns`), in PyTorch's operators, on any device.
"""

from corematching.backends.kernels.interface import IndexedKernel, NeuronSets, Thresholds
from corematching.backends.kernels.select import find_kernel
from corematching.backends.torch.sparse_ffn import (
    CompactWeights,
    copy_neurons,
    gather_columns,
    gather_rows,
    sparse_ffn,
)
from corematching.model.ffn_weights import ACTIVATIONS, FFNWeights, activation_name

__all__ = [
    "ACTIVATIONS",
    "CompactWeights",
    "FFNWeights",
    "IndexedKernel",
    "NeuronSets",
    "Thresholds",
    "activation_name",
    "copy_neurons",
    "find_kernel",
    "gather_columns",
    "gather_rows",
    "sparse_ffn",
]
