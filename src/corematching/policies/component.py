"""The base of every policy object: a named, frozen, validated dataclass that is JSON and back."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABCMeta
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

from corematching import old_names
from corematching.errors import ConfigError, unknown_name
from corematching.policies import plugins

C = TypeVar("C", bound="Component")

REGISTRY: dict[str, dict[str, type[Component]]] = {}
"""Kind ("token score", "budget", ...) -> name -> class."""


class ComponentType(ABCMeta):
    """Accepts the parameter names of the previous version."""

    def __call__(cls, *args: Any, **params: Any) -> Any:
        known: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
        if known and not params.keys() <= known.keys() and hasattr(cls, "name"):
            kind, name = cls.kind, cls.name  # type: ignore[attr-defined]
            name_now, renamed = old_names.modernize(kind, name, params, known)
            if renamed is not params:
                renamed |= dict(zip(parameters_of(cls), args, strict=False))
                made = cls if name_now == name else find(kind, name_now)
                return super(ComponentType, made).__call__(**prepare(made, renamed))
        return super().__call__(*args, **params)


class Component(metaclass=ComponentType):
    """A policy object, registered by kind and name.

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
        """Build a component of this kind from the output of `to_dict`.

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
    """Register a class under its kind and name; each name may be taken once."""
    known = REGISTRY[cls.kind].get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ConfigError(f"{cls.kind} '{cls.name}' is taken by {known.__qualname__}: rename one")
    REGISTRY[cls.kind][cls.name] = cls


def names(kind: str) -> list[str]:
    """The registered names of a kind, those of other packages included, sorted."""
    plugins.load()
    return sorted(REGISTRY[kind])


def canonical(name: str) -> str:
    """``Core_Overlap`` -> ``core-overlap``."""
    return str(name).strip().lower().replace("_", "-")


def find(kind: str, name: str) -> type[Component]:
    """The class registered under a kind and a name; other packages are asked last.

    Raises
    ------
    ConfigError
        When there is none; the message names the nearest one, and packages that could not be asked.
    """
    known = REGISTRY[kind]
    if canonical(name) not in known:
        failures = plugins.load()
        if canonical(name) not in known:
            error = unknown_name(kind, name, known)
            raise ConfigError("; ".join([str(error), *failures])) if failures else error
    return known[canonical(name)]


def build(kind: str, name: str, **params: Any) -> Component:
    """Make a component from its kind, its name and its parameters, nested ones as mappings."""
    cls = find(kind, name)
    known = parameters_of(cls)
    if not params.keys() <= known.keys():
        name_now, params = old_names.modernize(kind, cls.name, params, known)
        cls = cls if name_now == cls.name else find(kind, name_now)
    return cls(**prepare(cls, params))


def prepare(cls: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments from JSON values: nested components built, lists made tuples.

    Raises
    ------
    ConfigError
        When ``cls`` has no parameter of that name.
    """
    known = parameters_of(cls)
    arguments = {}
    for key, value in params.items():
        if key not in known:
            raise unknown_name(f"parameter of '{getattr(cls, 'name', cls.__name__)}'", key, known)
        arguments[key] = read_nested(known[key], value)
    return arguments


def parameters_of(cls: Any) -> dict[str, str | None]:
    """The constructor's parameters, in order, with the kind of component of each."""
    described = cls.__dataclass_fields__
    names = list(inspect.signature(cls.__init__).parameters)[1:]
    return {
        name: described[name].metadata.get("kind") if name in described else None for name in names
    }


def read_nested(kind: str | None, value: Any) -> Any:
    """A component of that kind from its name or its mapping; lists made tuples."""
    if isinstance(value, list | tuple):
        return tuple(read_nested(kind, item) for item in value)
    if kind and isinstance(value, str):
        return build(kind, value)
    if kind and isinstance(value, Mapping):
        nested = dict(value)
        return build(kind, nested.pop("name", ""), **nested)
    return value


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
