"""A method from kept shares set by hand: speed depends on shapes and shares, not on the choice."""

from __future__ import annotations

from corematching.errors import ConfigError

AFTER = 1
"""Tokens go after the second decoder layer, as FastV (arXiv:2403.06764) drops them."""


def name_by_hand(keep: float | None, neurons: float | None, after: int | None = None) -> str:
    """The text of a method with these shares, for `corematching.methods.method_from_text`.

    Parameters
    ----------
    keep : float or None
        Share of the image tokens, in (0, 1]; None: all.
    neurons : float or None
        Share of the neurons of every layer, the first and last ones too; None: all.
    after : int or None
        Decoder layer after which tokens are dropped, from 0; default: `AFTER`.

    Raises
    ------
    ConfigError
        A share is out of range.
    """
    for option, share in (("--keep", keep), ("--neurons", neurons)):
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"{option} {share} is outside (0, 1]: give a share such as 0.4")
    parts = []
    if keep is None or keep == 1:
        parts.append("token_score=none")
    else:
        parts += [f"keep={float(keep)}", f"layer={AFTER if after is None else after}"]
    if neurons is None or neurons == 1:
        parts.append("neuron_score=none")
    else:
        parts += [f"beta={float(neurons)}", "dense_first=0", "dense_last=0", "firing=none"]
    return "corematching:" + ",".join(parts)
