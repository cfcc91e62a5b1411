"""The backends: PyTorch everywhere, compiled kernels on CPUs, Triton and CUDA graphs on GPUs."""
