"""Sampling from rows whose vocabulary is split over ranks; `programs` has what a rank does."""
