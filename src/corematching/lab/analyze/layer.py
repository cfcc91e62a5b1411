"""One decoder layer's scores, core tokens and core neurons for a picture and a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corematching.lab.analyze.rank import correlate_ranks
from corematching.lab.analyze.rules import Rule
from corematching.policies import Knee
from corematching.policies.activated import activate_by_sign, activate_top_positive
from corematching.policies.core import count_activations, pick_core_neurons
from corematching.protocol import PrefillView

CRITERIA = ("attention", "cosine", "product")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """The image tokens as one rule scores them; N of them, in the prompt's order.

    Attributes
    ----------
    scores : ndarray
        (N,).
    kept : ndarray
        (N,) bool, the tokens above the knee of the sorted scores.
    budgeted : int
        How many the rule's own budget keeps.
    correlations : dict
        Spearman's rank correlation with each of `CRITERIA`; None where there is no order.
    """

    scores: Floats
    kept: NDArray[np.bool_]
    budgeted: int
    correlations: dict[str, float | None]

    @property
    def ratio(self) -> float:
        """Ratio of the image tokens above the knee."""
        return float(self.kept.mean())


@dataclass(frozen=True)
class Neurons:
    """The layer's neurons under the published definitions.

    Attributes
    ----------
    width : int
        F, all of them.
    core : int
        ``|C(s)|``, the sentence's core neurons.
    ever : int
        Neurons in the token-wise set of at least one token.
    activated : dict
        Mean of ``|Gamma(x)|`` over the tokens, by "image" and "text".
    inside : dict
        Mean ratio of a token's own core neurons that are the sentence's, by "image" and "text".
    shared : float
        Ratio of the core neurons of the image tokens that are also those of the text tokens.
    """

    width: int
    core: int
    ever: int
    activated: dict[str, float]
    inside: dict[str, float]
    shared: float


@dataclass(frozen=True)
class LayerFindings:
    """One layer.

    Attributes
    ----------
    layer : int
    influence : dict
        (N,) each, the `CRITERIA`: what the image tokens contribute to the last token's attention.
    rules : dict
        `Scored` by the rule's name.
    neurons : Neurons
    """

    layer: int
    influence: dict[str, Floats]
    rules: dict[str, Scored]
    neurons: Neurons

    def to_dict(self) -> dict[str, Any]:
        """The figures without the scores of single tokens, JSON-able."""
        rules = {
            name: {
                "image_tokens": len(scored.scores),
                "above_knee": int(scored.kept.sum()),
                "knee_share": scored.ratio,
                "budget_keeps": scored.budgeted,
                "rank_correlations": scored.correlations,
            }
            for name, scored in self.rules.items()
        }
        return {"layer": self.layer, "rules": rules, "neurons": vars(self.neurons)}


def examine_layer(view: PrefillView, rules: Sequence[Rule]) -> LayerFindings:
    """Measure a layer of a batch of one.

    Parameters
    ----------
    view : PrefillView
        With activations, attention and contributions.
    rules : sequence of Rule
    """
    influence = measure_influence(view)
    return LayerFindings(
        layer=view.layer,
        influence=influence,
        rules={rule.name: score_tokens(view, rule, influence) for rule in rules},
        neurons=count_neurons(view),
    )


def measure_influence(view: PrefillView) -> dict[str, Floats]:
    """The contribution of each image token to the last token's attention output.

    With ``c_j = sum_h A_h[last, j] W_O,h V_h,j`` and ``o = sum_j c_j`` over all tokens:
    ``attention`` is the mean of ``A_h[last, j]`` over the heads, ``cosine`` the one between ``c_j``
    and ``o``, and ``product`` the product of the two, the projection-guided criterion of
    CoreMatching (arXiv:2505.19235).

    Returns
    -------
    dict
        `CRITERIA`, (N,) each, for the batch's first sample.
    """
    assert view.attention is not None and view.contributions is not None
    rows = view.attention(view.last.unsqueeze(1))  # (B, H, 1, T)
    attention = rows[0, :, 0].float().mean(0)  # (T,)
    terms = view.contributions()[0].float().masked_fill(~view.valid[0].unsqueeze(-1), 0)  # (T, d)
    cosine = torch.nn.functional.cosine_similarity(terms, terms.sum(0, keepdim=True), dim=-1)
    of_image = view.image[0]
    values = {"attention": attention, "cosine": cosine, "product": attention * cosine}
    return {name: _to_numpy(value[of_image]) for name, value in values.items()}


def score_tokens(view: PrefillView, rule: Rule, influence: dict[str, Floats]) -> Scored:
    """Score the image tokens by a rule, cut at the knee, and compare with their influence."""
    scores = rule.token_score(view)
    of_image = view.image[0]
    values = _to_numpy(scores[0, of_image])
    return Scored(
        scores=values,
        kept=Knee()(scores, view.image)[0, of_image].cpu().numpy(),
        budgeted=int(rule.budget(scores, view.image)[0].sum()),
        correlations={name: correlate_ranks(values, influence[name]) for name in CRITERIA},
    )


def count_neurons(view: PrefillView, rho: float = 0.2, beta: float = 0.4) -> Neurons:
    """Count the layer's activated and core neurons, by the published definitions and parameters."""
    activations = view.activations
    assert activations is not None
    own = activate_top_positive(activations, rho)  # (B, T, F)
    core = _as_mask(pick_core_neurons(activations, view.valid, rho, beta), own)
    groups = {"image": view.image[0], "text": view.text[0]}
    inside = (own & core).sum(-1) / own.sum(-1).clamp(min=1)  # (B, T)
    activated = activate_by_sign(activations).sum(-1).float()
    by_group = [pick_core_neurons(activations, g[None], rho, beta) for g in groups.values()]
    of_image, of_text = (_as_mask(indices, own) for indices in by_group)
    return Neurons(
        width=activations.shape[-1],
        core=int(core.sum()),
        ever=int((count_activations(own, view.valid) > 0).sum()),
        activated={name: float(activated[0, group].mean()) for name, group in groups.items()},
        inside={name: float(inside[0, group].float().mean()) for name, group in groups.items()},
        shared=float((of_image & of_text).sum() / of_image.sum()),
    )


def _as_mask(indices: Tensor, like: Tensor) -> Tensor:
    """(B, K) indices to a (B, 1, F) mask."""
    mask = torch.zeros_like(like[:, 0]).scatter(1, indices, True)
    return mask.unsqueeze(1)


def _to_numpy(values: Tensor) -> Floats:
    return values.double().cpu().numpy()
