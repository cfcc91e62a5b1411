"""SparseVLM, version 1."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from corematching.errors import ConfigError
from corematching.methods.base import BaseMethod
from corematching.methods.staged import StagedRule, make_stages
from corematching.policies.check import check_number, normalize_amount
from corematching.policies.recycling import recycle_dropped
from corematching.policies.token_scores.rater_attention import RaterAttention
from corematching.protocol import PrefillView, TokenChoice

PUBLISHED = (300 / 576, 200 / 576, 110 / 576)
LAYERS = (3 / 32, 7 / 32, 16 / 32)


@dataclass(frozen=True)
class RecyclingRule(StagedRule, name="recycling-rule"):
    """A staged rule after which some of the dropped tokens live on in merged ones.

    At each stage the best ``recycled`` ratio of the tokens dropped there is clustered, and each
    cluster's mean travels on at its centre's index: `recycle_dropped`.
    """

    recycled: float = field(
        default=0.3,
        metadata={"help": "ratio of the dropped tokens that is merged, in [0, 1]; 0: none"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("recycled", self.recycled, least=0)
        if self.recycled > 1:
            raise ConfigError(f"recycled={self.recycled!r}: give a ratio in [0, 1]")

    def choose(self, view: PrefillView) -> TokenChoice:
        """Choose among the image tokens still present, and merge some of the others."""
        choice = super().choose(view)
        if self.recycled == 0:
            return choice
        if view.hidden is None:
            raise ConfigError(f"layer {view.layer} shows no hidden states to merge: set recycled=0")
        dropped = view.image & ~choice.keep
        centres, hidden = recycle_dropped(view.hidden, choice.scores, dropped, self.recycled)
        keep = choice.keep | centres
        cut = torch.where(keep & view.image, choice.scores, torch.inf).amin(1)
        cut = torch.where(choice.cut.isnan(), choice.cut, cut)
        return replace(choice, keep=keep, cut=cut, hidden=hidden)


@dataclass(frozen=True)
class SparseVLM(BaseMethod, name="sparsevlm"):
    """Keep what the question's visual words attend to, less in each stage; all neurons.

    "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    arXiv:2410.04417, version 1. Text tokens that resemble the image in the input embeddings rate
    the image tokens (`RaterAttention`); after the layers 2, 6 and 15 of 32 only 300, 200 and
    110 of 576 are kept, which is its released code's budget "192", the mean over the layers; and
    some of the dropped ones are merged. Positions stay the original ones.
    """

    keep_ratio: float | tuple[float, ...] | None = field(
        default=None,
        metadata={
            "help": "ratio of the image tokens that each stage leaves before merging, or what the "
            "last one leaves, the earlier ones in the published proportions"
        },
    )
    keep_tokens: int | tuple[int, ...] | None = field(
        default=None, metadata={"help": "the same as numbers of tokens, instead"}
    )
    layer: tuple[int | float, ...] = field(
        default=LAYERS,
        metadata={"help": "the stages' layers (int), or ratios of the depth that sees all"},
    )
    recycled: float = field(
        default=0.3, metadata={"help": "ratio of the dropped tokens that is merged; 0: none"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self, PUBLISHED, several=True)
        object.__setattr__(self, "layer", tuple(self.layer))
        super().__post_init__()

    def make_tokens(self) -> RecyclingRule:
        budgets = make_stages(self.keep_ratio, self.keep_tokens, PUBLISHED)
        return RecyclingRule(RaterAttention(), budgets, self.layer, recycled=self.recycled)
