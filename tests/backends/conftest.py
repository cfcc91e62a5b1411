"""Instruction sets to run kernels on."""

from __future__ import annotations

import pytest

from corematching.backends.cpu.native import supported_isas, use_isa


@pytest.fixture(params=supported_isas())
def isa(request):
    """Every instruction set that has kernels and runs here, in turn."""
    with use_isa(request.param):
        yield request.param
