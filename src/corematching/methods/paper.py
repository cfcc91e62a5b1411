"""CoreMatching's published rule."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import NeuronRule, TokenRule
from corematching.methods.staged import StagedRule, make_rule
from corematching.policies.budgets import Knee
from corematching.policies.check import check_ratio, normalize_amount
from corematching.policies.neuron_scores import PaperScore
from corematching.policies.schedules import DenseEnds
from corematching.policies.token_scores import CoreOverlap

TAPER = 0.5


@dataclass(frozen=True)
class Paper(BaseMethod, name="paper"):
    """The published rule of CoreMatching (arXiv:2505.19235) with the published parameters.

    - ``top_ratio=0.2`` (rho) and ``neuron_ratio=0.4`` (beta), neurons ranked by ``f_rho(n; s)``:
      CoreInfer (arXiv:2410.18311) and its code, from which CoreMatching takes the core neurons.
    - Layers 6 to 26 of 32 thinned out, the others dense, as a ratio of other depths: CoreInfer's
      code.
    - Image tokens ranked by ``|Gamma(x) & C_rho^beta(s)|``, cut at the maximum geometric distance,
      the `Knee`: CoreMatching; that the token at the knee is dropped: its authors' code.
    - Dropped once, after layer 5 of 32: our reading; the method's formulas name no layer, and the
      authors' code scores from layer 5 on.
    - No compensation, no rounding to a multiple: neither paper has any.

    Where the papers are silent, a straight curve of scores keeps every token, and equal frequencies
    go by the neuron's index.
    """

    keep_ratio: float | tuple[float, ...] | None = field(
        default=None,
        metadata={
            "help": "ratio of the image tokens kept, in (0, 1]; published: none, the knee decides; "
            "with several layers what the last one leaves, half of the one before, or a tuple"
        },
    )
    keep_tokens: int | tuple[int, ...] | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead of keep_ratio"}
    )
    layer: int | float | tuple[int | float, ...] = field(
        default=6 / 32,
        metadata={"help": "image tokens go after this layer (int) or ratio of the depth (float)"},
    )
    top_ratio: float = field(
        default=0.2,
        metadata={"help": "rho: ratio of a token's positive neurons that it votes for, in (0, 1]"},
    )
    neuron_ratio: float = field(
        default=0.4, metadata={"help": "beta: ratio of the neurons that are core, in (0, 1]"}
    )
    dense_first: int | float = field(
        default=6 / 32,
        metadata={"help": "first layers that keep all neurons: int or ratio of depth"},
    )
    dense_last: int | float = field(
        default=5 / 32,
        metadata={"help": "last layers that keep all neurons: int or ratio of depth"},
    )

    def __post_init__(self) -> None:
        check_ratio("top_ratio", self.top_ratio)
        check_ratio("neuron_ratio", self.neuron_ratio)
        if isinstance(self.layer, list):
            object.__setattr__(self, "layer", tuple(self.layer))
        normalize_amount(self, several=True)
        super().__post_init__()

    def make_tokens(self) -> TokenRule | StagedRule:
        score = CoreOverlap(self.top_ratio, self.neuron_ratio)
        layers = self.layer if isinstance(self.layer, tuple) else (self.layer,)
        if self.keep_ratio is None and self.keep_tokens is None:
            return TokenRule(score, Knee(), layers)
        return make_rule(score, layers, self.keep_ratio, self.keep_tokens, TAPER, False)

    def make_neurons(self) -> NeuronRule:
        schedule = DenseEnds(
            self.neuron_ratio, first=self.dense_first, last=self.dense_last, multiple=1
        )
        return NeuronRule(PaperScore(self.top_ratio), schedule)
