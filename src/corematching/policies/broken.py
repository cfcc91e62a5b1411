"""Samples whose numbers are NaN or infinite."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from corematching.devices import HostCopy
from corematching.errors import ConfigError

log = logging.getLogger(__name__)


def report_later(what: str, broken: Tensor, advice: str) -> Callable[[Tensor], None]:
    """`report_broken`, to be called with ``present`` when the device has come so far."""
    flags = HostCopy(broken)

    def report(present: Tensor) -> None:
        found = flags.read()
        if found.any():
            report_broken(what, torch.from_numpy(found), present.cpu(), advice)

    return report


def report_broken(what: str, broken: Tensor, present: Tensor, advice: str) -> None:
    """Warn about the broken samples of a batch; raise if no sample is left.

    Parameters
    ----------
    what : str
        What is NaN or infinite, such as ``"the activations"``.
    broken : Tensor
        (B,) bool, the samples with such values.
    present : Tensor
        (B,) bool, the samples with any values.
    advice : str
        The remedy, for the message.

    Raises
    ------
    ConfigError
        Every sample is broken.
    """
    samples = ", ".join(map(str, broken.nonzero().flatten().tolist()))
    if not samples:
        return
    text = f"{what} of sample {samples} hold NaN or infinite values: {advice}"
    if not bool((present & ~broken).any()):
        raise ConfigError(text)
    log.warning("%s; the other samples of the batch are not affected", text)
