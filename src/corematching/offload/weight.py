"""Weights that are not in fast memory: what their parameters are while they are away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from corematching.model.absent import AbsentWeight
from corematching.offload.source import Source


@dataclass
class Outside:
    """A weight that is not in fast memory.

    Attributes
    ----------
    parameter : nn.Parameter
        Its place in the model. While the weight is away, the parameter is an `AbsentWeight` and
        takes one number of memory, a NaN.
    source : Source
        Where the weight is.
    """

    parameter: nn.Parameter
    source: Source

    def __post_init__(self) -> None:
        self._kind = type(self.parameter)

    @property
    def nbytes(self) -> int:
        """Bytes in fast memory."""
        return self.parameter.numel() * self.parameter.element_size()

    def put_away(self) -> None:
        """Take the weight out of fast memory."""
        old = self.parameter
        self._fill(blank(old.shape, old.dtype, old.device))
        old.__class__ = AbsentWeight

    def show(self, view: Tensor) -> None:
        """Let the parameter have its numbers in ``view``, until it is put away again."""
        self._fill(view)

    def bring_back(self) -> None:
        """Put the weight into fast memory of its own, for good."""
        with torch.inference_mode(False), torch.no_grad():
            old = self.parameter
            fresh = torch.empty(tuple(old.shape), dtype=old.dtype, device=old.device)
            self.source.copy_to(fresh)
            self._fill(fresh)

    def _fill(self, data: Tensor) -> None:
        self.parameter.__class__ = self._kind
        self.parameter.data = data


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN in any shape, in the memory of one number."""
    with torch.inference_mode(False):
        return torch.full((1,), torch.nan, dtype=dtype, device=device).expand(tuple(shape))
