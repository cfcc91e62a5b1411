"""Shows a vision tower to policies, in models with one image token per patch."""

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
    """Holds the tensors of one attention layer of a vision tower, and the projector's input.

    Parameters
    ----------
    model : nn.Module
        A vision-language model.
    tower : nn.Module or None
        Its vision tower.
    layer : int
        The layer to observe, counted from the end: -1 is the last.

    Raises
    ------
    UnsupportedModelError
        The model does not have one image token per patch.
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
        self._observer = AttentionObserver(attentions[layer])
        self._features: Tensor | None = None

    def install(self, patches: Patches) -> None:
        """Put hooks on the tower's layer and on the projector."""
        patches.then(self.clear)
        patches.add_pre_hook(self._observer.module, self._observer.arm)
        patches.add_pre_hook(self._projector, self._see_features)

    def disarm(self) -> None:
        """Restore the tower's attention function if the tower has not run."""
        self._observer.disarm()

    def clear(self) -> None:
        """Forget the last images."""
        self._observer.disarm()
        self._observer.query = self._observer.key = self._observer.value = self._features = None

    def show(self, image: Tensor) -> VisionView:
        """The tower's tensors for the images of a batch.

        Parameters
        ----------
        image : Tensor
            (B, T) bool, the image tokens, none of them dropped yet.

        Raises
        ------
        InputError
            The tower has not run for this prompt.
        UnsupportedModelError
            The patches do not match the image tokens.
        """
        observer, features = self._observer, self._features
        if observer.query is None or observer.key is None or features is None:
            raise InputError(
                "the method reads the vision tower, which has not run for this prompt: pass "
                "pixel_values with it"
            )
        images, patches = features.shape[:2]
        classes = observer.key.shape[2] - patches
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
            queries=observer.query[order],
            keys=observer.key[order],
            scaling=observer.options.get("scaling") or observer.query.shape[-1] ** -0.5,
            classes=classes,
            features=features[order],
            project=self._projector.forward,
        )

    def _see_features(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = args[0]


def _list_attentions(tower: nn.Module) -> list[nn.Module]:
    """The attention modules of the tower's layers."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            found = [find_attention(layer) for layer in module]
            if None not in found:
                return [attention for attention in found if attention is not None]
    return []


def _repeat_images(counts: list[int], repeat: int) -> Tensor:
    """Indices of the tower's images in the order of the batch's rows.

    ``counts`` has the number of images per row. generate() runs the tower once for ``repeat``
    consecutive equal rows (beams, several answers).
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
    """An observer of the vision tower if the token policy reads it, else None."""
    if tokens is None or VISION not in tokens.needs:
        return None
    return TowerObserver(model, tower, tokens.vision_layer)
