"""Everything that a method installs on one model, below its top module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from corematching.backends.select import choose_backend
from corematching.backends.sparse_ffn import SparseFFN, no_gate
from corematching.backends.traffic import WeightTraffic
from corematching.errors import UnsupportedModelError
from corematching.model.patching import Patches
from corematching.model.snapshot import ModuleSnapshot
from corematching.model.spec import ModelSpec, check_model, choose_counts
from corematching.offload.offload import Offload
from corematching.protocol import Method
from corematching.runtime.held_choices import HeldChoices
from corematching.runtime.prefill.tower import find_tower
from corematching.runtime.prefill.vision import VisionMeter
from corematching.runtime.token_count_bias import TokenCountBias


class Installation:
    """A model's parts and the patches of one method on them.

    Parameters
    ----------
    model : nn.Module
        The model.
    method : Method
        The method.
    engine : str
        ``auto``, ``torch`` or ``native``.
    offload : Offload or None
        Keeps FFN weights outside fast memory; their layers decode in PyTorch.

    Attributes
    ----------
    parts : ModelSpec
        The model's parts.
    sparse : dict
        The layers' sparse FFNs, by layer.
    counts : list of int
        Neurons of a decode step in each layer.
    choices : HeldChoices
        The neuron choices that the sparse FFNs hold.
    backend : Backend
        Runs prompts and decode steps.
    traffic : WeightTraffic
        Counts the weight bytes of decode steps.
    vision : VisionMeter
        Times the vision tower.
    tower : TowerObserver or None
        Observes the vision tower for token policies that read it.

    Raises
    ------
    UnsupportedModelError
        The method cannot run on this model.
    """

    def __init__(
        self, model: nn.Module, method: Method, engine: str, offload: Offload | None
    ) -> None:
        self.offload = offload
        self.parts: ModelSpec = check_model(model, method)
        counts = choose_counts(self.parts, method.neurons)
        per_token = method.neurons is not None and method.neurons.per_token
        chosen = {i: n for i, n in enumerate(counts) if n < self.parts.widths[i] or per_token}
        in_place = engine != "torch"
        self.sparse: dict[int, SparseFFN] = (
            {i: SparseFFN(self.parts.ffns[i], n, in_place) for i, n in chosen.items()}
            if offload is None
            else offload.make_ffns(self.parts, chosen)
        )
        if method.neurons is not None and method.neurons.gate_thresholds:
            for ffn in self.sparse.values():
                if not ffn.parts.gated:
                    raise UnsupportedModelError(no_gate(ffn.mlp))
        self.choices = HeldChoices(self.sparse)
        ratio = method.neurons.decode_ratio if method.neurons else 1.0
        self.counts = [max(1, round(ratio * count)) for count in counts]
        self.backend = choose_backend(model, self.parts, self.sparse, engine)
        self.traffic = WeightTraffic(self.backend)
        self.vision = VisionMeter(self.parts.vision, self.device)
        self.tower = find_tower(model, self.parts.vision, method.tokens)
        self._bias = TokenCountBias(self.parts, method.tokens)
        self._patches = Patches()
        self._snapshot: ModuleSnapshot | None = None

    @property
    def device(self) -> torch.device:
        """The device of the first layer."""
        return next(self.parts.layers[0].parameters()).device

    def install(self, model: nn.Module) -> None:
        """Patch the model's modules; `remove` also undoes a partial installation."""
        patches = self._patches
        self.vision.install(patches)
        if self.tower is not None:
            self.tower.install(patches)
        if self.offload is not None:
            patches.then(self.offload.remove)
            self.offload.install()
        for ffn in self.sparse.values():
            patches.then(ffn.remove)
            ffn.install()
        self.backend.install(patches)
        self._bias.install(patches)
        self._snapshot = ModuleSnapshot(model)

    def remove(self) -> None:
        """Undo every patch; may be called repeatedly."""
        self._patches.undo()
        self._snapshot = None

    @property
    def fits(self) -> bool:
        """Whether the model still has the modules and forwards of the installation."""
        return self._snapshot is not None and self._snapshot.unchanged()

    def disarm(self) -> None:
        """Stop observing the vision tower after a forward."""
        if self.tower is not None:
            self.tower.disarm()

    def forget_images(self) -> None:
        """Release the vision tower's tensors after a prompt."""
        if self.tower is not None:
            self.tower.clear()

    def gather_neurons(self, cache: Any) -> None:
        """Gather the chosen neurons' weights before the first decode step.

        Not earlier: the first token does not wait for it, and an answer of one token never pays
        for it.
        """
        self.choices.gather(cache)

    def follow(self, cache: Any, batch: int) -> None:
        """Give the FFNs the neuron choices of a cache, before ``batch`` rows continue from it.

        Raises
        ------
        InputError
            The cache belongs to other prompts, to another number of them, or to another method.
        """
        if self.choices.follow(cache, batch):
            self.backend.refresh()
