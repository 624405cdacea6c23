"""A Flower app: a small LLaMA, fine-tuned by LoRA at two nodes."""
