"""What the host knows of a prompt's tokens, so that no cut waits for the device.

The masks of the prompt are copied to the host while its images are encoded. After a cut whose
counts are known, the masks follow from them wherever a sample's image tokens stand side by side.
Shapes: B samples, T tokens, K survivors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from corematching import devices
from corematching.devices import HostCopy
from corematching.protocol import HostView, TokenChoice


class KnownTokens:
    """The tokens of one prompt that the host has counted, up to the latest cut.

    Parameters
    ----------
    valid, image : Tensor
        (B, T) bool, the prompt's tokens without padding, and its image tokens.

    Attributes
    ----------
    view : HostView or None
        What is known; None on the CPU, where the masks can be read, and before `read`.
    """

    def __init__(self, valid: Tensor, image: Tensor) -> None:
        self.view: HostView | None = None
        self._length = valid.shape[1]
        self._copy = None if devices.on_host(valid) else HostCopy(torch.stack([valid, image]))

    def read(self) -> None:
        """Read the prompt's masks, which have arrived by the time its first layer runs."""
        if self._copy is not None:
            valid, image = self._copy.read()
            self._copy, self.view = None, make_view(valid, image)

    @property
    def is_full(self) -> bool | None:
        """Whether no token is padding or filler; None where the host does not know."""
        if self.view is None:
            return None
        counts = zip(self.view.image_counts, self.view.text_counts, strict=True)
        return all(images + text == self._length for images, text in counts)

    def follow(self, choice: TokenChoice, image: Tensor) -> int | None:
        """Follow a cut, (B, T) with its image tokens; returns K, or None where nothing is known.

        Waits for the device where the choice does not say how many image tokens it keeps.
        """
        if self.view is None:
            return None
        return self.cut(choice.counts or (choice.keep & image).sum(1).tolist())

    def cut(self, counts: Sequence[int]) -> int:
        """Follow a cut that keeps some image tokens of each sample; returns K."""
        view = self.view
        assert view is not None
        after = [n + m for n, m in zip(counts, view.text_counts, strict=True)]
        self._length = max(*after, 1)
        self.view = HostView(tuple(counts), view.text_counts)
        masks = _shorten(view, counts, self._length)
        if masks is not None:
            self.view = HostView(tuple(counts), view.text_counts, *masks)
        return self._length


def make_view(valid: np.ndarray, image: np.ndarray) -> HostView:
    """What two (B, T) masks say."""
    images = tuple(int(n) for n in image.sum(1))
    text = tuple(int(n) for n in (valid & ~image).sum(1))
    return HostView(images, text, valid, image)


def _shorten(
    view: HostView, counts: Sequence[int], most: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The (B, K) masks after a cut; None where they depend on which image tokens stay."""
    if view.valid is None or view.image is None:
        return None
    valid = np.zeros((len(counts), most), dtype=bool)
    image = np.zeros_like(valid)
    for row, count in enumerate(counts):
        columns = view.image[row][view.valid[row]].nonzero()[0]
        if not len(columns):
            valid[row, most - view.text_counts[row] :] = True
            continue
        if columns[-1] - columns[0] != len(columns) - 1 and 0 < count < len(columns):
            return None
        if count == len(columns):
            present = view.image[row][view.valid[row]]
            image[row, most - len(present) :] = present
            valid[row, most - len(present) :] = True
            continue
        start = most - view.text_counts[row] - count
        valid[row, start:] = True
        image[row, start + columns[0] : start + columns[0] + count] = True
    return valid, image
