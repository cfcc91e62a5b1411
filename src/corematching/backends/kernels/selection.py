"""Choosing image tokens by the kernels of a GPU, where the numbers to keep are known beforehand.

Each function gives None where no kernel can run: no Triton, another device, dtype or layout. The
caller then has PyTorch's operators do it. None of them waits for the device.

Shapes: B samples, T tokens, F neurons, K survivors, C and G the most kept and dropped image tokens
of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from corematching.backends.kernels.statistics import import_or_none

MODULES = {"cuda": "corematching.backends.cuda.triton_selection"}


class Kept(NamedTuple):
    """The image tokens that a cut keeps.

    Attributes
    ----------
    kept : Tensor
        (B, T) bool, the image tokens that stay.
    keep : Tensor
        (B, T) bool, these and the text.
    cut : Tensor
        (B,) float32, the lowest score kept for its own sake; NaN in a sample without any.
    broken : Tensor
        (B,) bool, samples with an image token whose score is NaN or infinite: all scores of theirs
        count as equal.
    listed : Tensor
        (B, C + G) long, the kept and then the dropped image tokens in order; 0 behind the last.
    most : int
        C.
    numbers : Tensor
        (3, B) long, image tokens that stay, those of them that lie evenly, and those there were.
    """

    kept: Tensor
    keep: Tensor
    cut: Tensor
    broken: Tensor
    listed: Tensor
    most: int
    numbers: Tensor


class Survivors(NamedTuple):
    """The tokens after a cut; see `corematching.cache.masks.survivors`.

    Attributes
    ----------
    keep : Tensor
        (B, T) bool, the tokens that stay.
    order : Tensor
        (B, K) long, their columns, right-aligned.
    valid, image : Tensor
        (B, K) bool, tokens that are no filler, and image tokens.
    origin : Tensor
        (B, K) long, their columns in the whole prompt.
    weights, log_weights : Tensor or None
        (B, K) float32, where there are weights.
    """

    keep: Tensor
    order: Tensor
    valid: Tensor
    image: Tensor
    origin: Tensor
    weights: Tensor | None
    log_weights: Tensor | None


def weigh_rarity(marks: Tensor, chosen: Tensor, image: Tensor, power: float) -> Tensor | None:
    """How many chosen tokens mark a neuron, times the neuron's rarity over the image tokens.

    Parameters
    ----------
    marks : Tensor
        (B, T, F) bool.
    chosen, image : Tensor
        (B, T) bool.
    power : float
        Of the rarity ``log((1 + N) / (1/2 + users))``, at least 0.

    Returns
    -------
    Tensor or None
        (B, F) float32.
    """
    module = _find(marks)
    return None if module is None else module.weigh_rarity(marks, chosen, image, power)


def keep_highest(
    scores: Tensor,
    image: Tensor,
    valid: Tensor,
    counts: Sequence[int],
    present: Sequence[int],
    cover: float = 0.0,
    even: Tensor | None = None,
) -> Kept | None:
    """Keep each sample's highest image tokens; of equal ones the first.

    Parameters
    ----------
    scores : Tensor
        (B, T) float32, read where ``image`` is True.
    image, valid : Tensor
        (B, T) bool, image tokens, and tokens that are no padding.
    counts, present : sequence of int
        By sample, image tokens to keep and image tokens there are.
    cover : float
        Ratio of the kept ones that lie evenly over the image tokens, whatever their scores.
    even : Tensor or None
        (B, T) bool, the tokens that lie evenly, where ``cover`` alone does not say.
    """
    module = _find(scores)
    if module is None:
        return None
    kept: Kept | None = module.keep_highest(scores, image, valid, counts, present, cover, even)
    return kept


def credit_nearest(products: Tensor, norms: Tensor, kept: Kept, given: Tensor, first: int) -> bool:
    """Count dropped image tokens to the kept ones that they are most like.

    Parameters
    ----------
    products : Tensor
        (B, R, C) float32, scalar products of R dropped tokens' features with the kept ones'.
    norms : Tensor
        (B, C) float32, lengths of the kept ones' features.
    kept : Kept
        The choice.
    given : Tensor
        (B, T) float32, what each token counts for; changed in place.
    first : int
        The first of the R among the dropped tokens.

    Returns
    -------
    bool
        Whether a kernel could run.
    """
    module = _find(products)
    if module is None:
        return False
    return bool(module.credit_nearest(products, norms, kept, given, first))


def line_up(
    keep: Tensor,
    valid: Tensor,
    image: Tensor,
    origin: Tensor,
    weights: Tensor | None,
    most: int,
) -> Survivors | None:
    """The tokens after a cut that keeps ``keep`` and all text.

    Parameters
    ----------
    keep, valid, image : Tensor
        (B, T) bool, what a policy keeps, tokens that are no padding, and image tokens.
    origin : Tensor
        (B, T) long, the tokens' columns in the whole prompt.
    weights : Tensor or None
        (B, T) float32.
    most : int
        K, the most tokens that stay in a sample.
    """
    module = _find(keep)
    if module is None:
        return None
    found: Survivors | None = module.line_up(keep, valid, image, origin, weights, most)
    return found


def _find(x: Tensor) -> Any:
    return import_or_none(MODULES.get(x.device.type))
