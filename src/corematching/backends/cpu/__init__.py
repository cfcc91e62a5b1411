"""Prompts and decode steps in compiled code on a CPU."""
