"""Checks of the policies' choices, before any backend computes with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corematching import devices
from corematching.backends.kernels.check import check_order, describe, find_disorder, refuse_order
from corematching.errors import ConfigError, InvalidTensorError
from corematching.protocol import NeuronChoice, TokenChoice

if TYPE_CHECKING:
    from corematching.backends.sparse_ffn import SparseFFN


def limits_of(choice: NeuronChoice) -> tuple[Tensor | None, ...]:
    """A choice's thresholds of the input, the gate and the output."""
    return choice.input_threshold, choice.gate_threshold, choice.output_threshold


def check_neurons(choice: NeuronChoice, count: int, width: int) -> None:
    """Check a choice's neurons, means and thresholds.

    Does not wait for a GPU: `check_materialized` checks the values of indices there.

    Parameters
    ----------
    choice : NeuronChoice
        A choice with indices.
    count : int
        Requested number of neurons.
    width : int
        F, neurons of the FFN.

    Raises
    ------
    InvalidTensorError
        A shape or a dtype is wrong; on the CPU also if the indices do not ascend in [0, width).
    """
    indices, mean = choice.indices, choice.mean
    if not isinstance(indices, Tensor) or indices.dim() != 2 or indices.shape[1] != count:
        raise InvalidTensorError(
            f"expected neuron indices (batch, {count}), got {describe(indices)}: "
            "a policy must choose as many neurons as it was asked for"
        )
    if indices.dtype != torch.long:
        raise InvalidTensorError(
            f"expected neuron indices in int64, got {describe(indices)}: convert them with .long()"
        )
    if mean is not None and not _is_float(mean, (len(indices), width)):
        raise InvalidTensorError(
            f"expected means ({len(indices)}, {width}) in a float dtype, got {describe(mean)}: "
            "a policy must give one mean per neuron, 0 on the kept ones"
        )
    for limits in limits_of(choice):
        if limits is not None and not _is_float(limits, (len(indices),)):
            raise InvalidTensorError(
                f"expected thresholds ({len(indices)},) in a float dtype, got {describe(limits)}: "
                "a policy must give one per sample"
            )
    if devices.on_host(indices):
        check_order(indices, width)


def check_materialized(ffns: Iterable[SparseFFN]) -> None:
    """Materialize the choices of FFNs and check them; waits for each device once.

    Raises
    ------
    InvalidTensorError
        See `check_neurons`; on a GPU also if the indices do not ascend in [0, width).
    ConfigError
        A policy chose no neurons.
    """
    listed: dict[Any, list[Tensor]] = {}
    fresh = [(ffn, ffn.taken) for ffn in ffns if ffn.taken is not ffn.checked]
    for ffn, choice in fresh:
        if choice is None:
            continue
        late = choice.later is not None
        choice.materialize()
        if choice.indices is None:
            raise ConfigError("a policy must choose neurons, at once or with 'later'")
        if late:
            ffn.check_choice(choice)
        if not devices.on_host(choice.indices):
            key = choice.indices.device, choice.indices.shape, ffn.width
            listed.setdefault(key, []).append(choice.indices)
    flags: dict[torch.device, list[tuple[Tensor, int]]] = {}
    for (device, _, width), lists in listed.items():
        alike = {id(indices): indices for indices in lists}
        flag = find_disorder(torch.cat(list(alike.values())), width)
        flags.setdefault(device, []).append((flag, width))
    for found in flags.values():
        bad = torch.stack([flag for flag, _ in found]).tolist()
        for wrong, (_, width) in zip(bad, found, strict=True):
            if wrong:
                raise refuse_order(width)
    for ffn, choice in fresh:
        ffn.checked = choice


def check_tokens(choice: TokenChoice, valid: Tensor, hidden: Tensor, layer: int) -> None:
    """Check a token choice.

    Parameters
    ----------
    choice : TokenChoice
        The choice.
    valid : Tensor
        (B, T) bool, False on padding.
    hidden : Tensor
        (B, T, d), the layer's hidden states.
    layer : int
        The layer of the cut, for the messages.

    Raises
    ------
    InvalidTensorError
        The mask is no (B, T) bool, the hidden states are not (B, T, d), or the weights are not
        (B, T), positive and finite on kept tokens.
    """
    keep, weights, merged = choice.keep, choice.weights, choice.hidden
    if not isinstance(keep, Tensor) or keep.shape != valid.shape or keep.dtype != torch.bool:
        raise InvalidTensorError(
            f"expected a keep mask {tuple(valid.shape)}, bool, after layer {layer}, got "
            f"{describe(keep)}: a policy must choose among the tokens it is shown"
        )
    if merged is not None and not _is_float(merged, tuple(hidden.shape)):
        raise InvalidTensorError(
            f"expected hidden states {tuple(hidden.shape)} in a float dtype after layer {layer}, "
            f"got {describe(merged)}: a policy that merges gives one for every token it is shown"
        )
    if weights is None:
        return
    if not _is_float(weights, tuple(valid.shape)):
        raise InvalidTensorError(
            f"expected weights {tuple(valid.shape)} in a float dtype after layer {layer}, got "
            f"{describe(weights)}: a policy must give one for every token it is shown"
        )
    if choice.counts is not None and not devices.on_host(weights):
        return  # whoever knows the counts beforehand spares the device's answer
    fine = (weights > 0) & (weights < torch.inf)
    if not bool((fine | ~keep.to(fine.device) | ~valid.to(fine.device)).all()):
        raise InvalidTensorError(
            f"a kept token's weight after layer {layer} is zero, negative, infinite or NaN: "
            "weights must be positive and finite"
        )


def _is_float(x: object, shape: tuple[int, ...]) -> bool:
    return isinstance(x, Tensor) and x.shape == shape and x.is_floating_point()
