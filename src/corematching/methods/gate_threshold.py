"""Neurons chosen for each decoded token, by their gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from corematching import devices
from corematching.errors import ConfigError
from corematching.methods.sparsifier import NeuronDropper, NeuronRule
from corematching.methods.threshold_rule import list_every, show_gate
from corematching.methods.top_neurons import TopNeurons
from corematching.policies.base import read_activations
from corematching.policies.check import check_ratio
from corematching.policies.thresholds import find_cut
from corematching.policies.together import Found, find_together
from corematching.policies.tokens import check_token_set
from corematching.protocol import ACTIVATIONS, GATE, NeuronChoice, PrefillView

MOST_KEPT = 1 << 20
"""Most entries of a layer's gate kept until the first token: 2 MB in bf16."""


@dataclass(frozen=True)
class GateThreshold(NeuronDropper, name="gate"):
    """For each decoded token the neurons whose gate is large, of all or ``among`` chosen ones.

    The rule of CATS (arXiv:2404.08763): each decoded token computes the gate of every neuron in
    reach, and up and down of those whose ``|act(gate(x))|`` reaches t. Each layer's t is the
    quantile over these neurons of the prompt's own tokens, sample by sample. Layers that keep all
    neurons are gated too: they are where a choice for the whole answer costs most.
    """

    per_token: ClassVar[bool] = True
    gate_thresholds: ClassVar[bool] = True

    active_ratio: float = field(
        default=0.6,
        metadata={"help": "ratio of the neurons in reach that a token goes on with, in (0, 1]"},
    )
    among: TopNeurons | NeuronRule | None = field(
        default=None,
        metadata={
            "help": "neurons in reach, chosen for the whole answer; None: all",
            "kind": "neuron policy",
        },
    )
    token_set: str = field(
        default="text",
        metadata={
            "help": "prompt tokens whose gates give the threshold: all | kept | text | question | "
            "image"
        },
    )

    def __post_init__(self) -> None:
        check_ratio("active_ratio", self.active_ratio)
        check_token_set(self.token_set)
        if not isinstance(self.among, TopNeurons | NeuronRule | None):
            raise ConfigError(f"among={self.among!r}: give TopNeurons, a NeuronRule or None")

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the choice reads."""
        return (self.among.needs if self.among else frozenset()) | {ACTIVATIONS, GATE}

    @property
    def decode_ratio(self) -> float:
        """The gate of every neuron in reach, and up and down of those that pass."""
        return (1 + 2 * self.active_ratio) / 3

    def counts(self, num_layers: int, width: int) -> tuple[int, ...]:
        """Neurons in reach in each layer."""
        return self.among.counts(num_layers, width) if self.among else (width,) * num_layers

    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        """Choose ``count`` neurons of the view's layer for each sample, and their threshold.

        The threshold is computed at the first decoded token, unless the gate takes much memory.

        Raises
        ------
        ConfigError
            The view shows no gate.
        """
        gate, present = show_gate(view, self.token_set)
        core = self._choose_core(view, count)
        if core is None and not devices.on_host(gate):
            choice = NeuronChoice(later=self._find_later(view, gate, present, count))
            return choice if gate.numel() <= MOST_KEPT else choice.materialize()
        every = list_every(view, count) if core is None else None

        def find() -> dict[str, Tensor | None]:
            if core is None:
                cut = find_cut(gate, present, self.active_ratio)
                return {"indices": every, "gate_threshold": cut}
            among = core.materialize().indices
            cut = find_cut(gate, present, self.active_ratio, among)
            return {"indices": among, "mean": core.mean, "gate_threshold": cut}

        choice = NeuronChoice(later=find)
        return choice if gate.numel() <= MOST_KEPT else choice.materialize()

    def _find_later(
        self, view: PrefillView, gate: Tensor, present: Tensor, count: int
    ) -> Callable[[], Found]:
        """The threshold of a layer, found with those of all other layers."""
        every = list_every(view, count)

        def solve(items: Sequence[tuple[Tensor, Tensor]]) -> list[Found]:
            gates = torch.stack([gate for gate, _ in items])
            tokens = torch.stack([present for _, present in items])
            cuts = find_cut(gates.flatten(0, 1), tokens.flatten(0, 1), self.active_ratio)
            cuts = cuts.view(gates.shape[:2])
            return [{"indices": every, "gate_threshold": cut} for cut in cuts]

        key = ("gate", self.active_ratio, gate.shape, gate.dtype, gate.device)
        return find_together(view, key, (gate, present), solve)

    def _choose_core(self, view: PrefillView, count: int) -> NeuronChoice | None:
        """The neurons in reach; None for all of the layer."""
        if self.among is None or count == read_activations(view).shape[-1]:
            return None
        return self.among.choose(view, count)
