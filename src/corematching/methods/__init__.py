"""Methods: policies composed, ready to be put on a model. A new method is one file beside these."""

from typing import Any

from corematching.methods.corematching import CoreMatching
from corematching.methods.registry import (
    METHODS,
    add_parameters,
    method_by_name,
    method_from_text,
    method_names,
    register_method,
    text_at_budget,
)
from corematching.methods.sparsifier import Installable, NeuronRule, Sparsifier, TokenRule
from corematching.policy.component import import_all

BUDGETS = ("keep", "beta")

register_method("corematching", budgets=BUDGETS)(CoreMatching)
register_method("paper", CoreMatching.paper().parameters(), BUDGETS)(CoreMatching.paper)
import_all(__name__, __path__)


def method_from_dict(values: dict[str, Any]) -> Installable:
    """Any method back from what its ``to_dict`` gave."""
    return Installable.from_dict(values)


__all__ = [
    "METHODS",
    "CoreMatching",
    "Installable",
    "NeuronRule",
    "Sparsifier",
    "TokenRule",
    "add_parameters",
    "method_by_name",
    "method_from_dict",
    "method_from_text",
    "method_names",
    "register_method",
    "text_at_budget",
]
