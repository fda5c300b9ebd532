"""Objectives: what a run minimises, as loss sums and weights."""
