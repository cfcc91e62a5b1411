"""Decode steps that run outside PyTorch where a model's form allows it."""

from .backend import Backend, Tally, check_engine

__all__ = ["Backend", "Tally", "check_engine"]
