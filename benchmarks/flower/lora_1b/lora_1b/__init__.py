"""A Flower app whose adapters have the sizes of Llama-3.2-1B's; there is no model, only bytes."""
