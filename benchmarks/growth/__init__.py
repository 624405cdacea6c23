"""How time and memory grow with the values of an update, the clients of a round, and the ranks."""
