"""Evaluation, benchmarks and analysis; they need extras, and only the command imports them."""
