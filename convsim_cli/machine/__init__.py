"""The machine: devices, precision, CUDA graphs, memory, and what torch.compile leaves alone."""
