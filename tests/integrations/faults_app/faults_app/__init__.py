"""A Flower app that says what it receives, and stops where a test wants to cause a fault."""
