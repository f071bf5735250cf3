"""Operators that torch knows, one module a family; each hands tensors to C++ or to Triton."""
