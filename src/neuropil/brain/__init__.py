"""Networks for brains, and of brains."""
