"""The CPU backend: prompts and decode steps in compiled code."""
