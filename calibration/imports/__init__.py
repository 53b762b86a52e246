"""Measurement rows out of other projects' published tables."""
