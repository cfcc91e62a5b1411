"""SparseVLM's token score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import ConfigError
from corematching.policies.base import TokenScore
from corematching.policies.features import read_embeddings, read_features
from corematching.policies.tokens import select_question
from corematching.protocol import ATTENTION, EMBEDDINGS, PrefillView


@dataclass
class Raters:
    """The raters of one prompt: (B, M) bool, of each sample's M text tokens."""

    text_mask: Tensor | None = None


@dataclass(frozen=True)
class RaterAttention(TokenScore, name="rater-attention"):
    """The attention that a token gets from the text raters, averaged over heads and raters.

    "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    arXiv:2410.04417, version 1. The raters are chosen once, by `choose_raters`, at the first layer
    that is scored; only their rows of the attention are computed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION, EMBEDDINGS})

    def score(self, view: PrefillView) -> Tensor:
        if view.attention is None:
            raise ConfigError(
                f"layer {view.layer} shows no attention: score after layer 0 or a later one"
            )
        known = view.recall(Raters)
        if known.text_mask is None:
            known.text_mask = _compress(choose_raters(view), view.text)
        raters = _expand(known.text_mask, view.text)
        rows = raters.long().argsort(dim=1, descending=True, stable=True)
        rows = rows[:, : int(raters.sum(1).max())]  # (B, R)
        weights = raters.gather(1, rows) / raters.sum(1, keepdim=True).clamp(min=1)
        attention = view.attention(rows).float().mean(1)  # (B, R, T)
        return torch.einsum("brt,br->bt", attention, weights)


def choose_raters(view: PrefillView) -> Tensor:
    """The question's tokens to which the image tokens are more similar than on average.

    ``r_t = mean_v softmax_t(H_v . H_t)`` over the question's tokens t and the image tokens v, from
    the input embeddings H; raters are those with ``r_t`` above the mean of r. Where none is above,
    the question's tokens all are.

    Returns
    -------
    Tensor
        (B, T) bool.
    """
    question = select_question(view)
    text = read_embeddings(view).masked_fill(~question.unsqueeze(-1), 0)
    similarity = read_features(view) @ text.transpose(1, 2)  # (B, T, T), image by text
    ratios = similarity.masked_fill(~question.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num()
    ratios = ratios.masked_fill(~view.image.unsqueeze(-1), 0)
    totals = view.image.sum(1, keepdim=True).clamp(min=1)
    relevance = ratios.sum(1) / totals  # (B, T)
    mean = relevance.masked_fill(~question, 0).sum(1, keepdim=True)
    raters = question & (relevance > mean / question.sum(1, keepdim=True).clamp(min=1))
    return torch.where(raters.any(1, keepdim=True), raters, question)


def _compress(mask: Tensor, text: Tensor) -> Tensor:
    """(B, T) to (B, M): the mask on each sample's text tokens, which no stage drops or reorders."""
    order = text.long().argsort(dim=1, descending=True, stable=True)
    return (mask & text).gather(1, order[:, : max(1, int(text.sum(1).max()))])


def _expand(compressed: Tensor, text: Tensor) -> Tensor:
    """(B, M) back to the (B, T) tokens that are present now."""
    rank = (text.cumsum(1) - 1).clamp(0, compressed.shape[1] - 1)
    return compressed.gather(1, rank) & text
