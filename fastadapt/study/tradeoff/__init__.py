"""The trade-off of probability and quality under sampling adaptors (arXiv 2406.10203)."""
