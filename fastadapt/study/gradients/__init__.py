"""Gradients of losses that reward and penalise (arXiv 2408.16751)."""
