"""Torch-only oracle of every kernel; also the CPU implementation. One op per file."""
