"""The method options of the command, turned into a method."""

from __future__ import annotations

from typing import Any

from corematching.errors import ConfigError
from corematching.methods.base import BaseMethod
from corematching.methods.text import add_parameters, method_from_text, read_method, read_value
from corematching.policies.component import find, parameters_of

OPTIONS = (
    "--score",
    "--keep-ratio",
    "--keep-tokens",
    "--layer",
    "--neurons",
    "--neuron-ratio",
    "--active-ratio",
)
"""Options named like their parameters."""
OLD_OPTIONS = {
    "--tokens": ("token_score", "score"),
    "--keep": ("keep", "keep_ratio"),
    "--after": ("layer", "layer"),
    "--neuron-score": ("neuron_score", "neurons"),
}
"""Options of version 0.1, with their old and new parameters."""


def build_method(text: str, options: dict[str, Any]) -> BaseMethod:
    """Make the method that the options describe.

    Parameters
    ----------
    text : str
        ``NAME``, ``NAME:param=value,...``, JSON, or ``@file.json``.
    options : dict
        Of `OPTIONS` and `OLD_OPTIONS`, by option; None where the option was not given.

    Raises
    ------
    ConfigError
        A name is unknown (the message has the nearest one), a value is out of range, the method has
        no such option, or the text states the parameter already.
    """
    given = {option: value for option, value in options.items() if value is not None}
    if not given:
        return method_from_text(text)
    name, stated = read_method(text)
    check_options(name, given)
    params: dict[str, Any] = {}
    for option, value in given.items():
        for key, item in read_option(option, value, name).items():
            if key in params:
                raise ConfigError(f"{option} sets {key}, which another option sets: leave one out")
            params[key] = item
    if params.get("firing", 0) is None and "firing" in stated:
        del params["firing"]
    return method_from_text(add_parameters(text, params))


def build_text_method(text: str, options: dict[str, Any]) -> BaseMethod:
    """As `build_method`, without a token score unless one is named."""
    method = build_method(text, options)
    name, stated = read_method(text)
    asked = options.get("--score") or options.get("--tokens")
    asked = asked or not stated.keys().isdisjoint(("score", "token_score"))
    if asked or not takes(name, "score"):
        return method
    about_tokens = ("keep_ratio", "keep_tokens", "layer", "budget", "cover", "taper")
    values = method.to_dict()
    values |= {key: None for key in (*about_tokens, "proportional", "score") if key in values}
    return BaseMethod.from_dict(values | ({"memory": method.memory} if method.memory else {}))


def takes(name: str, parameter: str) -> bool:
    """Whether a method has this parameter."""
    return parameter in parameters_of(find(BaseMethod.kind, name))


def check_options(name: str, given: dict[str, Any]) -> None:
    """Check that the method has a parameter for each option."""
    fitting = [option for option in OPTIONS if takes(name, option[2:].replace("-", "_"))]
    for option, value in given.items():
        now = OLD_OPTIONS[option][1] if option in OLD_OPTIONS else option[2:].replace("-", "_")
        if option == "--neurons" and is_number(value):
            fits = any(takes(name, key) for key in ("neurons", "neuron_ratio", "active_ratio"))
        else:
            fits = takes(name, now)
        if not fits:
            hint = f"its options are {', '.join(fitting)}" if fitting else "leave it out"
            raise ConfigError(f"method '{name}' has no option {option}: {hint}")


def read_option(option: str, value: Any, name: str) -> dict[str, Any]:
    """The parameters that an option sets."""
    if option == "--neurons" and is_number(value):  # of version 0.1
        ratio = read_ratio(option, value)
        return {"beta": ratio, "firing": None} if takes(name, "neurons") else {"beta": ratio}
    if option == "--keep":
        knee = str(value).strip().lower() == "knee"
        return {"keep": None if knee else read_ratio(option, value)}
    if option in OLD_OPTIONS:
        return {OLD_OPTIONS[option][0]: read_value(str(value))}
    if option.endswith("-ratio"):
        value = read_ratio(option, value)
    return {option[2:].replace("-", "_"): read_value(value) if isinstance(value, str) else value}


def is_number(value: Any) -> bool:
    """Whether an option's text is a number."""
    return isinstance(read_value(str(value)), int | float)


def read_ratio(option: str, value: Any) -> float:
    """A ratio in (0, 1]."""
    try:
        ratio = float(value)
    except ValueError as error:
        raise ConfigError(f"{option} '{value}' is no number: give a ratio such as 0.3") from error
    if not 0 < ratio <= 1:
        instead = " (a number of tokens: --keep-tokens)" if option.startswith("--keep") else ""
        raise ConfigError(f"{option} {value} is outside (0, 1]: give a ratio such as 0.3{instead}")
    return ratio
