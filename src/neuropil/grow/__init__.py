"""More neurons, or another shape."""
