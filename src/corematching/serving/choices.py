"""The neuron choices of several prompts as one choice for a batch.

Shapes: B rows, K neurons of a choice, F neurons of an FFN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from corematching.protocol import NeuronChoice

THRESHOLDS = ("input_threshold", "gate_threshold", "output_threshold")
Choices = Mapping[int, NeuronChoice]


class ChoiceForm:
    """What the installed method's choices have in common.

    Rows decode together if each layer computes equally many neurons. A row without choices (a
    "dense" request) joins those of a method that keeps every neuron in reach and leaves them out
    token by token: its thresholds are 0, which leaves none out.

    Parameters
    ----------
    example : mapping
        The choices of any prompt, by layer.
    widths : mapping
        F of the layers in `example`.
    """

    def __init__(self, example: Choices, widths: Mapping[int, int]) -> None:
        self._neutral: dict[int, NeuronChoice] = {}
        for layer, choice in example.items():
            known = choice.materialize()
            if known.indices is None or known.indices.shape[1] != widths[layer]:
                self._neutral.clear()
                break
            self._neutral[layer] = _neutral(known, widths[layer])

    def fill(self, choices: Choices) -> Choices:
        """A row's choices; the neutral ones for a row without any, where there are some."""
        return choices or self._neutral

    @staticmethod
    def key(choices: Choices) -> tuple[tuple[int, int], ...]:
        """What rows that decode together agree in: the neurons of each layer."""
        counts = []
        for layer, choice in sorted(choices.items()):
            indices = choice.materialize().indices
            counts.append((layer, 0 if indices is None else indices.shape[1]))
        return tuple(counts)


def join(rows: Sequence[Choices]) -> dict[int, NeuronChoice]:
    """One choice of B rows for each layer, from B choices of one row with equal keys."""
    joined = {}
    for layer in rows[0]:
        parts = [row[layer].materialize() for row in rows]
        fields: dict[str, Any] = {}
        for name in ("indices", "mean", *THRESHOLDS):
            values = [getattr(part, name) for part in parts]
            some = next((value for value in values if value is not None), None)
            if some is not None:
                empty = torch.zeros_like(some[:1])
                fields[name] = torch.cat([empty if x is None else x[:1] for x in values])
        joined[layer] = NeuronChoice(**fields)
    return joined


def _neutral(choice: NeuronChoice, width: int) -> NeuronChoice:
    indices = choice.indices
    assert indices is not None
    limits = {name: getattr(choice, name) for name in THRESHOLDS}
    zeros: dict[str, Any] = {
        name: torch.zeros_like(x[:1]) for name, x in limits.items() if x is not None
    }
    return NeuronChoice(indices=torch.arange(width, device=indices.device)[None], **zeros)
