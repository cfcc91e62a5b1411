"""The tokens and neurons that a run chose, per sample.

Shapes: T tokens of the prompt (padding included), N image tokens of it, F neurons of an FFN, K kept
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corematching.errors import ConfigError, InputError
from corematching.protocol import NeuronChoice
from corematching.runtime.record import Record


@dataclass(frozen=True, eq=False)
class TokenCut:
    """One layer after which tokens of a sample were dropped.

    Attributes
    ----------
    layer : int
        The layer; -1 is the input of layer 0.
    prompt_mask : Tensor
        (T,) bool, the prompt tokens kept by this cut, text tokens included.
    lowest : float
        The lowest kept score; NaN without image tokens.
    """

    layer: int
    prompt_mask: Tensor
    lowest: float


@dataclass(frozen=True, eq=False)
class LayerNeurons:
    """The intermediate neurons of one sample's decode steps in one layer.

    Attributes
    ----------
    indices : Tensor
        (K,) long, ascending.
    mean : Tensor or None
        (F,), the constants of dropped neurons, 0 on kept ones; None: zeros.
    input_threshold, gate_threshold, output_threshold : float or None
        Per-token thresholds, see `NeuronChoice`; None: no threshold.
    """

    indices: Tensor
    mean: Tensor | None = None
    input_threshold: float | None = None
    gate_threshold: float | None = None
    output_threshold: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Choices:
    """The chosen tokens and neurons of one sample, as copies on the CPU.

    Attributes
    ----------
    prompt_mask : Tensor
        (T,) bool, the prompt tokens in the last layer and the KV cache; False on padding.
    image : Tensor
        (T,) bool, the image tokens of the prompt.
    scores : Tensor
        (T,) float32, each image token's score from its last cut; NaN elsewhere.
    cuts : tuple of TokenCut
        In the order of their layers; empty where no token was dropped.
    neurons : tuple of LayerNeurons or None
        Per decoder layer; None where all neurons are computed.
    """

    prompt_mask: Tensor
    image: Tensor
    scores: Tensor
    cuts: tuple[TokenCut, ...]
    neurons: tuple[LayerNeurons | None, ...]

    @property
    def keep_mask(self) -> Tensor:
        """(N,) bool, the image tokens in the last layer, as in the report."""
        return self.prompt_mask[self.image]

    @property
    def cut_layers(self) -> list[int]:
        """Layers after which tokens were dropped."""
        return [cut.layer for cut in self.cuts]

    @property
    def neuron_indices(self) -> list[Tensor | None]:
        """Per decoder layer: (K,) long, the kept neurons; None in a dense layer."""
        return [None if layer is None else layer.indices for layer in self.neurons]

    def __repr__(self) -> str:
        chosen = sum(layer is not None for layer in self.neurons)
        return (
            f"Choices({int(self.keep_mask.sum())} of {len(self.keep_mask)} image tokens, "
            f"cut_layers={self.cut_layers}, neurons in {chosen} of {len(self.neurons)} layers)"
        )


class KeptTokens(NamedTuple):
    """The token choices of one row, named as in `Choices`."""

    prompt_mask: Tensor
    image: Tensor
    scores: Tensor
    cuts: tuple[TokenCut, ...]


class TokenReader:
    """Reads a record's token choices row by row; moves its tensors to the CPU once."""

    def __init__(self, record: Record) -> None:
        first = record.chooser
        rows: Any = slice(None) if first is record or record.rows is None else record.rows
        self.image, self.valid = first.image.cpu()[rows], first.valid.cpu()[rows]
        self._stages = [
            (
                stage.layer,
                stage.origin.cpu()[rows],
                stage.present.cpu()[rows],
                stage.choice.keep.cpu()[rows],
                stage.choice.scores.float().cpu()[rows],
                stage.choice.cut.float().cpu()[rows],
            )
            for stage in first.selection.stages
        ]

    def read(self, row: int) -> KeptTokens:
        """The token choices of one row of the batch."""
        image, mask = self.image[row].clone(), self.valid[row].clone()
        scores, cuts = torch.full(mask.shape, torch.nan), []
        for layer, origin, present, keep, values, lowest in self._stages:
            seen = present[row]
            columns = origin[row][seen]
            scores[columns] = torch.where(image[columns], values[row][seen], scores[columns])
            mask = mask.clone()
            mask[columns] = keep[row][seen] | ~image[columns]
            cuts.append(TokenCut(layer, mask, float(lowest[row])))
        return KeptTokens(mask, image, scores, tuple(cuts))


def read_choices(record: Record, num_layers: int) -> list[Choices]:
    """The choices of a run, per sample.

    Parameters
    ----------
    record : Record
        The last run's; earlier records no longer hold their neurons.
    num_layers : int
        Decoder layers of the model.

    Raises
    ------
    ConfigError
        A policy chose no neurons.
    InputError
        The run continued from a prompt whose record is gone.
    """
    if record.continued and record.earlier is None and record.rows:
        raise InputError(
            "the prompt that chose this conversation's tokens is no longer on record (only the "
            "last 16 runs are): read run.choices after an earlier turn"
        )
    tokens, neurons = TokenReader(record), record.selection.neurons
    out = []
    for row in range(0, record.valid.shape[0], record.expand):
        chosen = record.rows[row] if record.continued and record.rows else row
        layers = tuple(
            _pick(neurons[i].materialize(), chosen) if i in neurons else None
            for i in range(num_layers)
        )
        out.append(Choices(*tokens.read(row), layers))
    return out


def _pick(choice: NeuronChoice, row: int) -> LayerNeurons:
    """One row of a batch's choice; tensors with a single row hold for every sample."""

    def tensor(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[row if len(part) > 1 else 0].to("cpu", copy=True)

    def number(part: Tensor | None) -> float | None:
        return None if part is None else float(part[row if len(part) > 1 else 0])

    indices = tensor(choice.indices)
    if indices is None:
        raise ConfigError("a policy must choose neurons, at once or with 'later'")
    limits = choice.input_threshold, choice.gate_threshold, choice.output_threshold
    return LayerNeurons(indices, tensor(choice.mean), *map(number, limits))
