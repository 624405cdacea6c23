"""Adapters to the stacks that people run; each imports its framework when it is used."""
