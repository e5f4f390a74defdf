"""Architectures as plain `torch.nn` modules: no file access, no global state."""
