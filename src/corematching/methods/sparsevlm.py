"""SparseVLM, version 1."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from corematching.errors import ConfigError
from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier
from corematching.methods.staged import StagedRule, scale_stages
from corematching.policy.check import check_number
from corematching.policy.recycling import recycle_dropped
from corematching.policy.token_scores.rater_attention import RaterAttention
from corematching.protocol import PrefillView, TokenChoice

PUBLISHED = (300 / 576, 200 / 576, 110 / 576)
LAYERS = (3 / 32, 7 / 32, 16 / 32)


@dataclass(frozen=True)
class RecyclingRule(StagedRule, name="recycling-rule"):
    """A staged rule after which some of the dropped tokens live on in merged ones.

    At each stage the best ``recycled`` share of the tokens dropped there is clustered, and each
    cluster's mean travels on in its centre's place: `recycle_dropped`.
    """

    recycled: float = field(
        default=0.3,
        metadata={"help": "share of the dropped tokens that is merged, in [0, 1]; 0: none"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("recycled", self.recycled, least=0)
        if self.recycled > 1:
            raise ConfigError(f"recycled={self.recycled!r}: give a share in [0, 1]")

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


@register_method("sparsevlm", budgets=("keep",))
def sparsevlm(
    keep: tuple[int | float, ...] | int | float = PUBLISHED,
    layer: tuple[int | float, ...] = LAYERS,
    recycled: float = 0.3,
) -> Sparsifier:
    """Keep what the question's visual words attend to, less in each stage; all neurons.

    "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    arXiv:2410.04417, version 1. Text tokens that resemble the image in the input embeddings rate
    the image tokens (`RaterAttention`); after the layers 2, 6 and 15 of 32 only 300, 200 and
    110 of 576 are kept, which is its released code's budget "192", the mean over the layers; and
    some of the dropped ones are merged. Positions stay the original ones.

    Parameters
    ----------
    keep : tuple, int or float
        Image tokens left by each stage before the merged ones, shares (float) or counts (int) of
        those at the start. One amount is what the last stage leaves, and the earlier ones
        leave more in the published proportions.
    layer : tuple
        The stages' layers, as shares of the depth that still sees every token, or layer indices.
    recycled : float
        Share of the dropped tokens that is merged; 0 merges none.
    """
    amounts = scale_stages(keep, PUBLISHED)
    rule = RecyclingRule(RaterAttention(), amounts, tuple(layer), recycled=recycled)
    return Sparsifier(tokens=rule)
