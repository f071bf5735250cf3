"""Kernels for filters in any order, those by the shape of the logits, XTC, the temperature last."""
