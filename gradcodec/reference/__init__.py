"""The maths of every op in torch: the oracle of C and Triton, and the fallback without them."""
