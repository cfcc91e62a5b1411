"""Methods by name, for the command line and for studies."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from corematching.errors import ConfigError, unknown_name
from corematching.methods.sparsifier import Installable

Factory = Callable[..., Installable]
F = TypeVar("F", bound=Factory)


@dataclass(frozen=True)
class Entry:
    """A registered method.

    Attributes
    ----------
    factory : callable
        What makes it.
    parameters : mapping
        Its parameters with their defaults.
    budgets : tuple of str
        The parameters that are shares to keep: of the image tokens first, then of the neurons.
    """

    factory: Factory
    parameters: Mapping[str, Any]
    budgets: tuple[str, ...] = ()


METHODS: dict[str, Entry] = {}
"""Name -> entry."""


def register_method(
    name: str, parameters: Mapping[str, Any] | None = None, budgets: Sequence[str] = ()
) -> Callable[[F], F]:
    """Register a class or a function that makes a method from keyword parameters.

    Parameters
    ----------
    name : str
        The method's name on the command line.
    parameters : mapping, optional
        Parameters and defaults where the factory's signature does not show them.
    budgets : sequence of str
        The parameters that are shares to keep, for `text_at_budget`: of the image tokens first,
        then of the neurons.

    Raises
    ------
    ConfigError
        When the name is taken by another function, or a budget is no parameter.
    """

    def enter(factory: F) -> F:
        known = METHODS.get(name)
        if known is not None and known.factory.__qualname__ != factory.__qualname__:
            raise ConfigError(f"method '{name}' is taken by {known.factory}: rename one")
        signature = inspect.signature(factory).parameters
        shown = parameters or {key: parameter.default for key, parameter in signature.items()}
        for budget in budgets:
            if budget not in shown:
                raise unknown_name(f"parameter of method '{name}'", budget, shown)
        METHODS[name] = Entry(factory, shown, tuple(budgets))
        return factory

    return enter


def method_names() -> list[str]:
    """The names of the registered methods, sorted."""
    return sorted(METHODS)


def method_by_name(name: str, **params: Any) -> Installable:
    """Make a method.

    Raises
    ------
    ConfigError
        When the method or a parameter is unknown (the message names the nearest one), or a value is
        out of range.
    """
    key = _find_name(name)
    entry = METHODS[key]
    for param in params:
        if param not in entry.parameters:
            raise unknown_name(f"parameter of method '{key}'", param, entry.parameters)
    return entry.factory(**params)


def method_from_text(text: str) -> Installable:
    """Make a method from ``NAME[:param=value,...]``, such as ``corematching:keep=0.2,beta=0.5``.

    A value is read as JSON (``0.2``, ``true``, ``null``, ``[2,6]``) and otherwise as a word.

    Raises
    ------
    ConfigError
        As `method_by_name`, and when a part is no ``param=value``.
    """
    name, params = _split_text(text)
    return method_by_name(name, **params)


def text_at_budget(text: str, share: float) -> str:
    """The text of the same method at another budget: ``fastv`` to ``fastv:keep=0.1``.

    The share becomes the method's budget: that of the image tokens if the method drops some, else
    that of the neurons. One that the text states already stays, and the other is set; see
    `add_parameters`.

    Raises
    ------
    ConfigError
        As `method_from_text`, and when the method has no budget that is still open.
    """
    method: Any = method_from_text(text)
    name, params = _split_text(text)
    entry = METHODS[_find_name(name)]
    open_ones = [budget for budget in entry.budgets if budget not in params]
    if method.tokens is None and len(entry.budgets) > 1:
        open_ones = [budget for budget in open_ones if budget != entry.budgets[0]]
    if not open_ones:
        stated = f" besides {' and '.join(entry.budgets)}, which it states" if entry.budgets else ""
        raise ConfigError(
            f"method '{text}' has no parameter that a budget could set{stated}: "
            + ("leave that out of the method" if stated else "run it without --budget")
        )
    return add_parameters(text, {open_ones[0]: share})


def add_parameters(text: str, given: Mapping[str, Any]) -> str:
    """The text of a method with further parameters.

    Neurons at a given share, ``beta``, are all computed: ``firing`` is none unless it is stated.
    """
    name, params = _split_text(text)
    known = METHODS[_find_name(name)].parameters
    twice = [key for key in given if key in params]
    if twice:
        raise ConfigError(f"'{twice[0]}' is given twice for method '{text}': leave one out")
    added = dict(given)
    if "beta" in added and "firing" in known and "firing" not in params:
        added.setdefault("firing", None)
    parts = (f"{key}={write_value(value)}" for key, value in added.items())
    return f"{text}{',' if params else ':'}{','.join(parts)}"


def _find_name(name: str) -> str:
    key = name.strip().lower().replace("_", "-")
    if key not in METHODS:
        raise unknown_name("method", name, METHODS)
    return key


def _split_text(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the parameters out of ``NAME[:param=value,...]``."""
    name, _, rest = text.partition(":")
    params: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^\[]*\])", rest)):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"'{part}' in method '{text}': write it as param=value")
        if key.strip() in params:
            raise ConfigError(f"'{key.strip()}' is given twice in method '{text}': leave one out")
        params[key.strip()] = read_value(value.strip())
    return name, params


def write_value(value: Any) -> str:
    """What `read_value` reads as this value."""
    return "none" if value is None else json.dumps(value)


def read_value(text: str) -> Any:
    """A number, true, false or null as JSON means it; anything else is the word itself."""
    lowered = text.lower()
    try:
        return json.loads({"none": "null"}.get(lowered, lowered))
    except json.JSONDecodeError:
        return text
