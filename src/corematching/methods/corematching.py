"""CoreMatching: core tokens in the prefill and the KV cache, core neurons in the decode."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field, fields
from typing import Any, cast

from corematching.methods.gated_rule import GatedRule
from corematching.methods.sparsifier import Installable, NeuronRule, Sparsifier, TokenRule
from corematching.methods.staged import StagedRule, scale_stages
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
    "taper": 0.5,
    "cover": 0.0,
    "proportional": False,
    "floor": None,
    "ceiling": None,
    "dense_first": 6 / 32,
    "dense_last": 5 / 32,
    "compensate": False,
    "multiple": 1,
    "firing": None,
}
"""The published parameters; `CoreMatching.paper` says where each one stands."""

ONE_CUT = 0.4
"""Where image tokens go by default, as a share of the layers."""
STAGES = (9 / 32, 17 / 32, 25 / 32)
"""Where they go instead, less by less, if a smaller share than `FEW` is to be left."""
FEW = 0.2


@dataclass(frozen=True)
class CoreMatching(Installable, name="corematching"):
    """Co-adaptive sparse inference: core tokens and core neurons (arXiv:2505.19235).

    The defaults are ours and differ from the paper where measurements say so: image tokens are
    matched against the neurons that the question activates, each weighted by how few image tokens
    activate it, not against the sentence's most frequent ones (on pictures with much background
    those are the background's); nine in ten of the kept ones lie evenly over the picture, for what
    no score can see, and each counts in attention for the dropped ones most like it. Neurons are
    chosen for each decoded token, by its gate against a threshold from the prompt, since on long
    answers any choice for the whole of them costs more; with ``beta`` below 1 that is done among
    the sentence's core neurons, ranked by GRIFFIN's score, the others replaced by their mean and
    the end layers dense. `paper` gives the published rule.

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
        default=1.0, metadata={"help": "share of the neurons that are core, in (0, 1]"}
    )
    layer: int | float | tuple[int | float, ...] | None = field(
        default=None,
        metadata={
            "help": "drop image tokens after this decoder layer (int, from 0), or once this share "
            "of the layers (float) has seen them all; several, from the first to the last: a "
            f"tuple; None: {ONE_CUT}, or in three stages where less than {FEW:.0%} are kept"
        },
    )
    keep: int | float | tuple[int | float, ...] | None = field(
        default=0.3,
        metadata={
            "help": "image tokens kept: a share (float), a count (int), or None for the knee of "
            "the sorted scores; with several layers one amount for each (a tuple), or what the "
            "last one leaves"
        },
    )
    taper: float = field(
        default=0.5,
        metadata={
            "help": "with several layers and one amount to keep: the share that each layer leaves "
            "of what the one before left, in (0, 1]"
        },
    )
    floor: int | float | None = field(
        default=None, metadata={"help": "keep at least this share (float) or count (int) of them"}
    )
    ceiling: int | float | None = field(
        default=None, metadata={"help": "keep at most this share (float) or count (int) of them"}
    )
    cover: float = field(
        default=0.9,
        metadata={"help": "share of the kept tokens spread evenly over the picture, in [0, 1)"},
    )
    proportional: bool = field(
        default=True,
        metadata={
            "help": "attention to a kept token counts for the dropped ones most like it too; "
            "attention implementations that cannot add to scores leave it out"
        },
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
    firing: float | None = field(
        default=0.6,
        metadata={
            "help": "share of the core neurons that a decoded token goes on with once their gates "
            "are known, in (0, 1]; None: all of them"
        },
    )
    memory: InitVar[str | int | None] = None

    def __post_init__(self, memory: str | int | None) -> None:
        if memory is not None:
            parse_size("memory", memory)
        object.__setattr__(self, "memory", memory)
        check_share("rho", self.rho)
        check_share("beta", self.beta)
        check_share("taper", self.taper)
        check_over(self.over)
        for name in ("layer", "keep"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for amount in _several(self.keep):
            if amount is not None or isinstance(self.keep, tuple):
                check_amount("keep", amount)
        if self.firing is not None:
            check_share("firing", self.firing)
        check_depth("dense_first", self.dense_first)
        check_depth("dense_last", self.dense_last)
        for layer in self.places:
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
    def places(self) -> tuple[int | float, ...]:
        """The layers after which image tokens go, as `layer` has them."""
        if self.layer is not None:
            return _several(self.layer)
        few = isinstance(self.keep, float) and self.keep < FEW
        return STAGES if few else (ONE_CUT,)

    @property
    def tokens(self) -> TokenRule | StagedRule | None:
        """The token policy that the parameters amount to."""
        return cast("TokenRule | StagedRule | None", self.sparsifier.tokens)

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

    def _compose_tokens(self) -> TokenRule | StagedRule | None:
        ours = {"rho": self.rho, "share": self.rho, "beta": self.beta}
        score = _resolve(TokenScore.kind, self.token_score, ours)
        if score is None:
            return None
        layers, keep = self.places, self.keep
        bounds: dict[str, Any] = {
            "floor": self.floor,
            "ceiling": self.ceiling,
            "cover": self.cover,
        }
        if keep is None or not (isinstance(keep, tuple) or len(layers) > 1):
            return TokenRule(score, _make_budget(keep, bounds), layers, self.proportional)
        bounds["proportional"] = self.proportional
        shape = [self.taper**stage for stage in range(len(layers))]
        return StagedRule(score, scale_stages(keep, shape), layers, **bounds)

    def _compose_neurons(self) -> NeuronRule | None:
        schedule = DenseEnds(
            self.beta, first=self.dense_first, last=self.dense_last, multiple=self.multiple
        )
        ours = {"rho": self.rho, "share": self.rho, "over": self.over}
        score = _resolve(NeuronScore.kind, self.neuron_score, ours)
        if score is None or self.firing is None:
            return None if score is None else NeuronRule(score, schedule, self.compensate)
        return GatedRule(score, schedule, self.compensate, self.firing)


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _make_budget(keep: int | float | None, bounds: dict[str, Any]) -> Budget:
    if keep is None:
        return Knee(**bounds)
    return Ratio(keep, **bounds) if isinstance(keep, float) else Count(keep, **bounds)


def _resolve(kind: str, score: Any, ours: dict[str, Any]) -> Any:
    """A score from its name, given those of our parameters that it knows."""
    if not isinstance(score, str):
        return score
    known = {f.name for f in fields(cast(Any, find(kind, score)))}
    return build(kind, score, **{key: ours[key] for key in ours if key in known})
