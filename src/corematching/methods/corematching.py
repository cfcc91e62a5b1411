"""CoreMatching: core tokens in the prefill and the KV cache, core neurons in the decode."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from corematching.errors import ConfigError
from corematching.methods.base import BaseMethod
from corematching.methods.gate_threshold import GateThreshold
from corematching.methods.sparsifier import TokenRule, check_type
from corematching.methods.staged import StagedRule, make_rule
from corematching.methods.top_neurons import TopNeurons
from corematching.policies.base import TokenScore
from corematching.policies.budgets import Budget, Count, Ratio
from corematching.policies.check import check_bool, check_depth, check_ratio, normalize_amount
from corematching.policies.component import read_nested
from corematching.policies.token_scores import TextOverlap
from corematching.protocol import NeuronPolicy
from corematching.sizes import parse_size

if TYPE_CHECKING:
    from corematching.methods.paper import Paper

ONE_CUT = 0.4
"""The default layer after which image tokens are dropped, as a ratio of the depth."""
STAGES = (9 / 32, 17 / 32, 25 / 32)
"""The layers instead, in stages, if a smaller ratio than `FEW` is kept."""
FEW = 0.2
KEEP_RATIO, COVER, TAPER = 0.3, 0.9, 0.5


@dataclass(frozen=True)
class CoreMatching(BaseMethod, name="corematching"):
    """Co-adaptive sparse inference: core tokens and core neurons (arXiv:2505.19235).

    The defaults are ours and differ from the paper where measurements say so: image tokens are
    matched against the neurons that the question activates, each weighted by how few image tokens
    activate it, not against the sentence's most frequent ones (on pictures with much background
    those are the background's); nine in ten of the kept ones lie evenly over the picture, for what
    no score can see, and each counts in attention for the dropped ones most like it. Neurons are
    chosen for each decoded token, by its gate against a threshold from the prompt
    (`GateThreshold`), since on long answers any choice for the whole of them (`TopNeurons`) costs
    more. `paper` gives the published rule.

    Parameters
    ----------
    memory : str or int, optional
        The most that the model may take of its device's memory, such as ``"12GiB"``. It changes
        where weights are kept and no result, so it is no parameter of the method. The others are
        described at their fields.

    Raises
    ------
    ConfigError
        A parameter is out of range or has no effect, or a score's name is unknown.

    Examples
    --------
    >>> CoreMatching(keep_tokens=64, neurons=TopNeurons(0.4, dense_first=2))  # doctest: +SKIP
    """

    keep_ratio: float | tuple[float, ...] | None = field(
        default=None,
        metadata={
            "help": f"ratio of the image tokens kept, in (0, 1]; default: {KEEP_RATIO}; with "
            "several layers what the last one leaves, or one ratio for each (a tuple)"
        },
    )
    keep_tokens: int | tuple[int, ...] | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead of keep_ratio"}
    )
    layer: int | float | tuple[int | float, ...] | None = field(
        default=None,
        metadata={
            "help": "drop image tokens after this decoder layer (int, from 0), or once this ratio "
            "of the layers (float) has seen them all; several, from the first to the last: a "
            f"tuple; None: {ONE_CUT}, or in three stages where less than {FEW:.0%} are kept"
        },
    )
    neurons: NeuronPolicy | None = field(
        default=GateThreshold(),
        metadata={
            "help": "neurons that decoding computes: GateThreshold (for each token), TopNeurons "
            "(for the whole answer), another rule, or None for all",
            "kind": "neuron policy",
        },
    )
    score: TokenScore | str | None = field(
        default=TextOverlap(),
        metadata={"help": "image tokens are ranked by this; None keeps all", "kind": "token score"},
    )
    budget: Budget | tuple[Budget, ...] | str | None = field(
        default=None,
        metadata={
            "help": "what decides how many image tokens are kept, such as Knee(), instead of "
            "keep_ratio",
            "kind": "budget",
        },
    )
    cover: float | None = field(
        default=None,
        metadata={
            "help": "ratio of the kept tokens spread evenly over the picture, in [0, 1); default: "
            f"{COVER}; a budget has its own"
        },
    )
    taper: float | None = field(
        default=None,
        metadata={
            "help": "with several layers and one amount to keep: the ratio that each layer leaves "
            f"of what the one before left, in (0, 1]; default: {TAPER}"
        },
    )
    proportional: bool | None = field(
        default=None,
        metadata={
            "help": "attention to a kept token counts for the dropped ones most like it too; "
            "default: True; attention implementations that cannot add to scores leave it out"
        },
    )
    memory: InitVar[str | int | None] = None

    def __post_init__(self, memory: str | int | None) -> None:
        if memory is not None:
            parse_size("memory", memory)
        object.__setattr__(self, "memory", memory)
        for name, value in (
            ("neurons", read_nested("neuron policy", self.neurons)),
            ("score", read_nested(TokenScore.kind, self.score)),
            ("budget", read_nested(Budget.kind, self.budget)),
            ("layer", tuple(self.layer) if isinstance(self.layer, list) else self.layer),
        ):
            object.__setattr__(self, name, value)
        if self.neurons is not None:
            check_type("neurons", self.neurons, NeuronPolicy)
        self._normalize_tokens()
        self._policies()

    @classmethod
    def paper(cls, **changes: Any) -> Paper:
        """The published rule with the published parameters: `Paper`.

        Parameters
        ----------
        **changes
            Parameters of `Paper` that differ from the published ones.
        """
        from corematching.methods.paper import Paper

        return Paper(**changes)

    @property
    def layers(self) -> tuple[int | float, ...]:
        """The layers after which image tokens go, as `layer` has them."""
        if self.layer is not None:
            return self.layer if isinstance(self.layer, tuple) else (self.layer,)
        few = isinstance(self.keep_ratio, float) and self.keep_ratio < FEW
        return STAGES if few else (ONE_CUT,)

    def make_tokens(self) -> TokenRule | StagedRule | None:
        """The rule for image tokens; None without a score.

        Raises
        ------
        ConfigError
            A budget for one layer is given for several.
        """
        if self.score is None:
            return None
        score, proportional = cast(TokenScore, self.score), bool(self.proportional)
        budget = cast("Budget | tuple[Any, ...] | None", self.budget)
        if isinstance(budget, tuple):
            return StagedRule(score, budget, self.layers, proportional)
        if isinstance(budget, Ratio | Count) and len(self.layers) > 1:
            raise ConfigError(
                f"budget={budget!r} is for one layer: give keep_ratio or keep_tokens, or a tuple "
                "with a budget for each layer"
            )
        if budget is not None:
            return TokenRule(score, budget, self.layers, proportional)
        taper, cover = self.taper or TAPER, cast(float, self.cover)
        amount = self.keep_ratio, self.keep_tokens
        return make_rule(score, self.layers, *amount, taper, proportional, cover)

    def make_neurons(self) -> NeuronPolicy | None:
        """The rule for neurons, as given."""
        return self.neurons

    def _normalize_tokens(self) -> None:
        """Fill in defaults; parameters without an effect are refused."""
        if self.score is None:
            names = ("keep_ratio", "keep_tokens", "budget", "layer")
            self._forbid((*names, "cover", "taper", "proportional"), "score=None keeps all tokens")
            return
        check_type("score", self.score, TokenScore)
        if self.budget is not None:
            why = "budget says how many tokens are kept"
            self._forbid(("keep_ratio", "keep_tokens"), why)
            self._forbid(("cover", "taper"), f"{why}; cover is a parameter of the budget")
        normalize_amount(self, None if self.budget else KEEP_RATIO, several=True)
        for name, default in (("cover", None if self.budget else COVER), ("proportional", True)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_bool("proportional", self.proportional)
        for layer in self.layers:
            check_depth("layer", layer, least=-1)
        if self.taper is not None:
            check_ratio("taper", self.taper)
            one = len(self.layers) == 1 or isinstance(self.keep_ratio or self.keep_tokens, tuple)
            if one:
                why = "taper is for several layers and one amount, such as layer=(0.1, 0.3, 0.5)"
                self._forbid(("taper",), why)

    def _forbid(self, names: tuple[str, ...], why: str) -> None:
        """Raise ConfigError for set parameters without an effect."""
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise ConfigError(f"{why}: leave out {', '.join(given)}")

    @classmethod
    def at_neuron_ratio(cls, params: Any, ratio: float) -> dict[str, Any] | None:
        """Parameters with the ratio of `TopNeurons` set, alone or under a `GateThreshold`."""
        if "neurons" not in params:
            return {**params, "neurons": {"name": TopNeurons.name, "ratio": ratio}}
        filled = _fill_ratio(params["neurons"], ratio)
        return None if filled is None else {**params, "neurons": filled}


def _fill_ratio(neurons: Any, ratio: float) -> dict[str, Any] | None:
    """A described neuron rule with the ratio of its `TopNeurons` set, where that is open."""
    rule = {"name": neurons} if isinstance(neurons, str) else neurons
    if not isinstance(rule, dict):
        return None
    if rule["name"] == TopNeurons.name and "ratio" not in rule:
        return {**rule, "ratio": ratio}
    among = _fill_ratio(rule.get("among"), ratio)
    return None if among is None else {**rule, "among": among}
