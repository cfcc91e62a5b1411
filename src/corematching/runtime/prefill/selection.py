"""What a prefill chose.

Shapes: B samples, T tokens of the prompt, K tokens still present.
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
        The layer.
    origin : Tensor
        (B, K) long, columns in the whole prompt of the tokens that the policy chose among.
    present : Tensor
        (B, K) bool, False on filler and padding.
    choice : TokenChoice
        What it chose among them.
    """

    layer: int
    origin: Tensor
    present: Tensor
    choice: TokenChoice


@dataclass
class Selection:
    """What a prefill chose."""

    length: int
    stages: list[Stage] = field(default_factory=list)
    neurons: dict[int, NeuronChoice] = field(default_factory=dict)

    def forget_neurons(self) -> None:
        """Let go of the choices of neurons; a cache that decodes with them has its own list."""
        self.neurons = {}
