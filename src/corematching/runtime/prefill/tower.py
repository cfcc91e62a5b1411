"""Shows policies what a vision tower computed, where its patches are the image tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from corematching.errors import ConfigError, InputError, UnsupportedModelError
from corematching.model.attention import find_attention
from corematching.model.patching import Patches
from corematching.protocol import VISION, TokenPolicy, VisionView
from corematching.runtime.prefill.view import AttentionObserver

ONE_TOKEN_PER_PATCH = ("llava", "paligemma")
PLAIN_TOWERS = ("clip_vision_model", "siglip_vision_model")


class TowerObserver:
    """Holds what one attention layer of a vision tower computed, and what entered the projector.

    Parameters
    ----------
    model : nn.Module
        A vision-language model.
    tower : nn.Module or None
        Its vision tower.
    layer : int
        The layer whose attention is shown, counted from the end: -1 is the last.

    Raises
    ------
    UnsupportedModelError
        The model's image tokens are not the patches of its tower, one for one.
    ConfigError
        The tower has no such layer.
    """

    def __init__(self, model: Any, tower: nn.Module | None, layer: int) -> None:
        self._projector: Any = getattr(model.base_model, "multi_modal_projector", None)
        kind, inner = model.config.model_type, getattr(model.config, "vision_config", None)
        plain = getattr(inner, "model_type", None) in PLAIN_TOWERS
        if tower is None or self._projector is None or kind not in ONE_TOKEN_PER_PATCH or not plain:
            raise UnsupportedModelError(
                f"{type(model).__name__} (model_type '{kind}') does not turn each patch of its "
                "vision tower into one image token, so the tower's attention says nothing about "
                "single tokens: use such a model (LLaVA-1.5), or a method that reads the decoder"
            )
        attentions = _list_attentions(tower)
        if not -len(attentions) <= layer < 0:
            raise ConfigError(
                f"vision_layer={layer}: the vision tower has {len(attentions)} attention layers, "
                f"give one from {-len(attentions)} to -1"
            )
        self._probe = AttentionObserver(attentions[layer])
        self._features: Tensor | None = None

    def install(self, patches: Patches) -> None:
        """Put hooks on the tower's layer and on the projector."""
        patches.then(self.clear)
        patches.add_pre_hook(self._probe.module, self._probe.arm)
        patches.add_pre_hook(self._projector, self._see_features)

    def disarm(self) -> None:
        """Give the tower's attention its own function back, where it was not reached."""
        self._probe.disarm()

    def clear(self) -> None:
        """Forget the last images."""
        self._probe.disarm()
        self._probe.query = self._probe.key = self._probe.value = self._features = None

    def show(self, image: Tensor) -> VisionView:
        """What the tower computed for the images of a batch.

        Parameters
        ----------
        image : Tensor
            (B, T) bool, the image tokens, none of them dropped yet.

        Raises
        ------
        InputError
            The tower has not run for this prompt.
        UnsupportedModelError
            What it computed does not fit the image tokens.
        """
        probe, features = self._probe, self._features
        if probe.query is None or probe.key is None or features is None:
            raise InputError(
                "the method reads the vision tower, which has not run for this prompt: pass "
                "pixel_values with it"
            )
        images, patches = features.shape[:2]
        classes = probe.key.shape[2] - patches
        counts = image.sum(1)  # (B,)
        total, seen = int(counts.sum()), images * patches
        if classes not in (0, 1) or total % seen or bool((counts % patches).any()):
            raise UnsupportedModelError(
                f"{total} image tokens for {images} images of {patches} patches and {classes} "
                "other tokens in the vision tower: a method that reads the tower needs one image "
                "token for each patch"
            )
        order = _repeat_images((counts // patches).tolist(), total // seen).to(features.device)
        return VisionView(
            queries=probe.query[order],
            keys=probe.key[order],
            scaling=probe.options.get("scaling") or probe.query.shape[-1] ** -0.5,
            classes=classes,
            features=features[order],
            project=self._projector.forward,
        )

    def _see_features(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = args[0]


def _list_attentions(tower: nn.Module) -> list[nn.Module]:
    """The attention of each of the tower's layers."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            found = [find_attention(layer) for layer in module]
            if None not in found:
                return [attention for attention in found if attention is not None]
    return []


def _repeat_images(counts: list[int], repeat: int) -> Tensor:
    """Which image each row of a batch shows, one after the other.

    ``counts`` has the images of every row; generate() runs the tower once for the ``repeat`` equal
    rows (beams, several answers) that follow each other.
    """
    order: list[int] = []
    start = 0
    for first in range(0, len(counts), repeat):
        own = list(range(start, start + counts[first]))
        order += own * repeat
        start += len(own)
    return torch.tensor(order, dtype=torch.long)


def find_tower(
    model: Any, tower: nn.Module | None, tokens: TokenPolicy | None
) -> TowerObserver | None:
    """A probe on the vision tower where the token policy reads it."""
    if tokens is None or VISION not in tokens.needs:
        return None
    return TowerObserver(model, tower, tokens.vision_layer)
