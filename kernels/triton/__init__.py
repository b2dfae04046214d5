"""The Triton kernels for GPUs. A launcher has the name and the arguments of its operator.

Launchers do not check whether a tensor is on a GPU: with TRITON_INTERPRET=1 they take CPU tensors.
"""
