"""The choice of a backend for a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from corematching.backends.base import Backend
from corematching.backends.cpu.backend import CpuBackend
from corematching.backends.cuda.backend import CudaBackend
from corematching.backends.sparse_ffn import SparseFFN
from corematching.backends.torch.backend import TorchBackend
from corematching.errors import ConfigError, UnsupportedModelError
from corematching.model.spec import ModelSpec

ENGINES = ("auto", "torch", "native")
FASTEST_FIRST: tuple[type[Backend], ...] = (CpuBackend, CudaBackend, TorchBackend)


def check_engine(engine: str) -> str:
    """Return the engine's name, if it is known.

    Raises
    ------
    ConfigError
        The engine is unknown.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: choose {', '.join(ENGINES)}")
    return engine


def choose_backend(
    model: nn.Module, parts: ModelSpec, sparse: Mapping[int, SparseFFN], engine: str
) -> Backend:
    """The fastest backend for a model and an engine on this machine.

    Parameters
    ----------
    model : nn.Module
        The model.
    parts : ModelSpec
        Its parts.
    sparse : mapping
        The sparse FFNs, by layer.
    engine : str
        ``torch``: PyTorch operators only; ``auto``: the fastest; ``native``: the compiled kernels,
        or an error.

    Raises
    ------
    UnsupportedModelError
        ``native`` was requested, but the compiled kernels cannot run here.
    """
    if engine == "torch":
        return TorchBackend(model, parts, sparse)
    if engine == "native":
        reason = CpuBackend.why_unsupported(parts)
        if reason is not None:
            raise UnsupportedModelError(
                f"engine='native' cannot run here: {reason}; put the model on the CPU of a machine "
                "with compiled kernels, or use engine='auto'"
            )
    fastest = next(kind for kind in FASTEST_FIRST if not kind.why_unsupported(parts))
    return fastest(model, parts, sparse)
