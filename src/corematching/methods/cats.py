"""CATS."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corematching.methods.firing_rule import FiringRule, find_gate_cut
from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier
from corematching.protocol import ACTIVATIONS, GATE, PrefillView


@dataclass(frozen=True)
class CatsRule(FiringRule, name="cats-rule"):
    """Up and down are computed for neurons whose gate is not small."""

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the choice reads."""
        return frozenset({ACTIVATIONS, GATE})

    @property
    def decode_share(self) -> float:
        """The whole gate, and up and down where it passes."""
        return (1 + 2 * self.beta) / 3

    def thresholds(self, view: PrefillView) -> dict[str, Tensor]:
        """One for the gate."""
        return {"gate_threshold": find_gate_cut(view, self.over, self.beta)}


@register_method("cats", budgets=("beta",))
def cats(beta: float = 0.5, over: str = "text") -> Sparsifier:
    """Per decoded token, compute the gate, and up and down where it is large; all tokens.

    "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models", arXiv:2404.08763:
    a neuron counts if ``|act(gate(x))|`` reaches t, a quantile of it. The paper takes the quantile
    from a text corpus. We are free of training data, so each layer's is that of the prompt
    itself, seen in the prefill. No fine-tuning follows.

    Parameters
    ----------
    beta : float
        Share of the neurons that stay, 1 - the paper's sparsity.
    over : str
        Prompt tokens that the quantile is of: ``text``, which decoded tokens resemble, or
        ``all``, ``question``, ``image``.
    """
    return Sparsifier(neurons=CatsRule(beta, over))
