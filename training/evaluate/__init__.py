"""Measuring: a room for what is shared, one for the embedded models on their held-out sets."""
