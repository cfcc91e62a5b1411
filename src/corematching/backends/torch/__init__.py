"""The PyTorch backend, the reference on every device."""
