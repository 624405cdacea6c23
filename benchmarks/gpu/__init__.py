"""What is measured on a machine with one GPU, in minutes, by one command: ``run.sh``."""
