"""Weights outside fast memory."""
