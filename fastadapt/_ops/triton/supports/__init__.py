"""Kernels for products of each row with its own few rows of a head, and for their gradients."""
