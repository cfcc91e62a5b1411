"""Which kernels are used: the best that run here, a capped choice, or none."""

from __future__ import annotations

import logging

import pytest
import torch

from corematching.backends.cpu.backend import CpuBackend
from corematching.backends.cpu.native import KERNEL, find_kernels, library, supported_isas, use_isa
from corematching.backends.kernels import FFNWeights, find_kernel
from corematching.errors import ConfigError

ISAS = supported_isas()
compiled = pytest.mark.skipif(not ISAS, reason="no compiled kernels")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is chosen yet, neither by the environment nor by an earlier test."""
    for name in (library.SWITCH, library.CAP):
        monkeypatch.delenv(name, raising=False)
    library._find_once.cache_clear()
    library._say_off.cache_clear()
    yield
    library._find_once.cache_clear()


@pytest.fixture
def weights():
    up = torch.randn(6, 8)
    return FFNWeights(up, up.clone())


@compiled
def test_the_fastest_that_runs_here_is_used():
    best = find_kernels().isa
    assert best == library.compiled.best_isa() and best in ISAS
    assert ISAS[-1] == "portable" and set(ISAS) <= set(library.compiled.compiled_isas())
    if "amx" in ISAS:
        assert best == "amx"
    elif "avx2" in ISAS:
        assert best != "portable"


@compiled
def test_python_and_the_extension_agree_on_their_limits():
    assert library.compiled.MAX_BATCH == library.MAX_BATCH
    assert library.compiled.MAX_GEMMS == library.MAX_GEMMS


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_the_cap(isa, monkeypatch):
    monkeypatch.setenv(library.CAP, isa)
    assert find_kernels().isa == isa
    monkeypatch.setenv(library.CAP, "portable")
    assert find_kernels().isa == isa, "it is read once"


@compiled
@pytest.mark.parametrize("isa", ["sse9", "AVX2", "neon"])
def test_a_cap_that_this_machine_lacks_is_an_error_that_lists_what_it_has(isa, monkeypatch):
    monkeypatch.setenv(library.CAP, isa)
    with pytest.raises(ConfigError, match=f"CORE_MATCHING_ISA='{isa}'.*choose from: .*portable"):
        find_kernels()


@compiled
def test_an_instruction_set_that_the_processor_lacks(monkeypatch):
    class Extension:
        compiled_isas = staticmethod(lambda: ["amx", "avx2", "portable"])
        supported_isas = staticmethod(lambda: ["avx2", "portable"])
        best_isa = staticmethod(lambda: "avx2")
        find = staticmethod(lambda isa: None if isa == "amx" else portable)

    portable = library.compiled.find("portable")
    monkeypatch.setattr(library, "compiled", Extension)
    monkeypatch.setenv(library.CAP, "amx")
    with pytest.raises(ConfigError, match="choose from: avx2, portable"):
        find_kernels()
    monkeypatch.delenv(library.CAP)
    assert find_kernels() is not None


@compiled
def test_an_instruction_set_within_a_block():
    best = find_kernels()
    with use_isa("portable") as kernels:
        assert find_kernels() is kernels and kernels.isa == "portable"
        with use_isa(ISAS[0]):
            assert find_kernels().isa == ISAS[0]
        assert find_kernels().isa == "portable"
    assert find_kernels() is best
    with pytest.raises(ConfigError, match=r"isa='mmx'.*choose from"), use_isa("mmx"):
        pass


@compiled
def test_the_switch_turns_kernels_off(weights, monkeypatch, caplog):
    assert find_kernel(weights) is KERNEL
    monkeypatch.setenv(library.SWITCH, "0")
    with caplog.at_level(logging.INFO):
        assert find_kernels() is None and find_kernel(weights) is None
    assert [r.message for r in caplog.records].count(
        "native kernels are off (CORE_MATCHING_NATIVE=0): FFNs run in PyTorch"
    ) == 1
    monkeypatch.delenv(library.SWITCH)
    assert find_kernel(weights) is KERNEL


def test_a_missing_extension_is_reported_once_with_its_fix(weights, monkeypatch, caplog):
    monkeypatch.setattr(library, "compiled", None)
    monkeypatch.setattr(library, "missing", "No module named '_kernels'")
    with caplog.at_level(logging.WARNING):
        assert find_kernels() is None and find_kernels() is None
    (message,) = [r.message for r in caplog.records]
    assert message == (
        "no native kernels, FFNs run in PyTorch (No module named '_kernels'): install a C++17 "
        "compiler (g++ or clang++), then corematching again"
    )
    assert find_kernel(weights) is None and supported_isas() == []
    with pytest.raises(ConfigError, match="none, since there is no extension module"):
        use_isa("avx2").__enter__()


def test_a_missing_extension_leaves_the_backend_out(monkeypatch):
    class Parts:
        layers = (torch.nn.Linear(2, 2),)

    monkeypatch.setattr(library, "compiled", None)
    assert "install a C++17 compiler" in CpuBackend.why_unsupported(Parts())
