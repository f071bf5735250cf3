"""The row work of a linear head."""
