"""What `import corematching` offers, by name; a change of this list is a change of the API."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import corematching
from corematching import protocol

METHODS = """
    CATS CDPruner CoreInfer CoreMatching Dense DivPrune FastV Griffin Paper Projection PruMerge
    PyramidDrop Random ReleasedCode SparseVLM Sparsifier Stride TEAL VisionZip
    method_by_name method_from_dict method_from_text method_names
"""
RULES = "GateThreshold NeuronRule StagedRule TokenRule TopNeurons"
SCORES = """
    Attention CoreOverlap Norm ProjectionScore RandomTokens TextOverlap TokenOverlap score_by_name
    CoreInferScore GriffinScore Magnitude OutputWeighted PaperScore RandomNeurons
    neuron_score_by_name
"""
AMOUNTS = "Count Knee Ratio DenseEnds PerLayer Uniform"
TO_SUBCLASS = """
    BaseMethod Budget NeuronPolicy NeuronScore Schedule TokenPolicy TokenScore
    NeuronChoice PrefillView TokenChoice
"""
RESULTS = "Choices Report Run SampleReport"
ERRORS = """
    AlreadyInstalledError BusyMachineError ConfigError CoreMatchingError EngineClosedError
    InputError InvalidTensorError MemoryCapError MissingPackageError QueueFullError
    UnsupportedModelError
"""
LOADING = "__version__ load load_demo"
GROUPS = (METHODS, RULES, SCORES, AMOUNTS, TO_SUBCLASS, RESULTS, ERRORS, LOADING)
NAMES = sorted(" ".join(GROUPS).split())
DOCUMENTED = [name for name in NAMES if name != "__version__"]


def test_the_public_names():
    assert sorted(corematching.__all__) == NAMES
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there(name):
    assert getattr(corematching, name) is not None


def test_checkers_of_types_see_the_same_names():
    tree = ast.parse(Path(corematching.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    offered = {f"corematching.{m}.{n}" for m, names in corematching._EXPORTS.items() for n in names}
    assert imported == offered


def test_errors_are_all_exported():
    kinds = {corematching.CoreMatchingError}
    while more := {sub for kind in kinds for sub in kind.__subclasses__()} - kinds:
        kinds |= more
    own = {kind.__name__ for kind in kinds if kind.__module__ == "corematching.errors"}
    assert own == set(ERRORS.split())


def members_of(cls):
    """The public methods and properties that a class defines itself, and ``__call__``."""
    for name, value in vars(cls).items():
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(value, classmethod | staticmethod):
            yield name, value.__func__
        elif isinstance(value, property):
            yield name, value.fget
        elif inspect.isfunction(value):
            yield name, value


def docs_of(cls, name):
    """The docstrings of a method in a class, in its bases, and in the protocols it is part of."""
    owners = [*cls.__mro__, protocol.TokenPolicy, protocol.NeuronPolicy]
    found = (inspect.getattr_static(owner, name, None) for owner in owners)
    return "\n".join(textwrap.dedent(f"    {value.__doc__ or ''}") for value in found if value)


def describes(doc, name):
    """Whether a NumPy docstring has an entry for a parameter, perhaps among others."""
    return re.search(rf"^ *(?:\*{{0,2}}\w+, )*\*{{0,2}}{name}(?:, \w+)*(?: :.*)?$", doc, re.M)


def parameters_of(function):
    names = [parameter.name for parameter in inspect.signature(function).parameters.values()]
    return [name for name in names if name not in ("self", "cls")]


def parameters_of_class(cls):
    """What a class is made with, but for fields that say themselves what they are."""
    if (
        "__init__" not in vars(cls)
        or issubclass(cls, Exception)
        or getattr(cls, "_is_protocol", False)
    ):
        return []
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    return [
        name
        for name in parameters_of(cls.__init__)
        if name not in fields or not fields[name].metadata.get("help")
    ]


def raises(function):
    """Whether a function's own code raises something that a caller may meet."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    thrown = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise))
    return any(
        error is not None and "NotImplementedError" not in ast.dump(error) for error in thrown
    )


@pytest.mark.parametrize("name", DOCUMENTED)
def test_each_name_is_documented(name):
    found = getattr(corematching, name)
    doc = inspect.getdoc(found) or ""
    assert re.match(r"[^\n]+[.:](\n\n|$)", doc), "a summary line, then an empty one"
    assert doc != inspect.getdoc(next(iter(getattr(found, "__bases__", [])), None))
    if not inspect.isclass(found):
        missing = [name for name in parameters_of(found) if not describes(doc, name)]
        assert not missing and (not raises(found) or "Raises\n------" in doc)
        return
    assert [name for name in parameters_of_class(found) if not describes(doc, name)] == []
    for member, function in members_of(found):
        text = docs_of(found, member)
        assert text.strip(), member
        missing = [name for name in parameters_of(function) if not describes(text, name)]
        assert not missing, (member, missing)
        assert not raises(function) or re.search(r"Raises\n *------", text), member
