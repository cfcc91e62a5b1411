"""The reference: plain PyTorch, right on every device."""
