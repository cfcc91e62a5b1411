"""Methods as text: ``NAME[:param=value,...]``, JSON, or ``@file.json``.

A value is a number, true, false or none, a word, a list ``[a,b]``, or a rule or score with its own
parameters, ``top(0.4,dense_first=2)``; the first ones may come without their names.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from corematching import old_names
from corematching.errors import ConfigError, InputError
from corematching.methods.base import NEURON_RATIOS, BaseMethod
from corematching.policies.component import build, find, parameters_of

Params = dict[str, Any]
UNNAMED = ""
"""The key of a rule's unnamed values until its class is known."""
CALL = re.compile(r"([\w.-]+)\((.*)\)", re.DOTALL)
WORD = re.compile(r"[\w.+-]+")
CONSTANTS = {"none": "null", "null": "null", "true": "true", "false": "false"}
CLOSING = {"(": ")", "[": "]", "{": "}"}
LONGEST_TEXT, DEEPEST_TEXT, LONGEST_NUMBER = 10_000, 20, 30


def method_from_text(text: str) -> BaseMethod:
    """Make a method from text such as ``corematching:keep_ratio=0.2,neurons=top(0.4)``.

    Parameters
    ----------
    text : str
        A name, then parameters; or the method as JSON, or ``@file.json``.

    Raises
    ------
    ConfigError
        A name is unknown (the message has the nearest one), a value is out of range, or the text
        cannot be read.
    InputError
        The file of ``@file.json`` cannot be read.
    """
    name, params = read_method(text)
    return cast(BaseMethod, build(BaseMethod.kind, name, **params))


def read_method(text: str) -> tuple[str, Params]:
    """The name and the parameters of a method's text; rules and scores as mappings."""
    text = text.strip()
    check_text(text)
    if text.startswith(("@", "{")):
        params = read_json(text)
        name = params.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f'method {text}: give its "name", such as "corematching"')
        return name, params
    name, _, rest = text.partition(":")
    params = read_parts(rest, text)
    cls = find(BaseMethod.kind, name)
    return cls.name, {
        key: name_values(parameters_of(cls).get(key), value, text) for key, value in params.items()
    }


def check_text(text: str) -> None:
    """Refuse a method's text that no one means: one that is huge, or nested without end.

    Raises
    ------
    ConfigError
        Saying what there is too much of.
    """
    depth, deepest = 0, 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    digits = max(map(len, re.findall(r"\d+", text)), default=0)
    for found, limit, what in (
        (len(text), LONGEST_TEXT, "characters"),
        (deepest, DEEPEST_TEXT, "brackets in one another"),
        (digits, LONGEST_NUMBER, "digits in one number"),
    ):
        if found > limit:
            raise ConfigError(f"a method's text has {found:,} {what}, {limit:,} are the most")


def read_json(text: str) -> Params:
    """The object of a JSON text or of ``@file.json``."""
    content = text
    if text.startswith("@"):
        try:
            content = Path(text[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"cannot read the method's file {text[1:]}: {error}") from error
        check_text(content)
    try:
        values = json.loads(content, object_pairs_hook=lambda pairs: unite(pairs, text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"method {text} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f'method {text}: give an object, such as {{"name": "corematching"}}')
    return values


def unite(pairs: Iterable[tuple[str, Any]], text: str) -> Params:
    """A dictionary of pairs; a name that comes twice is refused."""
    params: Params = {}
    for key, value in pairs:
        if key in params:
            raise ConfigError(f"'{key}' is given twice in method '{text}': leave one out")
        params[key] = value
    return params


def read_parts(rest: str, text: str, unnamed: bool = False) -> Params:
    """``param=value,...``; with ``unnamed`` the first values may come without a name."""
    values, pairs = [], []
    for part in split_parts(rest, text):
        key, equals, value = part.partition("=")
        if equals and WORD.fullmatch(key.strip()):
            pairs.append((key.strip(), read_value(value, text)))
        elif unnamed and not pairs:
            values.append(read_value(part, text))
        else:
            raise ConfigError(f"'{part}' in method '{text}': write it as param=value")
    params = unite(pairs, text)
    return {UNNAMED: values, **params} if values else params


def split_parts(text: str, whole: str) -> list[str]:
    """The parts between the commas that stand in no bracket."""
    parts, waiting, part = [], [], ""
    for sign in text:
        if sign in CLOSING:
            waiting.append(CLOSING[sign])
        elif sign in CLOSING.values() and (not waiting or waiting.pop() != sign):
            raise ConfigError(f"method '{whole}' has a '{sign}' too many")
        if sign == "," and not waiting:
            parts.append(part)
            part = ""
        else:
            part += sign
    if waiting:
        raise ConfigError(f"method '{whole}' lacks a '{waiting[-1]}'")
    return [part.strip() for part in (*parts, part) if part.strip()]


def read_value(text: str, whole: str = "") -> Any:
    """A number, true, false or none, a list, a rule with parameters, or the word itself."""
    text, whole = text.strip(), whole or text
    if text.startswith("[") and text.endswith("]"):
        return [read_value(part, whole) for part in split_parts(text[1:-1], whole)]
    call = CALL.fullmatch(text)
    if call:
        return {"name": call[1], **read_parts(call[2], whole, unnamed=True)}
    try:
        return json.loads(CONSTANTS.get(text.lower(), text))
    except json.JSONDecodeError:
        return text


def name_values(kind: str | None, value: Any, text: str) -> Any:
    """A described rule or score with names for the values that came without."""
    if isinstance(value, list):
        return [name_values(kind, item, text) for item in value]
    if not isinstance(value, Mapping):
        return value
    if kind is None:
        raise ConfigError(f"'{write_value(value)}' in method '{text}': give a plain value here")
    cls = find(kind, value["name"])
    known = parameters_of(cls)
    values = value.get(UNNAMED, [])
    if len(values) > len(known):
        raise ConfigError(
            f"'{write_value(value)}' in method '{text}': '{cls.name}' has {len(known)} parameters"
        )
    given = [item for item in value.items() if item[0] not in (UNNAMED, "name")]
    params = unite([*zip(known, values, strict=False), *given], text)
    named = {key: name_values(known.get(key), item, text) for key, item in params.items()}
    return {"name": cls.name, **named}


def write_method(name: str, params: Params, text: str = "") -> str:
    """The text of a method, as JSON where ``text`` is."""
    if text.strip().startswith(("@", "{")):
        return json.dumps({"name": name, **params})
    return f"{name}:{write_parts(params)}" if params else name


def write_parts(params: Params) -> str:
    """The text that `read_parts` reads as these parameters."""
    values = [write_value(value) for value in params.get(UNNAMED, [])]
    named = [f"{key}={write_value(item)}" for key, item in params.items() if key != UNNAMED]
    return ",".join((*values, *named))


def write_value(value: Any) -> str:
    """The text that `read_value` reads as this value."""
    if isinstance(value, Mapping):
        inner = write_parts({key: item for key, item in value.items() if key != "name"})
        return f"{value['name']}({inner})" if inner else str(value["name"])
    if isinstance(value, list | tuple):
        return f"[{','.join(write_value(item) for item in value)}]"
    if isinstance(value, str) and WORD.fullmatch(value) and read_value(value) == value:
        return value
    return "none" if value is None else json.dumps(value)


def text_at_budget(text: str, ratio: float) -> str:
    """The text of the same method at another budget: ``fastv`` to ``fastv:keep_ratio=0.1``.

    The ratio becomes the method's budget: that of the image tokens if the method drops some, else
    that of the neurons. One that the text states already stays, and the other is set.

    Raises
    ------
    ConfigError
        As `method_from_text`, and when the method has no budget that is still open.
    """
    method = method_from_text(text)
    name, params = read_present(text)
    made = type(method).at_budget(params, ratio)
    if made is not None:
        return write_method(name, made, text)
    stated = [key for key in ("keep_ratio", *NEURON_RATIOS, "neurons") if key in params]
    hint = "run it without --budget"
    if stated:
        hint = f"it states {' and '.join(stated)}, leave that out of the method"
    raise ConfigError(f"method '{text}' has no parameter that a budget could set: {hint}")


def add_parameters(text: str, given: Mapping[str, Any]) -> str:
    """The text of a method with further parameters.

    Raises
    ------
    ConfigError
        The text states one of them already.
    """
    name, params = read_method(text)
    return write_method(name, unite([*params.items(), *given.items()], text), text)


def write_present(text: str) -> str:
    """A method's text in the present names; one that cannot be read stays as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", old_names.OldNameWarning)
            name, params = read_present(text)
        return write_method(name, params, text)
    except ConfigError:
        return text


def read_present(text: str) -> tuple[str, Params]:
    """As `read_method`, with the present names of parameters."""
    name, params = read_method(text)
    known = parameters_of(find(BaseMethod.kind, name))
    return old_names.modernize(BaseMethod.kind, name, params, known)
