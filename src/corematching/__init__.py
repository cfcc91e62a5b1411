"""Vision-language models that answer from their core tokens and core neurons only.

>>> with CoreMatching()(model) as run:  # doctest: +SKIP
...     out = model.generate(**inputs)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corematching.demo import load_demo
    from corematching.methods import (
        CoreMatching,
        NeuronRule,
        Sparsifier,
        TokenRule,
        method_by_name,
        method_from_dict,
        method_names,
    )
    from corematching.policy import (
        Attention,
        CoreInfer,
        CoreOverlap,
        Count,
        DenseEnds,
        Griffin,
        Knee,
        Magnitude,
        Norm,
        OutputWeighted,
        Paper,
        PerLayer,
        Projection,
        RandomNeurons,
        RandomTokens,
        Ratio,
        TextOverlap,
        TokenOverlap,
        Uniform,
        neuron_score_by_name,
        score_by_name,
    )
    from corematching.runtime import load

__version__ = "0.1.0"

_OTHERS = {"load": "runtime", "load_demo": "demo"}
_METHODS = frozenset(
    {
        "CoreMatching",
        "NeuronRule",
        "Sparsifier",
        "TokenRule",
        "method_by_name",
        "method_from_dict",
        "method_names",
    }
)


def __getattr__(name: str) -> Any:
    """Import on first use, so that `corematching --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'corematching' has no attribute '{name}'")
    part = _OTHERS.get(name, "methods" if name in _METHODS else "policy")
    return getattr(importlib.import_module(f"corematching.{part}"), name)


__all__ = [
    "Attention",
    "CoreInfer",
    "CoreMatching",
    "CoreOverlap",
    "Count",
    "DenseEnds",
    "Griffin",
    "Knee",
    "Magnitude",
    "NeuronRule",
    "Norm",
    "OutputWeighted",
    "Paper",
    "PerLayer",
    "Projection",
    "RandomNeurons",
    "RandomTokens",
    "Ratio",
    "Sparsifier",
    "TextOverlap",
    "TokenOverlap",
    "TokenRule",
    "Uniform",
    "__version__",
    "load",
    "load_demo",
    "method_by_name",
    "method_from_dict",
    "method_names",
    "neuron_score_by_name",
    "score_by_name",
]
