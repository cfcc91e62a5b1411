"""What a run chose, put together again to the batch that a policy chose for."""

from __future__ import annotations

import torch

from corematching.protocol import NeuronChoice
from corematching.runtime import Run


def neurons_of(run: Run) -> dict[int, NeuronChoice]:
    """The last run's choices of neurons, by layer; dense layers are not in it."""
    samples = run.choices
    found = {}
    for index, layers in enumerate(zip(*(sample.neurons for sample in samples), strict=True)):
        if all(layer is None for layer in layers):
            continue
        parts = {name: [vars(layer)[name] for layer in layers] for name in vars(layers[0])}
        found[index] = NeuronChoice(**{name: _stack(part) for name, part in parts.items()})
    return found


def _stack(parts: list[torch.Tensor | float | None]) -> torch.Tensor | None:
    if all(part is None for part in parts):
        return None
    return torch.stack([torch.as_tensor(part) for part in parts])
