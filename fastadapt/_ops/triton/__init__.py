"""Triton kernels for CUDA tensors, imported on the first call with one.

Every kernel also runs under Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is
imported), where its tensors are those of the CPU.
"""
