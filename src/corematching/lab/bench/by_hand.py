"""A method from ratios set by hand: speed depends on shapes and ratios, not on the choice."""

from __future__ import annotations

from typing import Any

from corematching.errors import ConfigError
from corematching.methods.text import write_method
from corematching.policies.check import check_tokens_count, check_tokens_ratio

AFTER = 1
"""Tokens go after the second decoder layer, as FastV (arXiv:2403.06764) drops them."""
EVERY_LAYER = {"dense_first": 0, "dense_last": 0}


def name_by_hand(
    keep_ratio: float | None = None,
    neuron_ratio: float | None = None,
    layer: int | None = None,
    keep_tokens: int | None = None,
    active_ratio: float | None = None,
) -> str:
    """The text of a method with these amounts, for `corematching.methods.method_from_text`.

    Parameters
    ----------
    keep_ratio, keep_tokens : float, int or None
        Image tokens kept: a ratio in (0, 1] or a number; neither: all.
    neuron_ratio : float or None
        Ratio of the neurons of every layer, the first and last ones too, for the whole answer;
        None: all.
    layer : int or None
        Decoder layer after which tokens are dropped, from 0; default: `AFTER`.
    active_ratio : float or None
        Ratio of these neurons computed for each decoded token; None: all.

    Raises
    ------
    ConfigError
        A ratio or a number is out of range, or ``layer`` is given alone.
    """
    names = "--keep-ratio", "--keep-tokens"
    tokens: dict[str, Any] = {}
    if keep_ratio is not None and keep_tokens is not None:
        raise ConfigError(f"{' and '.join(names)} exclude each other: give one")
    if keep_tokens is not None:
        tokens = {"keep_tokens": check_tokens_count(*names, keep_tokens)}
    elif keep_ratio is not None and check_tokens_ratio(*names, keep_ratio) < 1:
        tokens = {"keep_ratio": float(keep_ratio)}
    if tokens:
        tokens["layer"] = AFTER if layer is None else layer
    neurons = name_neurons(
        check_option("--neuron-ratio", neuron_ratio), check_option("--active-ratio", active_ratio)
    )
    return write_method("corematching", {**(tokens or {"score": None}), "neurons": neurons})


def name_neurons(neuron_ratio: float, active_ratio: float) -> dict[str, Any] | None:
    """The neuron rule of two ratios, as `write_method` takes it; None where both are 1."""
    top = {"name": "top", "ratio": neuron_ratio, **EVERY_LAYER} if neuron_ratio < 1 else None
    if active_ratio == 1:
        return top
    among = {"among": top} if top else {}
    return {"name": "gate", "active_ratio": active_ratio, **among}


def check_option(option: str, ratio: float | None) -> float:
    """A ratio in (0, 1]; 1 where it was not given."""
    if ratio is not None and not 0 < ratio <= 1:
        raise ConfigError(f"{option} {ratio} is outside (0, 1]: give a ratio such as 0.4")
    return 1.0 if ratio is None else float(ratio)
