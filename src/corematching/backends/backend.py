"""What runs the decode steps and the prompts of one model, and what the steps read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from corematching.backends.cpu.decode import NativeSteps
from corematching.backends.cpu.head import NativeHead
from corematching.backends.cpu.native import find_library, leave_file
from corematching.backends.cpu.prefill import NativePrompts
from corematching.backends.cuda.graph import GraphSteps
from corematching.backends.sparse_ffn import SparseFFN
from corematching.errors import ConfigError, UnsupportedModelError
from corematching.model.spec import Parts

ENGINES = ("auto", "torch", "native")


@dataclass(frozen=True)
class Tally:
    """What has been read and run up to a moment.

    Attributes
    ----------
    read : list of int
        Bytes of FFN weights that kernels read, by layer.
    steps : int
        Native steps, or replayed ones.
    """

    read: list[int]
    steps: int


def check_engine(engine: str) -> str:
    """The name of an engine, if it is one.

    Raises
    ------
    ConfigError
        It is none.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: choose {', '.join(ENGINES)}")
    return engine


class Backend:
    """Runs prompts and single tokens with the fastest code that model, machine and caller allow.

    Parameters
    ----------
    model : nn.Module
        The model.
    parts : Parts
        Its parts.
    sparse : dict
        The layers' sparse FFNs, by layer.
    engine : str
        ``torch``: PyTorch's operators only; ``auto``: whatever is fastest; ``native``: the same,
        but not without the compiled kernels.

    Raises
    ------
    UnsupportedModelError
        ``native`` was asked for, and cannot be had.
    """

    def __init__(
        self, model: nn.Module, parts: Parts, sparse: dict[int, SparseFFN], engine: str
    ) -> None:
        self.parts, self.sparse = parts, sparse
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._head = head
        self._ffn_bytes = [_bytes_of(ffn) for ffn in parts.ffns]
        self._other_bytes = sum(map(_bytes_of, parts.attentions))
        self._other_bytes += 0 if head is None else _bytes_of(head)
        self.steps: NativeSteps | None = None
        self.head: NativeHead | None = None
        self.prompts: NativePrompts | None = None
        self.graph = find_graph(parts, sparse) if engine == "auto" else None
        device = next(parts.layers[0].parameters()).device
        library = find_library() if engine != "torch" and device.type == "cpu" else None
        self._target = "" if library is None else library.cm_target().decode()
        if engine == "native" and library is None:
            raise UnsupportedModelError(
                f"engine='native' needs a model on the CPU (this one is on {device}) and a C "
                "compiler (cc, gcc or clang): install one, or use engine='auto'"
            )
        if library is not None:
            self.steps, self.head = NativeSteps(parts, sparse), NativeHead(model)
            self.prompts = NativePrompts(parts)

    def install(self) -> None:
        """Put the patches on the model."""
        if self.graph is not None:
            self.graph.install()
        if self.steps is not None and self.head is not None and self.prompts is not None:
            weights = [p for layer in self.parts.layers for p in layer.parameters()]
            leave_file([*weights, *self._head.parameters()] if self._head else weights)
            self.steps.install()
            self.head.install()
            self.prompts.install(self.steps.ffns)

    def remove(self) -> None:
        """Take the patches off again."""
        if self.graph is not None:
            self.graph.remove()
        if self.steps is not None and self.head is not None and self.prompts is not None:
            self.prompts.remove()
            self.head.remove()
            self.steps.remove()

    def refresh(self) -> None:
        """Look at the weights again; a prompt or a turn begins."""
        for steps in (self.steps, self.graph):
            if steps is not None:
                steps.refresh()

    def expect(self, tokens: int) -> None:
        """An answer has at most so many tokens."""
        if self.graph is not None:
            self.graph.room = max(tokens, 0)

    def count(self) -> Tally:
        """What has been read and run so far."""
        return Tally(
            [self._layer_bytes(index) for index in range(len(self.parts.layers))],
            sum(steps.count for steps in (self.steps, self.graph) if steps is not None),
        )

    def name(self, before: Tally, after: Tally) -> str:
        """What ran the decode steps between two tallies."""
        replayed = after.steps > before.steps
        if replayed and self.steps is not None:
            return f"native steps ({self._target})"
        if after.read != before.read:
            kernel = next((f.kernel_name for f in self.sparse.values() if f.kernel_name), "")
            return f"{kernel} FFNs" + (f" ({self._target})" if self._target else "")
        plans = {f.kernel_name for f in self.sparse.values() if f.runs_uncounted}
        name = f"{plans.pop()} FFNs" if plans else "torch"
        return f"{name}, CUDA graph" if replayed else name

    def bytes_per_step(self, before: Tally, after: Tally, steps: int, batch: int) -> int:
        """Bytes of weights that a step read between two tallies: attentions, FFNs, vocabulary.

        Where no kernel counted them, what the operators must read.
        """
        total = self._other_bytes
        for index, dense in enumerate(self._ffn_bytes):
            read = after.read[index] - before.read[index]
            if read and steps:
                total += round(read / steps)
            elif index in self.sparse:
                total += self.sparse[index].bytes_read(batch)
            else:
                total += dense
        return total

    def dense_bytes(self) -> int:
        """The same for all neurons."""
        return self._other_bytes + sum(self._ffn_bytes)

    def _layer_bytes(self, index: int) -> int:
        dense = 0 if self.steps is None else self.steps.bytes_read(index)
        return dense + (self.sparse[index].bytes_counted() if index in self.sparse else 0)


def find_graph(parts: Parts, sparse: dict[int, SparseFFN]) -> GraphSteps | None:
    """What replays decode steps, where all layers are on one CUDA device."""
    devices = {p.device for layer in parts.layers for p in layer.parameters()}
    on_one = len(devices) == 1 and next(iter(devices)).type == "cuda"
    return GraphSteps(parts, sparse) if on_one else None


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
