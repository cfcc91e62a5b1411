"""The weights of a layer for whole prompts, read again after each change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corematching.backends.cpu.native import (
    HEAD_DIM_STEP,
    Norm,
    PrefillLayer,
    Scratch,
    why_unsupported_gemm,
)
from corematching.model.snapshot import WeightSnapshot

INPUTS = ("q", "k", "v")
MATRICES = (*INPUTS, "o", "gate", "up", "down")


@dataclass
class PrefillWeights:
    """What prompts read of a layer.

    Attributes
    ----------
    tensors : dict
        ``q``, ``k``, ``v``, ``o``, ``up``, ``down`` and, of a gated FFN, ``gate``, each (outputs,
        inputs); their biases under ``<name>_bias``, None or missing where there are none.
    norms : tuple of Norm
        In front of the attention and of the FFN.
    head_dim : int
        Numbers of a head.
    activation : str
        Of the gate, or of ``up`` without one.
    scaling : float
        Of the attention's scores.
    """

    tensors: dict[str, Tensor | None]
    norms: tuple[Norm, Norm]
    head_dim: int
    activation: str
    scaling: float

    def matrix(self, name: str) -> Tensor:
        """A matrix that is there."""
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def bias(self, name: str) -> Tensor | None:
        """The bias of a matrix, or None."""
        return self.tensors.get(f"{name}_bias")

    def are_supported(self) -> bool:
        """Whether the kernels can multiply with all of them; they are of one dtype."""
        found = [(name, self.tensors.get(name)) for name in MATRICES]
        matrices = [(name, part) for name, part in found if part is not None]
        kinds = {part.dtype for _, part in matrices} | {norm.weight.dtype for norm in self.norms}
        return len(kinds) == 1 and all(
            why_unsupported_gemm(part) is None and (name == "down" or part.is_contiguous())
            for name, part in matrices
        )

    def join(self, scratch: Scratch) -> PrefillLayer | None:
        """The layer as one call; None where the kernels do not have its attention."""
        query, key, output = self.matrix("q"), self.matrix("k"), self.matrix("o")
        fits = output.shape[1] == query.shape[0] and not query.shape[0] % key.shape[0]
        if self.head_dim % HEAD_DIM_STEP or not fits:
            return None
        return PrefillLayer(
            self.tensors, self.norms, self.head_dim, self.activation, self.scaling, scratch
        )


def list_tensors(linears: dict[str, Any]) -> dict[str, Tensor | None]:
    """Weights and biases of linear layers, by the layers' names."""
    weights = {name: linear.weight for name, linear in linears.items()}
    return weights | {f"{name}_bias": linear.bias for name, linear in linears.items()}


class WeightReader:
    """Reads a layer's weights again when its modules or parameters are others.

    Parameters
    ----------
    layer : nn.Module
        The layer.
    read : callable
        Gives its present weights, or None where its modules are not plain.
    scratch : Scratch
        Memory to work in.

    Attributes
    ----------
    whole : PrefillLayer or None
        The layer as one call, where the kernels have all of it.
    """

    def __init__(
        self, layer: nn.Module, read: Callable[[], PrefillWeights | None], scratch: Scratch
    ) -> None:
        self._layer, self._read, self._scratch = layer, read, scratch
        self._watch = WeightSnapshot()
        self._weights: PrefillWeights | None = None
        self.whole: PrefillLayer | None = None

    def find(self) -> PrefillWeights | None:
        """The weights; None if the kernels do not support them."""
        if not self._watch.unchanged():
            weights = self._read()
            known = weights is not None and weights.are_supported()
            self._weights = weights if known else None
            self.whole = None if self._weights is None else self._weights.join(self._scratch)
            self._watch = WeightSnapshot([self._layer])
        return self._weights
