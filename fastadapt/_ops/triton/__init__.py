"""Triton kernels for CUDA tensors; loaded when a CUDA tensor first meets an operator.

Every kernel also runs under Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is
imported), where its tensors are those of the CPU.
"""
