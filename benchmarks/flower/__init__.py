"""A federation in Flower's deployment engine, on this machine: TCP bytes, losses, seconds."""
