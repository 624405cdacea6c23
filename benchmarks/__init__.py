"""Measurements, run as modules: ``python -m benchmarks.NAME``; rows go to ``results/``."""
