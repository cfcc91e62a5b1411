"""The two ways to choose core tokens and core neurons that an analysis sets side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from corematching.errors import ConfigError
from corematching.methods import BaseMethod, CoreMatching, TopNeurons
from corematching.policies import Budget, NeuronScore, TokenScore


@dataclass(frozen=True)
class Rule:
    """A method's rankings of image tokens and neurons, for any layer.

    Attributes
    ----------
    name : str
        Key in results.
    title : str
        For headings.
    token_score : TokenScore
    budget : Budget
        How many image tokens are kept.
    neuron_score : NeuronScore
        Over all tokens that it is shown.
    neuron_ratio : float
        Ratio of the neurons that are core.
    method : BaseMethod
        The method with these policies.
    """

    name: str
    title: str
    token_score: TokenScore
    budget: Budget
    neuron_score: NeuronScore
    neuron_ratio: float
    method: BaseMethod

    @classmethod
    def of(cls, name: str, title: str, method: BaseMethod) -> Rule:
        """The rule of a method.

        Raises
        ------
        ConfigError
            The method keeps all tokens or all neurons.
        """
        tokens: Any = method.tokens
        neurons: Any = method.neurons
        if not hasattr(tokens, "score") or not hasattr(neurons, "score"):
            raise ConfigError(
                "analyze a method that ranks both tokens and neurons, such as "
                "CoreMatching(neurons=TopNeurons())"
            )
        score, ratio = neurons.score, getattr(neurons, "ratio", None)
        if "token_set" in score.parameters():
            score = replace(score, token_set="all")
        ratio = neurons.schedule.ratio if ratio is None else ratio
        return cls(name, title, tokens.score, tokens.budget, score, ratio, method)

    def to_dict(self) -> dict[str, Any]:
        """The method, JSON-able."""
        return {"name": self.name, "title": self.title, "method": self.method.to_dict()}


def default_rules() -> tuple[Rule, ...]:
    """The published rule and our default's scores.

    Our default also keeps tokens spread evenly, and neurons token by token, without a score. Here
    the scores choose all of the kept image tokens, and 60 % of the neurons.
    """
    return (
        Rule.of("paper", "Paper", CoreMatching.paper()),
        Rule.of("ours", "Our scores", CoreMatching(cover=0.0, neurons=TopNeurons(0.6))),
    )
