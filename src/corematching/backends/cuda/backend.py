"""The CUDA backend: decode steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from corematching.backends.base import Backend, BackendStats
from corematching.backends.cuda.graph import CudaGraph, GraphSteps, Recorder
from corematching.backends.sparse_ffn import SparseFFN
from corematching.model.patching import Patches
from corematching.model.spec import ModelSpec


class CudaBackend(Backend):
    """Replays decode steps as CUDA graphs; sparse FFNs run on Triton kernels."""

    def __init__(
        self,
        model: nn.Module,
        parts: ModelSpec,
        sparse: Mapping[int, SparseFFN],
        make_recorder: Callable[[], Recorder] = CudaGraph,
    ) -> None:
        super().__init__(model, parts, sparse)
        self.graph = GraphSteps(parts, sparse, make_recorder)

    @staticmethod
    def why_unsupported(parts: ModelSpec) -> str | None:
        """The reason if the layers are not all on one CUDA device, else None."""
        devices = {p.device for layer in parts.layers for p in layer.parameters()}
        on_one = len(devices) == 1 and next(iter(devices)).type == "cuda"
        return None if on_one else "the layers are not all on one CUDA device"

    def install(self, patches: Patches) -> None:
        """Replace the decoder's forward for single tokens."""
        patches.then(self.graph.remove)
        self.graph.install()

    def refresh(self) -> None:
        """Check weights and choices for changes at the next step."""
        self.graph.refresh()

    def expect(self, tokens: int) -> None:
        """Leave room for ``tokens`` new tokens in the graph's buffers."""
        self.graph.room = max(tokens, 0)

    def stats(self) -> BackendStats:
        """The number of replayed steps."""
        return BackendStats(graph_replays=self.graph.count)

    def describe(self, ran: bool, counted: bool) -> str:
        """The FFNs' kernel, with "CUDA graph" if steps were replayed."""
        kernels = {ffn.kernel_name for ffn in self.sparse.values() if ffn.runs_uncounted}
        name = f"{kernels.pop()} FFNs" if kernels else "torch"
        return f"{name}, CUDA graph" if ran else name
