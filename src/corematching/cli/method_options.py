"""The method options of the command, turned into a method."""

from __future__ import annotations

import re
from typing import Any

from corematching.errors import ConfigError
from corematching.methods import METHODS, add_parameters, method_by_name, method_from_text
from corematching.policy.component import canonical

LONGEST_TEXT, DEEPEST_TEXT, LONGEST_NUMBER = 10_000, 20, 30
PARAMETERS = {
    "--tokens": "token_score",
    "--keep": "keep",
    "--after": "layer",
    "--neurons": "beta",
    "--neuron-score": "neuron_score",
}


def build_method(text: str, options: dict[str, Any]) -> Any:
    """Make the method that the options describe.

    Parameters
    ----------
    text : str
        ``NAME`` or ``NAME:param=value,...``.
    options : dict
        Of `PARAMETERS`, by option; None where the option was not given.

    Raises
    ------
    ConfigError
        A name is unknown (the message has the nearest one), a value is out of range, the method has
        no such option, or the text states what an option does.
    """
    check_text(text)
    values = {
        option: read_option(option, value) for option, value in options.items() if value is not None
    }
    if not values:
        return method_from_text(text)
    name = text.partition(":")[0]
    check_options(name, values)
    given = {PARAMETERS[key]: value for key, value in values.items()}
    return method_from_text(add_parameters(text, given))


def build_text_method(text: str, options: dict[str, Any]) -> Any:
    """As `build_method`, without a token score unless one was asked for by name."""
    build_method(text, options)
    takes_score = takes(text.partition(":")[0], PARAMETERS["--tokens"])
    asked = options.get("--tokens") is not None or f"{PARAMETERS['--tokens']}=" in text
    return build_method(
        text, options | {"--tokens": "none"} if takes_score and not asked else options
    )


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


def takes(name: str, parameter: str) -> bool:
    """Whether a method has this parameter."""
    return parameter in METHODS[canonical(name)].parameters


def check_options(name: str, values: dict[str, Any]) -> None:
    """Refuse options that the method has no parameter for."""
    method_by_name(name)  # an unknown name first
    fitting = [option for option, parameter in PARAMETERS.items() if takes(name, parameter)]
    for option in values:
        if option not in fitting:
            hint = f"its options are {', '.join(fitting)}" if fitting else "leave it out"
            raise ConfigError(f"method '{name}' has no option {option}: {hint}")


def read_option(option: str, value: Any) -> Any:
    """An option's text as the parameter means it."""
    if option == "--keep":
        return read_keep(value)
    if option in ("--tokens", "--neuron-score"):
        return None if str(value).lower() == "none" else value
    if option == "--neurons" and not 0 < value <= 1:
        raise ConfigError(f"--neurons {value} is outside (0, 1]: give a share such as 0.6")
    return value


def read_keep(text: str) -> float | None:
    """A share in (0, 1], or None for the knee."""
    if text.strip().lower() == "knee":
        return None
    try:
        share = float(text)
    except ValueError as error:
        raise ConfigError(f"--keep '{text}' is no number: give a share or 'knee'") from error
    if not 0 < share <= 1:
        raise ConfigError(f"--keep {text} is outside (0, 1]: give a share such as 0.3, or 'knee'")
    return share
