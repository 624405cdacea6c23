"""What privacy costs, and what a code gives away."""
