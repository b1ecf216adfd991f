"""The outside world: files, pictures, data sets. NumPy and PIL; no jit, no networks."""
