"""The sparse FFN in plain PyTorch: the reference on every device, traceable by ``torch.compile``.

Shapes: B samples, S sets of K neurons, G samples per set, F neurons of the dense FFN, d hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from corematching.backends.buffers import find_buffer
from corematching.backends.kernels.interface import Thresholds


@dataclass
class CompactWeights:
    """Compact copies of the chosen neurons' weights, in the layout of the dense weights.

    Attributes
    ----------
    up : Tensor
        (S, K, d), rows of the up projection.
    down : Tensor
        (S, d, K), columns of the down projection; gathering them as rows is many times slower.
    gate : Tensor or None
        (S, K, d), rows of the gate projection; None in an FFN without a gate.
    up_bias, gate_bias : Tensor or None
        (S, K), where the projections have a bias.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are not None."""
        every = (self.up, self.down, self.gate, self.up_bias, self.gate_bias)
        return tuple(tensor for tensor in every if tensor is not None)


def gather_rows(weight: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
    """Copy the rows ``indices`` of a matrix, or the entries of a vector, for each set.

    Parameters
    ----------
    weight : Tensor
        (F, d) or (F,).
    indices : Tensor
        (S, K) long.
    out : Tensor, optional
        (S, K, d) or (S, K), contiguous, written in place.

    Returns
    -------
    Tensor
        (S, K, d) or (S, K); ``out`` where it was given.
    """
    if out is None:
        out = weight.new_empty(*indices.shape, *weight.shape[1:])
    torch.index_select(weight, 0, indices.reshape(-1), out=out.view(-1, *weight.shape[1:]))
    return out


def gather_columns(weight: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
    """Copy the columns ``indices`` of a matrix, for each set.

    Parameters
    ----------
    weight : Tensor
        (d, F).
    indices : Tensor
        (S, K) long.
    out : Tensor, optional
        (S, d, K), contiguous, written in place.

    Returns
    -------
    Tensor
        (S, d, K); ``out`` where it was given.
    """
    if out is None:
        out = weight.new_empty(indices.shape[0], weight.shape[0], indices.shape[1])
    for columns, chosen in zip(out, indices, strict=True):
        torch.gather(weight, 1, chosen.expand(weight.shape[0], -1), out=columns)
    return out


def copy_neurons(
    dense: Mapping[str, Tensor], indices: Tensor, old: CompactWeights | None
) -> CompactWeights:
    """Compact copies of some neurons' weights, in the buffers of earlier copies where they fit.

    Parameters
    ----------
    dense : mapping
        The dense weights, by their names in `CompactWeights`.
    indices : Tensor
        (S, K) long, the neurons of each set.
    old : CompactWeights or None
        Earlier copies.
    """
    fresh: dict[str, Tensor] = {}
    sets, count = indices.shape
    for name, weight in dense.items():
        buffer = None if old is None else getattr(old, name)
        if name == "down":
            buffer = find_buffer(buffer, (sets, weight.shape[0], count), weight)
            fresh[name] = gather_columns(weight, indices, buffer)
        else:
            buffer = find_buffer(buffer, (sets, count, *weight.shape[1:]), weight)
            fresh[name] = gather_rows(weight, indices, buffer)
    if old is not None and all(getattr(old, name) is new for name, new in fresh.items()):
        return old
    return CompactWeights(**fresh)


def sparse_ffn(
    x: Tensor,
    weights: CompactWeights,
    bias: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    limits: Thresholds | None = None,
) -> Tensor:
    """One decode step of an FFN on the chosen neurons.

    Parameters
    ----------
    x : Tensor
        (B, d), one token per sample; B is a multiple of S, and of the number of biases.
        Consecutive samples share a set: sample b computes the neurons of set ``b // (B / S)``.
    weights : CompactWeights
        S sets of K neurons.
    bias : Tensor or None
        (C, d); row ``b // (B / C)`` is added to the output of sample b.
    activation : callable
        The FFN's activation function.
    limits : Thresholds or None
        Per-token thresholds, (S,) each; values below them are computed and then masked.

    Returns
    -------
    Tensor
        (B, d).
    """
    limits = limits or Thresholds()
    x = _silence(x, limits.input)
    up = _project(x, weights.up, weights.up_bias)  # (B, K)
    if weights.gate is None:
        neurons = activation(up)
    else:
        gate = activation(_project(x, weights.gate, weights.gate_bias))
        neurons = _silence(gate, limits.gate) * up
    neurons = _silence(neurons, limits.output)
    sets = weights.down.shape[0]
    if sets == 1:
        out = F.linear(neurons, weights.down[0])
    else:
        down = weights.down.transpose(1, 2)  # (S, K, d)
        out = torch.bmm(neurons.unflatten(0, (sets, -1)), down).flatten(0, 1)
    if bias is None:
        return out
    if bias.shape[0] == 1:
        return out + bias
    return (out.unflatten(0, (bias.shape[0], -1)) + bias[:, None]).flatten(0, 1)


def _project(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Project (B, d) with rows (S, K, d) and bias (S, K) to (B, K)."""
    sets = rows.shape[0]
    if sets == 1:
        return F.linear(x, rows[0], None if bias is None else bias[0])
    out = torch.bmm(x.unflatten(0, (sets, -1)), rows.transpose(1, 2))  # (S, G, K)
    if bias is not None:
        out = out + bias[:, None]
    return out.flatten(0, 1)


def _silence(x: Tensor, threshold: Tensor | None) -> Tensor:
    """Set entries of (B, n) to 0 where their magnitude is below the (S,) thresholds."""
    if threshold is None:
        return x
    rows = threshold[:, None].expand(-1, x.shape[0] // threshold.shape[0]).reshape(-1, 1)
    return torch.where(x.abs() >= rows, x, 0)
