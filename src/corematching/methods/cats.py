"""CATS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from corematching.methods.base import BaseMethod
from corematching.methods.threshold_rule import ThresholdRule, find_gate_cut
from corematching.protocol import ACTIVATIONS, GATE, PrefillView


@dataclass(frozen=True)
class CatsRule(ThresholdRule, name="cats-rule"):
    """Up and down are computed for neurons whose gate is not small."""

    gate_thresholds: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the choice reads."""
        return frozenset({ACTIVATIONS, GATE})

    @property
    def decode_ratio(self) -> float:
        """The whole gate, and up and down where it passes."""
        return (1 + 2 * self.active_ratio) / 3

    def thresholds(self, view: PrefillView) -> dict[str, Tensor]:
        """One for the gate."""
        return {"gate_threshold": find_gate_cut(view, self.token_set, self.active_ratio)}


@dataclass(frozen=True)
class CATS(BaseMethod, name="cats"):
    """Per decoded token, compute the gate, and up and down where it is large; all tokens.

    "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models", arXiv:2404.08763:
    a neuron counts if ``|act(gate(x))|`` reaches t, a quantile of it. The paper takes the quantile
    from a text corpus. We are free of training data, so each layer's is that of the prompt
    itself, seen in the prefill. No fine-tuning follows.
    """

    active_ratio: float = field(
        default=0.5, metadata={"help": "ratio of the neurons that stay, 1 - the paper's sparsity"}
    )
    token_set: str = field(
        default="text",
        metadata={
            "help": "prompt tokens that the quantiles are of: text (which decoded tokens resemble) "
            "| all | kept | question | image"
        },
    )

    def make_neurons(self) -> CatsRule:
        return CatsRule(self.active_ratio, self.token_set)
