"""Evaluation, benchmarks and analysis; they need extras, and nothing imports them."""
