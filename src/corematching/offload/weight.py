"""Weights outside fast memory and their parameters in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corematching.model.absent import AbsentWeight
from corematching.offload.source import Source


@dataclass
class Outside:
    """A weight outside fast memory.

    Attributes
    ----------
    parameter : nn.Parameter
        Its parameter in the model: an `AbsentWeight` with the memory of one element, a NaN, while
        the weight is outside.
    source : Source
        The source of the weight.
    """

    parameter: nn.Parameter
    source: Source

    def __post_init__(self) -> None:
        self._kind = type(self.parameter)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in fast memory."""
        return self.parameter.numel() * self.parameter.element_size()

    def put_away(self) -> None:
        """Replace the weight in fast memory by a placeholder."""
        old = self.parameter
        self._fill(blank(old.shape, old.dtype, old.device))
        old.__class__ = AbsentWeight

    def show(self, view: Tensor) -> None:
        """Back the parameter with ``view`` until it is put away again."""
        self._fill(view)

    def bring_back(self) -> None:
        """Load the weight into fast memory of its own, for good."""
        with torch.inference_mode(False), torch.no_grad():
            old = self.parameter
            fresh = torch.empty(tuple(old.shape), dtype=old.dtype, device=old.device)
            self.source.copy_to(fresh)
            self._fill(fresh)

    def _fill(self, data: Tensor) -> None:
        self.parameter.__class__ = self._kind
        self.parameter.data = data


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN in any shape, in the memory of one element."""
    with torch.inference_mode(False):
        return torch.full((1,), torch.nan, dtype=dtype, device=device).expand(tuple(shape))
