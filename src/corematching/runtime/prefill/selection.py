"""The token and neuron choices of a prefill.

Shapes: B samples, K tokens still present.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.protocol import NeuronChoice, TokenChoice


@dataclass
class Stage:
    """One layer after which tokens were dropped.

    Attributes
    ----------
    layer : int
        The layer; -1 is the input of layer 0.
    origin : Tensor
        (B, K) long, the candidate tokens' columns in the whole prompt.
    present : Tensor
        (B, K) bool, False on filler and padding.
    choice : TokenChoice
        The policy's choice among the candidates.
    """

    layer: int
    origin: Tensor
    present: Tensor
    choice: TokenChoice


@dataclass
class Selection:
    """The choices of one prefill.

    Attributes
    ----------
    stages : list of Stage
        The token choices, in the order of their layers.
    neurons : dict
        The neuron choices, by layer.
    """

    stages: list[Stage] = field(default_factory=list)
    neurons: dict[int, NeuronChoice] = field(default_factory=dict)

    def check(self) -> None:
        """Run the checks that the token choices put off, each once."""
        for stage in self.stages:
            check, stage.choice.check = stage.choice.check, None
            if check is not None:
                check()

    def forget_neurons(self) -> None:
        """Release the neuron choices; a cache that decodes with them holds its own dict."""
        self.neurons = {}
