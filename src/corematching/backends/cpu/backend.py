"""The CPU backend: prompts and decode steps in compiled code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from corematching.backends.base import Backend, BackendStats
from corematching.backends.cpu.decode import NativeSteps
from corematching.backends.cpu.head import NativeHead
from corematching.backends.cpu.native import INSTALL_HINT, find_kernels, leave_file
from corematching.backends.cpu.prefill import NativePrompts
from corematching.backends.sparse_ffn import SparseFFN
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec


class CpuBackend(Backend):
    """Runs whole prompt layers and whole decode steps in compiled code, for known architectures."""

    def __init__(self, model: nn.Module, parts: ModelSpec, sparse: Mapping[int, SparseFFN]) -> None:
        super().__init__(model, parts, sparse)
        kernels = find_kernels()
        self._isa = "" if kernels is None else kernels.isa
        self._embeddings: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.steps, self.head = NativeSteps(parts, sparse), NativeHead(model)
        self.prompts = NativePrompts(parts)

    @staticmethod
    def why_unsupported(parts: ModelSpec) -> str | None:
        """Why not, if the model is on another device or there are no kernels, else None."""
        device = next(parts.layers[0].parameters()).device
        if device.type != "cpu":
            return f"the model is on {device}"
        if find_kernels() is None:
            return f"there are no compiled kernels: {INSTALL_HINT}"
        return None

    def install(self, patches: Patches) -> None:
        """Replace the forwards of the decoder, its layers, the vision tower and the head."""
        weights = [p for layer in self.parts.layers for p in layer.parameters()]
        head = self._embeddings
        leave_file(weights if head is None else [*weights, *head.parameters()])
        patches.then(self.steps.remove)
        self.steps.install()
        patches.then(self.head.remove)
        self.head.install()
        patches.then(self.prompts.remove)
        self.prompts.install(self.steps.ffns)

    def refresh(self) -> None:
        """Check the weights for changes."""
        self.steps.refresh()

    def stats(self) -> BackendStats:
        """Native layers and steps."""
        return BackendStats(native_layers=self.prompts.layers, native_steps=self.steps.count)

    def dense_ffn_bytes(self, layer: int) -> int:
        """Bytes that native steps have read of an FFN with all neurons."""
        return self.steps.bytes_read(layer)

    def describe(self, ran: bool, counted: bool) -> str:
        """Native steps, or native FFNs."""
        if ran:
            return f"native steps ({self._isa})"
        kernel = next((ffn.kernel_name for ffn in self.sparse.values() if ffn.kernel_name), "")
        return f"{kernel} FFNs ({self._isa})" if counted else "torch"
