"""What computes: PyTorch everywhere, compiled kernels on CPUs, Triton and graphs on GPUs."""
