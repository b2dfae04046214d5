"""The kernels, a folder per backend; `reference` defines what the others compute."""
