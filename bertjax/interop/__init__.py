"""Weights and configs in the formats of other libraries, from one table of names."""
