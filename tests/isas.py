"""Instruction sets to run kernels on, and one where prompts run in them."""

from __future__ import annotations

import pytest

from corematching.backends.cpu import prefill
from corematching.backends.cpu.native import supported_isas, use_isa


@pytest.fixture(params=supported_isas())
def isa(request):
    """Every instruction set that has kernels and runs here, in turn."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture
def native_prompts(isa, monkeypatch):
    """The same, and prompts run in the kernels, whether or not that is faster."""
    monkeypatch.setattr(prefill, "prefers_native", lambda dtype: True)
    return isa
