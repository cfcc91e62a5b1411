"""The PyTorch backend: the model's own forwards and sparse FFNs in PyTorch operators."""

from __future__ import annotations

from corematching.backends.base import Backend, BackendStats
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec


class TorchBackend(Backend):
    """Prompts and decode steps run through the model's own forwards and the sparse FFNs."""

    @staticmethod
    def why_unsupported(parts: ModelSpec) -> str | None:
        """None: every model runs in PyTorch."""
        return None

    def install(self, patches: Patches) -> None:
        """Nothing to install."""

    def refresh(self) -> None:
        """No state to check."""

    def stats(self) -> BackendStats:
        """All counters 0."""
        return BackendStats()

    def describe(self, ran: bool, counted: bool) -> str:
        """Always ``torch``."""
        return "torch"
