"""Competitors: ``federated``, most written from their papers; ``ddp``, by their own code."""
