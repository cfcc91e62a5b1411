"""Neurons chosen once for the whole answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.sparsifier import NeuronDropper, NeuronRule
from corematching.policies.base import NeuronScore
from corematching.policies.check import check_depth, check_ratio
from corematching.policies.component import read_nested
from corematching.policies.neuron_scores import GriffinScore
from corematching.policies.schedules import DenseEnds
from corematching.protocol import NeuronChoice, PrefillView


@dataclass(frozen=True)
class TopNeurons(NeuronDropper, name="top"):
    """The highest-scored neurons of the prompt, for the whole answer; the end layers stay dense.

    This is the choice that a cap on memory needs, since what no token can reach need not be kept at
    hand. `NeuronRule` takes any other schedule.
    """

    ratio: float = field(default=0.4, metadata={"help": "ratio of the neurons kept, in (0, 1]"})
    dense_first: int | float = field(
        default=4 / 32,
        metadata={"help": "first layers that keep all neurons: int or ratio of depth"},
    )
    dense_last: int | float = field(
        default=3 / 32,
        metadata={"help": "last layers that keep all neurons: int or ratio of depth"},
    )
    score: NeuronScore | str = field(
        default=GriffinScore(),
        metadata={"help": "neurons are ranked by this", "kind": "neuron score"},
    )
    compensate: bool = field(
        default=True, metadata={"help": "replace dropped neurons by their mean over the prompt"}
    )
    multiple: int = field(
        default=8, metadata={"help": "round the number of kept neurons to a multiple of this"}
    )

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio)
        check_depth("dense_first", self.dense_first)
        check_depth("dense_last", self.dense_last)
        object.__setattr__(self, "score", read_nested(NeuronScore.kind, self.score))
        object.__setattr__(self, "_rule", self._compose())

    @property
    def rule(self) -> NeuronRule:
        """The rule that the parameters amount to."""
        rule: NeuronRule = vars(self)["_rule"]
        return rule

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the choice reads."""
        return self.rule.needs

    def counts(self, num_layers: int, width: int) -> tuple[int, ...]:
        """Neurons to keep in each layer; ``width`` leaves the layer dense."""
        return self.rule.counts(num_layers, width)

    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        """Choose ``count`` neurons of the view's layer for each sample."""
        return self.rule.choose(view, count)

    def _compose(self) -> NeuronRule:
        schedule = DenseEnds(
            self.ratio, first=self.dense_first, last=self.dense_last, multiple=self.multiple
        )
        return NeuronRule(self.score, schedule, self.compensate)  # type: ignore[arg-type]
