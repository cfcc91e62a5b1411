"""Which backend runs a model here."""

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
    """The name of an engine, if it is one.

    Raises
    ------
    ConfigError
        It is none.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: choose {', '.join(ENGINES)}")
    return engine


def choose_backend(
    model: nn.Module, parts: ModelSpec, sparse: Mapping[int, SparseFFN], engine: str
) -> Backend:
    """The fastest backend that model, machine and caller allow.

    Parameters
    ----------
    model : nn.Module
        The model.
    parts : ModelSpec
        Its parts.
    sparse : mapping
        The sparse FFNs, by layer.
    engine : str
        ``torch``: PyTorch's operators only; ``auto``: the fastest; ``native``: the same, but not
        without the compiled kernels.

    Raises
    ------
    UnsupportedModelError
        ``native`` was asked for, and cannot be had.
    """
    if engine == "torch":
        return TorchBackend(model, parts, sparse)
    if engine == "native":
        reason = CpuBackend.supports(parts)
        if reason is not None:
            raise UnsupportedModelError(
                f"engine='native' cannot be had: {reason}; put the model on the CPU of a machine "
                "with a C compiler, or use engine='auto'"
            )
    return next(kind(model, parts, sparse) for kind in FASTEST_FIRST if not kind.supports(parts))
