"""The federated benchmark on a real pretrained LLaMA: SmolLM2-135M on GSM8K and MMLU."""
