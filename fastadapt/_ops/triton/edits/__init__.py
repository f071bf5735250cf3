"""Edited rows on a GPU."""
