"""Methods: composed policies, ready to install on a model. A new method is one file here."""

from __future__ import annotations

from typing import Any, cast

from corematching.methods.base import BaseMethod
from corematching.methods.baselines import Dense, Random, ReleasedCode
from corematching.methods.cats import CATS
from corematching.methods.cdpruner import CDPruner
from corematching.methods.coreinfer import CoreInfer
from corematching.methods.corematching import CoreMatching
from corematching.methods.divprune import DivPrune
from corematching.methods.fastv import FastV
from corematching.methods.gate_threshold import GateThreshold
from corematching.methods.griffin import Griffin
from corematching.methods.paper import Paper
from corematching.methods.projection import Projection
from corematching.methods.prumerge import PruMerge
from corematching.methods.pyramiddrop import PyramidDrop
from corematching.methods.sparsevlm import SparseVLM
from corematching.methods.sparsifier import NeuronRule, Sparsifier, TokenRule
from corematching.methods.staged import StagedRule
from corematching.methods.stride import Stride
from corematching.methods.teal import TEAL
from corematching.methods.text import add_parameters, method_from_text, text_at_budget
from corematching.methods.top_neurons import TopNeurons
from corematching.methods.visionzip import VisionZip
from corematching.policies.component import build, names


def method_names() -> list[str]:
    """The names of the methods, those of other packages included, sorted."""
    return names(BaseMethod.kind)


def method_by_name(name: str, **params: Any) -> BaseMethod:
    """Make a method.

    Parameters
    ----------
    name : str
        One of `method_names`.
    **params
        The method's parameters; nested rules and scores as objects, names or mappings.

    Raises
    ------
    ConfigError
        When the method or a parameter is unknown (the message names the nearest one), or a value is
        out of range.
    """
    return cast(BaseMethod, build(BaseMethod.kind, name, **params))


def method_from_dict(values: dict[str, Any]) -> BaseMethod:
    """Rebuild a method from the output of its ``to_dict``.

    Parameters
    ----------
    values : dict
        The method's ``name`` and its parameters.

    Raises
    ------
    ConfigError
        The method or a parameter is unknown, or a value is out of range.
    """
    return BaseMethod.from_dict(values)


__all__ = [
    "CATS",
    "TEAL",
    "BaseMethod",
    "CDPruner",
    "CoreInfer",
    "CoreMatching",
    "Dense",
    "DivPrune",
    "FastV",
    "GateThreshold",
    "Griffin",
    "NeuronRule",
    "Paper",
    "Projection",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "ReleasedCode",
    "SparseVLM",
    "Sparsifier",
    "StagedRule",
    "Stride",
    "TokenRule",
    "TopNeurons",
    "VisionZip",
    "add_parameters",
    "method_by_name",
    "method_from_dict",
    "method_from_text",
    "method_names",
    "text_at_budget",
]
