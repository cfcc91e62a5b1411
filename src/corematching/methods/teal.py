"""TEAL."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.methods.base import BaseMethod
from corematching.methods.threshold_rule import ThresholdRule
from corematching.protocol import ACTIVATIONS, INPUTS, PrefillView


@dataclass(frozen=True)
class TealRule(ThresholdRule, name="teal-rule"):
    """Small entries of what enters the FFN, and of what enters ``down_proj``, count 0."""

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the choice reads."""
        return frozenset({ACTIVATIONS, INPUTS})

    def thresholds(self, view: PrefillView) -> dict[str, Tensor]:
        """One for what enters gate and up, one for what enters down."""
        return {
            "input_threshold": self.calibrate(view, view.inputs, INPUTS),
            "output_threshold": self.calibrate(view, view.activations, ACTIVATIONS),
        }


@dataclass(frozen=True)
class TEAL(BaseMethod, name="teal"):
    """Per decoded token, leave out the small entries of what enters the FFN's layers; all tokens.

    "Training-Free Activation Sparsity in Large Language Models", arXiv:2408.14690:
    ``x <- x * 1[|x| > t]`` in front of a linear layer, with t a quantile of ``|x|``. Here in front
    of gate and up (they share one input) and of down, with one ratio for every layer, the
    paper's uniform variant; the attention's projections stay dense. The paper takes the
    quantiles from a text corpus. We are free of training data, so each layer's are those of the
    prompt itself, seen in the prefill.
    """

    active_ratio: float = field(
        default=0.5, metadata={"help": "ratio of the entries that stay, 1 - the paper's sparsity"}
    )
    token_set: str = field(
        default="text",
        metadata={
            "help": "prompt tokens that the quantiles are of: text (which decoded tokens resemble) "
            "| all | kept | question | image"
        },
    )

    def make_neurons(self) -> TealRule:
        return TealRule(self.active_ratio, self.token_set)
