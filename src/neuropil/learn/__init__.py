"""Other ways to learn."""
