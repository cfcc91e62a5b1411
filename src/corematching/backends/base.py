"""The interface of the backends, which run prompts and decode steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from corematching.backends.sparse_ffn import SparseFFN
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec


@dataclass(frozen=True)
class BackendStats:
    """Counters of a backend since its installation.

    Attributes
    ----------
    native_layers : int
        Decoder layers of prompts that ran in compiled CPU code.
    native_steps : int
        Decode steps that ran in compiled CPU code.
    graph_replays : int
        Decode steps replayed from a CUDA graph.
    """

    native_layers: int = 0
    native_steps: int = 0
    graph_replays: int = 0

    @property
    def steps(self) -> int:
        """Decode steps in the backend's own code."""
        return self.native_steps + self.graph_replays


class Backend(ABC):
    """Runs the prompts and the decode steps of one model.

    A backend replaces forwards on module instances. A replacement that does not support a call runs
    the original forward instead.

    Parameters
    ----------
    model : nn.Module
        The model.
    parts : ModelSpec
        Its parts.
    sparse : mapping
        The sparse FFNs, by layer.
    """

    def __init__(self, model: nn.Module, parts: ModelSpec, sparse: Mapping[int, SparseFFN]) -> None:
        self.model, self.parts, self.sparse = model, parts, sparse

    @staticmethod
    @abstractmethod
    def why_unsupported(parts: ModelSpec) -> str | None:
        """Why this backend cannot run a model here, in a few words; None if it can."""

    @abstractmethod
    def install(self, patches: Patches) -> None:
        """Install the backend on the model."""

    @abstractmethod
    def refresh(self) -> None:
        """Check weights and choices for changes, before a prompt or a turn."""

    @abstractmethod
    def stats(self) -> BackendStats:
        """The counters."""

    @abstractmethod
    def describe(self, ran: bool, counted: bool) -> str:
        """The name of the decode steps' code, for reports.

        Parameters
        ----------
        ran : bool
            Whether steps ran in the backend's own code.
        counted : bool
            Whether kernels counted the weights that they read.
        """

    def dense_ffn_bytes(self, layer: int) -> int:
        """Bytes of FFN weights that the backend's steps have read in a layer with all neurons."""
        return 0

    def expect(self, tokens: int) -> None:
        """Prepare for an answer of at most ``tokens`` tokens."""
        return
