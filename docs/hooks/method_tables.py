"""Tables of what is registered: methods, scores, budgets, rules; and of the families."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING
from typing import Any

from tables import cell, table

DEPTH, WIDTH = 32, 11008
"""Layers and neurons of the model that the tables are worked out for: LLaVA-1.5-7B's."""
PAPER = re.compile(r"arXiv:(\d{4}\.\d{5})")


def write_methods() -> str:
    """One row per method that needs no further parameter."""
    from corematching.methods import BaseMethod, method_names
    from corematching.policies.component import find

    classes = [find(BaseMethod.kind, name) for name in method_names() if name != "sparsifier"]
    rows = [method_row(cls) for cls in sorted(classes, key=order_of)]
    head = ("method", "", "image tokens go after layer", "neurons per token", "reads", "source")
    return table(head, rows)


def order_of(cls: Any) -> tuple[int, int]:
    """Ours and the paper's first, then what drops tokens, then what thins out neurons."""
    method = cls()
    first = {"corematching": 0, "paper": 1, "released-code": 2, "dense": 3}
    kind = 0 if cls.name in first else 1 if method.tokens else 2
    control = not PAPER.search(inspect.getdoc(cls) or "")
    return kind, first.get(cls.name, int(control))


def method_row(cls: Any) -> tuple[str, ...]:
    """What a method is by default, in a model of `DEPTH` layers."""
    method = cls()
    tokens, neurons = method.tokens, method.neurons
    layers = ", ".join(map(str, tokens.drop_after(DEPTH))) if tokens else "all are kept"
    needs = {*getattr(tokens, "needs", ()), *getattr(neurons, "needs", ())}
    source = PAPER.search(inspect.getdoc(cls) or "")
    link = f"[{source[1]}](https://arxiv.org/abs/{source[1]})" if source else ""
    return (
        f"`{cls.name}`<br>`{cls.__name__}`",
        summarize(cls),
        layers.replace("-1", "in front of 0"),
        neurons_of(neurons),
        ", ".join(sorted(needs)) or "nothing",
        link,
    )


def neurons_of(rule: Any) -> str:
    """The ratio of the neurons that a decoded token computes."""
    if rule is None:
        return "all"
    counts = rule.counts(DEPTH, WIDTH)
    ratio = sum(counts) / (DEPTH * WIDTH) * getattr(rule, "decode_share", 1.0)
    return f"{100 * ratio:.0f} %"


def write_parameters(path: str) -> str:
    """A class's parameters: name, default, help."""
    rows = []
    cls = find_class(path)
    for name, field in cls.__dataclass_fields__.items():
        if not field.init or "help" not in field.metadata:
            continue
        default = "required" if field.default is MISSING else f"`{show(field.default)}`"
        rows.append((f"`{name}`", cell(field.metadata["help"]), default))
    return table(("parameter", "", "default"), rows) if rows else "It has no parameters."


def write_names(kind: str) -> str:
    """What is registered under a kind: name, class, what it is, parameters."""
    from corematching.policies.component import find, names

    rows = []
    for name in names(kind):
        cls: Any = find(kind, name)
        fields = cls.__dataclass_fields__
        params = ", ".join(f"`{key}`" for key in fields if fields[key].init)
        rows.append((f"`{name}`<br>`{cls.__name__}`", summarize(cls), params))
    return table(("name", "", "parameters"), rows)


def write_families() -> str:
    """One row per tested family."""
    from corematching.runtime import FAMILIES

    marks = {True: "yes", False: "-"}
    rows = [
        (f.name, f"`{f.model_type}`", marks[f.tokens], marks[f.neurons], cell(f.notes))
        for f in FAMILIES
    ]
    return table(("family", "`model_type`", "core tokens", "core neurons", ""), rows)


def find_class(path: str) -> Any:
    """A class by its full name."""
    import importlib

    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def summarize(cls: Any) -> str:
    """A docstring's first paragraph."""
    return cell((inspect.getdoc(cls) or "").split("\n\n")[0])


def show(value: Any) -> str:
    """A default, floats that are thirty-seconds as such."""
    if isinstance(value, float) and value not in (0.0, 0.5) and (32 * value).is_integer():
        return f"{32 * value:.0f}/32"
    return str(value) if not isinstance(value, str) else repr(value)
