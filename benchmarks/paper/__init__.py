"""What CG-FedLLM (arXiv 2405.13746) analyses, rerun beside controls and honest metrics."""
