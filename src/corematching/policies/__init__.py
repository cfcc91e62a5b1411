"""What to keep: tensors in, tensors out, no model in sight."""

import warnings
from typing import Any, cast

from corematching.policies.base import NeuronScore, TokenScore
from corematching.policies.budgets import Budget, Count, Knee, Ratio
from corematching.policies.component import Component, build, names
from corematching.policies.neuron_scores import (
    CoreInferScore,
    GriffinScore,
    Magnitude,
    OutputWeighted,
    PaperScore,
    RandomNeurons,
)
from corematching.policies.schedules import DenseEnds, PerLayer, Schedule, Uniform
from corematching.policies.token_scores import (
    Attention,
    CoreOverlap,
    Norm,
    ProjectionScore,
    RandomTokens,
    TextOverlap,
    TokenOverlap,
)


def score_by_name(name: str, **params: Any) -> TokenScore:
    """A token score by its name.

    Parameters
    ----------
    name : str
        The score's name.
    **params
        Its parameters.

    Raises
    ------
    ConfigError
        There is no such score (the message names the nearest one) or no such parameter, or a value
        is out of range.
    """
    return cast(TokenScore, build(TokenScore.kind, name, **params))


def neuron_score_by_name(name: str, **params: Any) -> NeuronScore:
    """A neuron score by its name.

    Parameters
    ----------
    name : str
        The score's name.
    **params
        Its parameters.

    Raises
    ------
    ConfigError
        There is no such score (the message names the nearest one) or no such parameter, or a value
        is out of range.
    """
    return cast(NeuronScore, build(NeuronScore.kind, name, **params))


OLD_CLASSES = {
    "CoreInfer": CoreInferScore,
    "Griffin": GriffinScore,
    "Paper": PaperScore,
    "Projection": ProjectionScore,
}
"""Scores under the names of version 0.1, which are methods now; read for one version more."""


def __getattr__(name: str) -> Any:
    if name not in OLD_CLASSES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    new = OLD_CLASSES[name]
    warnings.warn(
        f"the score {name} is {new.__name__} now: corematching.{name} is the method",
        DeprecationWarning,
        stacklevel=2,
    )
    return new


__all__ = [
    "Attention",
    "Budget",
    "Component",
    "CoreInferScore",
    "CoreOverlap",
    "Count",
    "DenseEnds",
    "GriffinScore",
    "Knee",
    "Magnitude",
    "NeuronScore",
    "Norm",
    "OutputWeighted",
    "PaperScore",
    "PerLayer",
    "ProjectionScore",
    "RandomNeurons",
    "RandomTokens",
    "Ratio",
    "Schedule",
    "TextOverlap",
    "TokenOverlap",
    "TokenScore",
    "Uniform",
    "names",
    "neuron_score_by_name",
    "score_by_name",
]
