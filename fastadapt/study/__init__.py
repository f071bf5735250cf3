"""Analyses of losses and adaptors, built on the public functions; each module is imported alone."""
