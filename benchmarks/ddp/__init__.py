"""Data-parallel training over shaped links: loss against steps, seconds and bytes."""
