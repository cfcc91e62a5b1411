"""Token policies that choose and merge by what the vision tower computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from corematching.errors import ConfigError
from corematching.methods.sparsifier import TokenDropper
from corematching.policies.check import normalize_amount
from corematching.protocol import VISION, PrefillView, TokenChoice, VisionView


@dataclass(frozen=True)
class VisionRule(TokenDropper):
    """Choose among each image's patches in front of layer 0. Override `merge`.

    Merged features pass the model's projector again, as if the vision tower had given them. Only
    models in which one image token is one patch can show what is needed.
    """

    keep_ratio: float | None = field(
        default=None, metadata={"help": "ratio of each image's patches that is kept"}
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of patches kept of each image, instead"}
    )
    vision_layer: int = field(
        default=-1, metadata={"help": "layer of the tower that is read: -1 is the last"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self)
        if not isinstance(self.vision_layer, int) or self.vision_layer >= 0:
            raise ConfigError(
                f"vision_layer={self.vision_layer!r}: give a negative whole number, -1 is the last"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the choice reads."""
        return frozenset({VISION})

    def drop_after(self, num_layers: int) -> tuple[int, ...]:
        """The input of layer 0."""
        return (-1,)

    def merge(self, vision: VisionView) -> tuple[Tensor, Tensor, Tensor]:
        """Choose among I images of N patches each.

        Returns
        -------
        tuple of Tensor
            (I, N) bool, the patches kept; (I, N, c), features, merged where patches were; (I, N),
            the scores that were chosen by.
        """
        raise NotImplementedError

    def choose(self, view: PrefillView) -> TokenChoice:
        """Choose among the image tokens, and write the merged features to their indices."""
        if view.vision is None or view.hidden is None:
            raise ConfigError(
                f"layer {view.layer} shows no vision tower: name 'vision' in the policy's needs, "
                "and drop before layer 0"
            )
        vision, device = view.vision, view.hidden.device
        picked, features, values = self.merge(vision)
        keep = torch.zeros_like(view.image)
        keep[view.image] = picked.flatten().to(device)
        scores = torch.full(keep.shape, torch.nan, device=device)
        scores[view.image] = values.float().flatten().to(device)
        cut = torch.where(keep, scores, torch.inf).amin(1)
        cut = torch.where(keep.any(1), cut, torch.nan)
        merged = picked & (features != vision.features).any(-1)  # (I, N)
        hidden = view.hidden.clone()
        merged_tokens = torch.zeros_like(view.image)
        merged_tokens[view.image] = merged.flatten().to(device)
        hidden[merged_tokens] = vision.project(features[merged]).to(hidden)
        return TokenChoice(keep=keep | view.text, scores=scores, cut=cut, hidden=hidden)
