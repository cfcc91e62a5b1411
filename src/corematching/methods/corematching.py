"""CoreMatching: core tokens in the prefill and the KV cache, core neurons in the decode."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field, fields
from typing import Any, cast

from corematching.methods.sparsifier import Installable, NeuronRule, Sparsifier, TokenRule
from corematching.policy.base import NeuronScore, TokenScore
from corematching.policy.budgets import Budget, Count, Knee, Ratio
from corematching.policy.check import check_amount, check_depth, check_share
from corematching.policy.component import build, find
from corematching.policy.schedules import DenseEnds
from corematching.policy.tokens import check_over
from corematching.sizes import parse_size

PUBLISHED: dict[str, Any] = {
    "token_score": "core-overlap",
    "neuron_score": "paper",
    "rho": 0.2,
    "over": "all",
    "beta": 0.4,
    "layer": 6 / 32,
    "keep": None,
    "cover": 0.0,
    "floor": None,
    "ceiling": None,
    "dense_first": 6 / 32,
    "dense_last": 5 / 32,
    "compensate": False,
    "multiple": 1,
}
"""The published parameters; `CoreMatching.paper` says where each one stands."""


@dataclass(frozen=True)
class CoreMatching(Installable, name="corematching"):
    """Co-adaptive sparse inference: core tokens and core neurons (arXiv:2505.19235).

    The defaults are ours and differ from the paper where measurements say so: image tokens are
    matched against the neurons that the question activates, each weighted by how few image tokens
    activate it, not against the sentence's most frequent ones (on pictures with much background
    those are the background's), and half of the kept ones lie evenly over the picture, for what no
    score can see; neurons are ranked by GRIFFIN's score with the dropped ones replaced by their
    mean, and the end layers stay dense. `paper` gives the published rule.

    ``memory``, such as ``"12GiB"``, is the most that the model may take of its device's memory; it
    changes where weights are kept and no result, so it is no parameter of the method.

    Raises
    ------
    ConfigError
        When a parameter is out of range or a score's name is unknown.
    """

    token_score: TokenScore | str | None = field(
        default="text-overlap",
        metadata={"help": "image tokens are ranked by this; None keeps all", "kind": "token score"},
    )
    neuron_score: NeuronScore | str | None = field(
        default="griffin",
        metadata={"help": "neurons are ranked by this; None keeps all", "kind": "neuron score"},
    )
    rho: float = field(
        default=0.2,
        metadata={"help": "share of a token's neurons that count as its own, in (0, 1]"},
    )
    over: str = field(
        default="all",
        metadata={
            "help": "tokens that neurons are ranked over: all (that a layer sees), kept (text and "
            "core tokens, also in the layers before the cut), text, question or image"
        },
    )
    beta: float = field(
        default=0.7, metadata={"help": "share of the neurons that are core, in (0, 1]"}
    )
    layer: int | float | tuple[int | float, ...] = field(
        default=0.5,
        metadata={
            "help": "drop image tokens after this decoder layer (int, from 0), or once this share "
            "of the layers (float) has seen them all; several: a tuple"
        },
    )
    keep: int | float | None = field(
        default=0.3,
        metadata={
            "help": "image tokens kept: a share (float), a count (int), or None for the knee of "
            "the sorted scores"
        },
    )
    floor: int | float | None = field(
        default=None, metadata={"help": "keep at least this share (float) or count (int) of them"}
    )
    ceiling: int | float | None = field(
        default=None, metadata={"help": "keep at most this share (float) or count (int) of them"}
    )
    cover: float = field(
        default=0.5,
        metadata={"help": "share of the kept tokens spread evenly over the picture, in [0, 1)"},
    )
    dense_first: int | float = field(
        default=4 / 32,
        metadata={"help": "first layers that keep all neurons: int or share of depth"},
    )
    dense_last: int | float = field(
        default=3 / 32,
        metadata={"help": "last layers that keep all neurons: int or share of depth"},
    )
    compensate: bool = field(
        default=True, metadata={"help": "replace dropped neurons by their mean over the prompt"}
    )
    multiple: int = field(
        default=8, metadata={"help": "round the number of kept neurons to a multiple of this"}
    )
    memory: InitVar[str | int | None] = None

    def __post_init__(self, memory: str | int | None) -> None:
        if memory is not None:
            parse_size("memory", memory)
        object.__setattr__(self, "memory", memory)
        check_share("rho", self.rho)
        check_share("beta", self.beta)
        check_over(self.over)
        if self.keep is not None:
            check_amount("keep", self.keep)
        check_depth("dense_first", self.dense_first)
        check_depth("dense_last", self.dense_last)
        if isinstance(self.layer, list):
            object.__setattr__(self, "layer", tuple(self.layer))
        for layer in self._layers():
            check_depth("layer", layer, least=-1)
        object.__setattr__(self, "_sparsifier", self._compose())

    @classmethod
    def paper(cls, **changes: Any) -> CoreMatching:
        """The published rule with the published parameters, `PUBLISHED`.

        - ``rho=0.2, beta=0.4``, neurons ranked by ``f_rho(n; s)``: CoreInfer (arXiv:2410.18311) and
          its code, from which CoreMatching takes the core neurons.
        - Layers 6 to 26 of 32 thinned out, the others dense, as a share of other depths:
          CoreInfer's code.
        - Image tokens ranked by ``|Gamma(x) & C_rho^beta(s)|``, cut at the maximum geometric
          distance: CoreMatching; that the token at the knee is dropped: its authors' code.
        - Dropped once, after layer 5 of 32: our reading; the method's formulas name no layer, and
          the authors' code scores from layer 5 on.
        - No compensation, no rounding to a multiple: neither paper has any.

        Where the papers are silent, a straight curve of scores keeps every token, and equal
        frequencies are settled by the neuron's index.

        Parameters
        ----------
        **changes
            Parameters that differ from the published ones.
        """
        return cls(**{**PUBLISHED, **changes})

    @property
    def tokens(self) -> TokenRule | None:
        """The token policy that the parameters amount to."""
        return cast("TokenRule | None", self.sparsifier.tokens)

    @property
    def neurons(self) -> NeuronRule | None:
        """The neuron policy that the parameters amount to."""
        return cast("NeuronRule | None", self.sparsifier.neurons)

    @property
    def sparsifier(self) -> Sparsifier:
        """The composition that the parameters amount to."""
        return cast(Sparsifier, vars(self)["_sparsifier"])

    def _compose(self) -> Sparsifier:
        return Sparsifier(tokens=self._compose_tokens(), neurons=self._compose_neurons())

    def _layers(self) -> tuple[int | float, ...]:
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    def _compose_tokens(self) -> TokenRule | None:
        budget = self._compose_budget()
        ours = {"rho": self.rho, "share": self.rho, "beta": self.beta}
        score = _resolve(TokenScore.kind, self.token_score, ours)
        return None if score is None else TokenRule(score, budget, self._layers())

    def _compose_budget(self) -> Budget:
        bounds: dict[str, Any] = {
            "floor": self.floor,
            "ceiling": self.ceiling,
            "cover": self.cover,
        }
        if self.keep is None:
            return Knee(**bounds)
        if isinstance(self.keep, float):
            return Ratio(self.keep, **bounds)
        return Count(self.keep, **bounds)

    def _compose_neurons(self) -> NeuronRule | None:
        schedule = DenseEnds(
            self.beta, first=self.dense_first, last=self.dense_last, multiple=self.multiple
        )
        ours = {"rho": self.rho, "share": self.rho, "over": self.over}
        score = _resolve(NeuronScore.kind, self.neuron_score, ours)
        return None if score is None else NeuronRule(score, schedule, self.compensate)


def _resolve(kind: str, score: Any, ours: dict[str, Any]) -> Any:
    """A score from its name, given those of our parameters that it knows."""
    if not isinstance(score, str):
        return score
    known = {f.name for f in fields(cast(Any, find(kind, score)))}
    return build(kind, score, **{key: ours[key] for key in ours if key in known})
