"""The base of every policy object: a named, frozen, validated dataclass that is JSON and back."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

from corematching.errors import ConfigError, unknown_name

C = TypeVar("C", bound="Component")

REGISTRY: dict[str, dict[str, type[Component]]] = {}
"""Kind ("token score", "budget", ...) -> name -> class."""


class Component:
    """A policy object that is found by kind and name.

    A base class states its kind, ``class TokenScore(Component, kind="token score")``; a concrete
    class states its name, ``class Norm(TokenScore, name="norm")``, and is then registered. Fields
    that hold another component carry its kind in their metadata.
    """

    kind: ClassVar[str]
    name: ClassVar[str]

    def __init_subclass__(cls, kind: str = "", name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind:
            cls.kind = kind
            REGISTRY.setdefault(kind, {})
        if name:
            cls.name = name
            register(cls)

    def parameters(self) -> dict[str, Any]:
        """The parameters by name, as they were given."""
        return {f.name: getattr(self, f.name) for f in _fields(type(self))}

    def to_dict(self) -> dict[str, Any]:
        """The name and the parameters, JSON-able."""
        return {"name": self.name, **{k: _plain(v) for k, v in self.parameters().items()}}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build a component of this kind from what `to_dict` gave.

        Raises
        ------
        ConfigError
            When the name or a parameter is unknown, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.kind}: expected a mapping with 'name', got {values!r}")
        params = dict(values)
        name = params.pop("name", getattr(cls, "name", None))
        if name is None:
            raise ConfigError(f"{cls.kind}: give its 'name', one of {', '.join(names(cls.kind))}")
        built = build(cls.kind, name, **params)
        if not isinstance(built, cls):
            raise ConfigError(f"'{name}' is a {type(built).__name__}, not a {cls.__name__}")
        return built


def register(cls: type[Component]) -> None:
    """Enter a class under its kind and name; another class of the same name is refused."""
    known = REGISTRY[cls.kind].get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ConfigError(f"{cls.kind} '{cls.name}' is taken by {known.__qualname__}: rename one")
    REGISTRY[cls.kind][cls.name] = cls


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(REGISTRY[kind])


def canonical(name: str) -> str:
    """``Core_Overlap`` -> ``core-overlap``."""
    return str(name).strip().lower().replace("_", "-")


def find(kind: str, name: str) -> type[Component]:
    """The class registered under a kind and a name.

    Raises
    ------
    ConfigError
        When there is none; the message names the nearest one.
    """
    known = REGISTRY[kind]
    if canonical(name) not in known:
        raise unknown_name(kind, name, known)
    return known[canonical(name)]


def build(kind: str, name: str, **params: Any) -> Component:
    """Make a component from its kind, its name and its parameters, nested ones as mappings."""
    cls = find(kind, name)
    return cls(**prepare(cls, params))


def prepare(cls: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments from JSON values: nested components built, lists made tuples.

    Raises
    ------
    ConfigError
        When ``cls`` has no parameter of that name.
    """
    metadata = {f.name: f.metadata for f in _fields(cls)}
    arguments = {}
    for key, value in params.items():
        if key not in metadata:
            raise unknown_name(
                f"parameter of '{getattr(cls, 'name', cls.__name__)}'", key, metadata
            )
        kind = metadata[key].get("kind")
        if kind and isinstance(value, Mapping):
            nested = dict(value)
            value = build(kind, nested.pop("name", ""), **nested)
        elif isinstance(value, list):
            value = tuple(value)
        arguments[key] = value
    return arguments


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that a new file is enough to register a class."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _fields(cls: Any) -> tuple[Any, ...]:
    return tuple(f for f in fields(cls) if f.init)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value
