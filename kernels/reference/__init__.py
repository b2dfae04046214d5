"""Plain PyTorch: the definition of every operation."""
