"""Neuron policies that decide token by token, by thresholds on what a decode step computes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import ConfigError
from corematching.methods.sparsifier import NeuronDropper
from corematching.policies.check import check_ratio
from corematching.policies.thresholds import find_cut
from corematching.policies.tokens import check_token_set, list_chosen, select_tokens
from corematching.protocol import GATE, NeuronChoice, PrefillView


@dataclass(frozen=True)
class ThresholdRule(NeuronDropper):
    """Keep every neuron in reach, and let thresholds decide at each token. Override `thresholds`.

    The thresholds are quantiles of what the prompt's own tokens showed in the prefill, layer by
    layer and sample by sample.
    """

    per_token: ClassVar[bool] = True

    active_ratio: float = field(default=0.5, metadata={"help": "ratio that passes, in (0, 1]"})
    token_set: str = field(
        default="text",
        metadata={"help": "prompt tokens to calibrate on: all | kept | text | question | image"},
    )

    def __post_init__(self) -> None:
        check_ratio("active_ratio", self.active_ratio)
        check_token_set(self.token_set)

    @property
    def decode_ratio(self) -> float:
        """Ratio of the FFN's weights that a decoded token reads, if it is like the prompt's."""
        return self.active_ratio

    def counts(self, num_layers: int, width: int) -> tuple[int, ...]:
        """Every neuron of every layer may fire."""
        return (width,) * num_layers

    def thresholds(self, view: PrefillView) -> dict[str, Tensor]:
        """The thresholds of `NeuronChoice`, (B,) each, by name."""
        raise NotImplementedError

    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        """All ``count`` neurons, with thresholds."""
        found = functools.partial(self.thresholds, view)
        return NeuronChoice(indices=list_every(view, count), later=found).materialize()

    def calibrate(self, view: PrefillView, values: Tensor | None, what: str) -> Tensor:
        """(B,), the smallest magnitude of a view's part, (B, T, F), that stays; see `find_cut`."""
        if values is None:
            raise _missing(view, what)
        return find_cut(values, select_tokens(view, self.token_set), self.active_ratio)


@dataclass
class AllNeurons:
    """All neurons of a layer of one prompt, by their number and device."""

    indices: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)


def list_every(view: PrefillView, count: int) -> Tensor:
    """(B, count) long, all neurons of a layer; made once for all layers of a prompt."""
    known, key = view.recall(AllNeurons).indices, (count, view.valid.device)
    if key not in known:
        known[key] = torch.arange(count, device=view.valid.device)
    return known[key].expand(view.valid.shape[0], -1)


def find_gate_cut(
    view: PrefillView, token_set: str, ratio: float, neurons: Tensor | None = None
) -> Tensor:
    """The smallest magnitude of a gate that stays when about ``ratio`` of them do.

    Parameters
    ----------
    view : PrefillView
    token_set : str
        The tokens to calibrate on, one of `TOKEN_SETS`.
    ratio : float
        In (0, 1].
    neurons : Tensor, optional
        (B, K) long, the neurons to calibrate over; default: all.

    Returns
    -------
    Tensor
        (B,) float32.

    Raises
    ------
    ConfigError
        When the view shows no gate.
    """
    gate, present = show_gate(view, token_set)
    return find_cut(gate, present, ratio, neurons)


def show_gate(view: PrefillView, token_set: str) -> tuple[Tensor, Tensor]:
    """The gates (B, R, F) of some tokens, and which of them are no filler, (B, R) bool.

    Raises
    ------
    ConfigError
        When the view shows no gate.
    """
    if view.gate is None:
        raise _missing(view, GATE)
    rows, present = list_chosen(view, token_set)
    return view.gate(rows), present


def _missing(view: PrefillView, what: str) -> ConfigError:
    return ConfigError(f"layer {view.layer} shows no {what}: name '{what}' in the policy's needs")
