"""Fixtures of the kernels' tests."""

from tests.isas import isa, native_prompts  # noqa: F401
