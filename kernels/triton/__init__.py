"""Triton: the kernels for GPUs. Each launcher has the name, and the arguments, of its operator.

Launchers never ask whether a tensor is on a GPU: under TRITON_INTERPRET=1 they take CPU tensors.
"""
