"""One interface for whatever computes prompts and decode steps; one file per backend beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from corematching.backends.sparse_ffn import SparseFFN
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec


@dataclass(frozen=True)
class BackendStats:
    """Counters of a backend, from its installation on.

    Attributes
    ----------
    native_layers : int
        Decoder layers of prompts whose forward ran in compiled CPU code.
    native_steps : int
        Decode steps that did.
    graph_replays : int
        Decode steps that were replayed from a CUDA graph.
    dense_ffn_bytes : dict
        Bytes of FFN weights that native steps read in layers with all neurons, by layer.
    """

    native_layers: int = 0
    native_steps: int = 0
    graph_replays: int = 0
    dense_ffn_bytes: Mapping[int, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Decode steps that ran in the backend's own code."""
        return self.native_steps + self.graph_replays


class Backend(ABC):
    """Runs the prompts and the decode steps of one model, as far as it can; the model the rest.

    A backend replaces forwards on module instances. Each replacement decides call by call whether
    it can take the call, and else runs the forward it replaced.

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
    def supports(parts: ModelSpec) -> str | None:
        """The reason why this backend cannot run such a model here, or None if it can."""

    @abstractmethod
    def install(self, patches: Patches) -> None:
        """Put the backend on the model."""

    @abstractmethod
    def refresh(self) -> None:
        """A prompt or a turn begins: weights and choices may be others."""

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
            Whether kernels have counted weights that they read.
        """

    def expect(self, tokens: int) -> None:
        """An answer of at most so many tokens is to come."""
        return
