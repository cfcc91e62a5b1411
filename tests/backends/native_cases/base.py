"""A call of a kernel with random tensors, and what it gives in float64."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from corematching.backends.cpu import native as n

BF16, F32 = torch.bfloat16, torch.float32
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
CANCELLED = 0.2  # what sums that come out near 0 were made of
ERRORS = {F32: 2e-4, BF16: 3e-2}


@dataclass
class Case:
    """One call.

    Attributes
    ----------
    name : str
        Of the kernel.
    tensors : dict
        What it gets, by name; None where there is none.
    call, reference : callable
        Of the tensors: a list of what comes out, from the kernel and in float64.
    dtype : torch.dtype
        Of the numbers, which decides how far apart the two may be.
    exact : bool
        Whether they must be the same.
    """

    name: str
    tensors: dict[str, Tensor | None]
    call: Callable[..., list[Tensor] | None]
    reference: Callable[..., list[Tensor]]
    dtype: torch.dtype = F32
    exact: bool = False


def is_close(case: Case, ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether a kernel's results are those of the reference, but for roundings."""
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or (case.exact and not torch.equal(a, b.to(a.dtype))):
            return False
        if not case.exact:
            error, scale = (a.double() - b.double()).norm(), b.double().norm()
            if not error <= ERRORS[case.dtype] * (scale + CANCELLED * b.numel() ** 0.5):
                return False
    return True


class Draw:
    """Random numbers, tensors and shapes from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._rng = torch.Generator().manual_seed(seed)

    def size(self, least: int, most: int, multiple: int = 1) -> int:
        """A whole number; small ones and powers of 2 are likely."""
        n = self.random.choice(
            [least, self.random.randint(least, most), 1 << most.bit_length() - 1]
        )
        return max(least, min(n, most)) * multiple

    def dtype(self) -> torch.dtype:
        return self.random.choice([F32, BF16])

    def inputs(self, most: int) -> int:
        """A size of a matrix: any, or a multiple of 32, which matrix tiles take."""
        if self.random.random() < 0.5:
            return self.size(1, most)
        return self.size(1, max(1, most // 32), 32)

    def normal(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return (torch.randn(*shape, generator=self._rng) / max(shape[-1], 1) ** 0.5).to(dtype)

    def maybe(self, *shape: int, dtype: torch.dtype = F32) -> Tensor | None:
        return self.normal(*shape, dtype=dtype) if self.random.random() < 0.5 else None

    def flags(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._rng) < 0.7

    def choice(self, sets: int, width: int) -> Tensor:
        count = self.size(1, width)
        order = torch.rand(sets, width, generator=self._rng).argsort(1)
        return order[:, :count].sort(1).values

    def activation(self, known: int = len(ACTIVATIONS)) -> str:
        return self.random.choice(list(ACTIVATIONS)[:known])

    def rows(self) -> tuple[int, int]:
        """Rows, and sets that they share."""
        sets = self.random.choice([1, 1, 2, 3, 5, 8])
        return sets * self.random.randint(1, n.MAX_BATCH // sets), sets


def double(x: Tensor | None) -> Tensor | None:
    """x in float64; None for None."""
    return None if x is None else x.double()


def norm64(x, weight, bias, epsilon):
    """An RMSNorm or, with a bias, a LayerNorm of float64 rows."""
    if bias is None:
        return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()
    return F.layer_norm(x, x.shape[-1:], weight.double(), bias.double(), epsilon)


def rotate64(x, cos, sin):
    """Rotary embedding in float64."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
