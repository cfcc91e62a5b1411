"""The two kinds of score. A new one is one file: subclass, name it, override `score`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import ConfigError
from corematching.policies.component import Component
from corematching.protocol import ACTIVATIONS, PrefillView


class TokenScore(Component, kind="token score"):
    """The importance of each image token. Override `score`.

    Attributes
    ----------
    needs : frozenset of str
        The parts of the view that `score` reads, out of `corematching.protocol.NEEDS`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ACTIVATIONS})

    def score(self, view: PrefillView) -> Tensor:
        """Score the tokens; the highest image tokens are kept.

        Parameters
        ----------
        view : PrefillView
            What the layer computed.

        Returns
        -------
        Tensor
            (B, T), any float dtype; values outside the image tokens are ignored.

        Raises
        ------
        ConfigError
            The layer does not show what the score reads.
        """
        raise NotImplementedError

    def __call__(self, view: PrefillView) -> Tensor:
        """Score the image tokens.

        Parameters
        ----------
        view : PrefillView
            What the layer computed.

        Returns
        -------
        Tensor
            (B, T) float32, NaN where the token is no image token.
        """
        return torch.where(view.image, self.score(view).float(), torch.nan)


class NeuronScore(Component, kind="neuron score"):
    """The importance of each intermediate neuron to a sample. Override `score`.

    Attributes
    ----------
    needs : frozenset of str
        The parts of the view that `score` reads, out of `corematching.protocol.NEEDS`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ACTIVATIONS})
    in_parts: ClassVar[bool] = False
    """Whether a GPU's kernel writes what scores come from in parts; see `sum_parts`."""

    def score(self, view: PrefillView) -> Tensor:
        """Score the neurons of the view's layer.

        Parameters
        ----------
        view : PrefillView
            What the layer computed.

        Returns
        -------
        Tensor
            (B, F), any dtype; the highest are kept, the first among ties.

        Raises
        ------
        ConfigError
            The layer does not show what the score reads.
        """
        raise NotImplementedError

    def sum_parts(self, view: PrefillView, out: Tensor) -> bool:
        """On a GPU, write parts of sums to ``out`` in one launch, of which `finish` makes scores.

        Parameters
        ----------
        view : PrefillView
            What the layer computed.
        out : Tensor
            (2, C, B, F) float32: parts that add up to what the scores come from, and to the sums of
            the activations over all tokens.

        Returns
        -------
        bool
            Whether that was done; else the rule takes `score`.
        """
        return False

    def finish(self, total: Tensor) -> Tensor:
        """Make scores of sums.

        Parameters
        ----------
        total : Tensor
            (..., F), the sums that `sum_parts` wrote parts of.

        Returns
        -------
        Tensor
            (..., F) scores.
        """
        return total

    def __call__(self, view: PrefillView) -> Tensor:
        """Score the neurons of the view's layer.

        Parameters
        ----------
        view : PrefillView
            What the layer computed.

        Returns
        -------
        Tensor
            (B, F), any dtype.
        """
        return self.score(view)


def read_activations(view: PrefillView) -> Tensor:
    """The view's (B, T, F) activations.

    Raises
    ------
    ConfigError
        When the view has none, as at the input of the first layer.
    """
    if view.activations is None:
        raise ConfigError(
            f"layer {view.layer} shows no activations: score tokens after layer 0 or a later one"
        )
    return view.activations
