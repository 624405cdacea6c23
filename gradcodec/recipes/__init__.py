"""Runnable recipes: the federated fine-tuning example and the small model it needs."""
