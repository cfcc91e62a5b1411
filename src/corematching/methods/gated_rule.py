"""Core neurons for a whole answer, and of these the firing ones for each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from corematching.methods.firing_rule import list_every, show_gate
from corematching.methods.sparsifier import NeuronRule
from corematching.policy.base import read_activations
from corematching.policy.check import check_share
from corematching.policy.thresholds import find_cut
from corematching.policy.tokens import check_over
from corematching.protocol import ACTIVATIONS, GATE, NeuronChoice, PrefillView

MOST_KEPT = 1 << 20
"""Numbers of a layer's gate that wait for the first token, at most: 2 MB in bf16."""


@dataclass(frozen=True)
class GatedRule(NeuronRule, name="gated-rule"):
    """A neuron rule whose core neurons go on to up and down only where their gate is large.

    The rule of CATS (arXiv:2404.08763) within the core set: each decoded token computes the gate of
    the core neurons, and up and down of those whose ``|act(gate(x))|`` reaches t. Each layer's t is
    the quantile over its core neurons of the prompt's own tokens, sample by sample. Layers that
    keep all neurons are gated too: they are where a choice for the whole answer costs most.
    """

    per_token: ClassVar[bool] = True

    firing: float = field(
        default=0.5,
        metadata={"help": "share of the core neurons that a token passes on to up and down"},
    )
    calibrate_over: str = field(
        default="text",
        metadata={"help": "tokens to calibrate over: all | kept | text | question | image"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("firing", self.firing)
        check_over(self.calibrate_over)

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the choice reads."""
        return super().needs | {ACTIVATIONS, GATE}

    @property
    def decode_share(self) -> float:
        """The gate of every core neuron, and up and down of those that pass."""
        return (1 + 2 * self.firing) / 3

    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        """Choose ``count`` neurons of the view's layer for each sample, and their threshold.

        The threshold is found when the first token is there, unless that would keep much in memory.

        Raises
        ------
        ConfigError
            When the view shows no gate.
        """
        gate, present = show_gate(view, self.calibrate_over)
        thinned = count < read_activations(view).shape[-1]
        core = super().choose(view, count) if thinned else NeuronChoice(list_every(view, count))

        def find() -> dict[str, Tensor | None]:
            among = core.settle().indices
            cut = find_cut(gate, present, self.firing, among if thinned else None)
            return {"indices": among, "mean": core.mean, "gate_threshold": cut}

        choice = NeuronChoice(later=find)
        return choice if gate.numel() <= MOST_KEPT else choice.settle()
