"""Ratios turned into whole numbers, in integer arithmetic: the same on every device."""

from __future__ import annotations

from torch import Tensor

from corematching.errors import ConfigError

PPM = 1_000_000


def count_of(ratio: float, total: int) -> int:
    """``ratio * total``, rounded half up, in [1, total]."""
    return min(total, max(1, (2 * total * parts(ratio) + PPM) // (2 * PPM)))


def counts_of(ratio: float, totals: Tensor) -> Tensor:
    """`count_of` for a tensor of totals; 0 where the total is 0.

    Parameters
    ----------
    totals : Tensor
        (...) long.
    """
    rounded = (2 * totals * parts(ratio) + PPM).div(2 * PPM, rounding_mode="floor")
    return rounded.clamp(min=1).minimum(totals)


def parts(ratio: float) -> int:
    """A ratio in parts per million."""
    return round(ratio * PPM)


def layers_of(depth: int | float, num_layers: int) -> int:
    """The number of layers for an int (itself) or a float (a ratio of the depth).

    Ratios let one setting fit models of any depth: CoreInfer's six dense layers out of 32 are
    ``6 / 32``, which is again six in a model of 30.

    Raises
    ------
    ConfigError
        When the model has fewer layers.
    """
    if isinstance(depth, float):
        return (2 * num_layers * parts(depth) + PPM) // (2 * PPM)
    if depth > num_layers:
        raise ConfigError(f"{depth} layers asked for, the model has {num_layers}: ask for fewer")
    return depth
