"""Federated fine-tuning of the embedded LLaMA: quality against bytes, ours beside peers."""
