"""Operators under the log-odds of labels among lists of ids."""
