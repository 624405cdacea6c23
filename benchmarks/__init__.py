"""Measurements. ``python -m benchmarks.run CASE`` runs one; rows go to ``results/``."""
