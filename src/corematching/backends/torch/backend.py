"""The backend that adds nothing: PyTorch's operators, on every device."""

from __future__ import annotations

from corematching.backends.base import Backend, BackendStats
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec


class TorchBackend(Backend):
    """Prompts and decode steps run through the model's own forwards and the sparse FFNs."""

    @staticmethod
    def supports(parts: ModelSpec) -> str | None:
        """None: every model runs in PyTorch."""
        return None

    def install(self, patches: Patches) -> None:
        """Nothing to put on."""

    def refresh(self) -> None:
        """Nothing is remembered."""

    def stats(self) -> BackendStats:
        """Nothing to count."""
        return BackendStats()

    def describe(self, ran: bool, counted: bool) -> str:
        """Always ``torch``."""
        return "torch"
