"""What this machine has: processor, packages, execution providers, NVIDIA driver and GPUs; and why CUDA is refused."""
