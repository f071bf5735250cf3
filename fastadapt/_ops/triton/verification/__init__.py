"""Verification of drafts on CUDA."""
