"""Architectures as plain `torch.nn` modules, without file access or global state."""
