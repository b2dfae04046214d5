"""An emulator of PTX, the virtual assembly of NVIDIA's GPUs, in numpy.

It runs what Triton compiles for a GPU on CPU tensors, one CTA after the other, all threads of a CTA
at once, and checks what hardware does not: see machine.py. launch.py puts it in the place of
Triton's driver. "The manual" is "Parallel Thread Execution ISA", version 8.7; the docstrings name
its sections by their titles.
"""
