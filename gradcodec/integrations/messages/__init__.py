"""What adapters share: named tensors as named bytes, copies of a model that differences move."""
