"""Random policies whose choices a test can foresee, and the reference that obeys them.

What a policy keeps depends on a seed per sample and on the ordinal of an image token or neuron in
its sample, never on the batch: a sample chooses the same alone, in a batch, and after padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corematching.protocol import (
    NeuronChoice,
    NeuronPolicy,
    PrefillView,
    TokenChoice,
    TokenPolicy,
)
from tests.models import FAMILIES, FIRST_TEXT_ID, LAST_TEXT_ID, VOCAB, build, image_mask
from tests.runtime.reference import Reference, continue_greedily, find_down

BANNED = [i for i in range(VOCAB) if not FIRST_TEXT_ID <= i < LAST_TEXT_ID]
STEPS = 4


@dataclass
class RandomTokens(TokenPolicy):
    """Keeps each image token with probability ``share`` at each of ``layers``.

    ``weighed``: what is kept counts for 1 to 4 tokens, and for others after each layer; text too.
    """

    layers: tuple[int, ...]
    seeds: tuple[int, ...]
    share: float = 0.3
    weighed: bool = True
    needs: frozenset[str] = frozenset()
    seen: list[PrefillView] = field(default_factory=list)

    def drop_after(self, num_layers: int) -> tuple[int, ...]:
        return self.layers

    def alive(self, sample: int, images: int, stages: int) -> Tensor:
        """(images,) bool: which image tokens are left after so many stages."""
        rng = torch.Generator().manual_seed(1000 + self.seeds[sample])
        draws = torch.rand(len(self.layers), images, generator=rng)
        return (draws[:stages] < self.share).all(0)

    @property
    def proportional(self) -> bool:
        return self.weighed and self.share <= 1

    def weights(self, sample: int, images: int, stage: int) -> Tensor:
        """(images,): what each image token counts for after a stage."""
        rng = torch.Generator().manual_seed(2000 + self.seeds[sample])
        return 1 + 3 * torch.rand(len(self.layers), images, generator=rng)[stage]

    def choose(self, view: PrefillView) -> TokenChoice:
        self.seen.append(view)
        stage = self.layers.index(view.layer)
        original = view.memory.setdefault("original", view.image.sum(1).tolist())
        device = view.valid.device
        keep, scores = view.text.clone(), torch.full(view.valid.shape, torch.nan, device=device)
        weights = torch.ones(view.valid.shape, device=device)
        for sample, images in enumerate(original):
            before = self.alive(sample, images, stage)
            after = self.alive(sample, images, stage + 1)[before].to(device)
            assert int(view.image[sample].sum()) == len(after), "the view shows other tokens"
            keep[sample, view.image[sample]] = after
            scores[sample, view.image[sample]] = after.float()
            here = self.weights(sample, images, stage)[before.cpu()].to(device)
            weights[sample, view.image[sample]] = here
        cut = torch.full((len(original),), 0.5, device=device)
        return TokenChoice(keep, scores, cut, weights=weights if self.proportional else None)

    def kept_after(self, image: Tensor) -> dict[int, Tensor]:
        """The same choices in the original prompt, (B, T) image mask to layer -> (B, T) keep."""
        kept = {}
        for stage, layer in enumerate(self.layers):
            keep = ~image
            for sample in range(image.shape[0]):
                count = int(image[sample].sum())
                keep[sample, image[sample]] = self.alive(sample, count, stage + 1)
            kept[layer] = keep
        return kept

    def weights_after(self, image: Tensor) -> dict[int, Tensor]:
        """The same weights in the original prompt, layer -> (B, T)."""
        found = {}
        for stage, layer in enumerate(self.layers if self.proportional else ()):
            weights = torch.ones(image.shape)
            for sample in range(image.shape[0]):
                count = int(image[sample].sum())
                weights[sample, image[sample]] = self.weights(sample, count, stage)
            found[layer] = weights
        return found


@dataclass
class RandomNeurons(NeuronPolicy):
    """Keeps a random 40 % of the neurons of every layer but the first."""

    seeds: tuple[int, ...]
    compensated: bool = False
    share: float = 0.4

    def counts(self, num_layers: int, width: int) -> tuple[int, ...]:
        return (width, *[round(self.share * width)] * (num_layers - 1))

    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        assert view.activations is not None
        return self.pick(view.layer, view.activations.shape[-1], count)

    def pick(self, layer: int, width: int, count: int) -> NeuronChoice:
        indices, means = [], []
        for seed in self.seeds:
            rng = torch.Generator().manual_seed(100 * seed + layer)
            chosen = torch.randperm(width, generator=rng)[:count].sort().values
            indices.append(chosen)
            means.append(torch.randn(width, generator=rng).index_fill(0, chosen, 0.0))
        return NeuronChoice(torch.stack(indices), torch.stack(means) if self.compensated else None)

    def masks(self, model: Any) -> list[tuple[Tensor, Tensor | None]]:
        """Per layer: (B, F) kept neurons and what stands for the others."""
        layers = model.get_decoder().layers
        width = find_down(layers[0]).in_features
        masks = []
        for layer, count in enumerate(self.counts(len(layers), width)):
            choice = self.pick(layer, width, count)
            keep = torch.zeros(len(self.seeds), width, dtype=torch.bool)
            masks.append((keep.scatter(1, choice.indices, True), choice.mean))
        return masks


@dataclass
class TestMethod:
    """A method as `attach` takes it."""

    __test__ = False

    tokens: Any = None
    neurons: Any = None

    def to_dict(self) -> dict[str, Any]:
        return {"name": "test"}


def generate(
    model: Any, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any
) -> Reference:
    """Greedy tokens and raw logits of ``model.generate``."""
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=BANNED,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return Reference(out.sequences[:, -steps:], torch.stack(out.logits, 1))


def reference(
    name: str,
    inputs: dict[str, Tensor],
    method: TestMethod,
    steps: int = STEPS,
    given: Tensor | None = None,
    before_first_layer: Callable | None = None,
) -> Reference:
    """What ``method`` must give, from the dense model with eager attention."""
    model = build(name, "eager")
    if before_first_layer is not None:
        first = model.get_decoder().layers[0]
        first.register_forward_pre_hook(before_first_layer, with_kwargs=True)
    tokens, neurons = method.tokens, method.neurons
    image = image_mask(name, inputs) if tokens else None
    return continue_greedily(
        model,
        inputs,
        steps,
        kept_after=tokens.kept_after(image) if tokens else None,
        weights_after=tokens.weights_after(image) if tokens else None,
        neurons=neurons.masks(model) if neurons else None,
        new_token_type=1 - FAMILIES[name].image_type,
        banned=BANNED,
        given=given,
    )


def assert_same(ours: Reference, theirs: Reference, tolerance: float = 1e-4) -> None:
    """The same tokens, and logits within ``tolerance``."""
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=tolerance)
    assert torch.equal(ours.tokens, theirs.tokens)
